package gateway

import (
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pyrycode/pyrycode-relay/bus"
)

// A binary takes less than its phones send: the phone whose frame finds no room is
// told, the binary stays. Only what the relay itself has to say can be too much.
func TestOutbox_BinaryThatTakesTooLittle(t *testing.T) {
	t.Parallel()
	const size, fit = 1 << 10, 100
	b := &binary{}
	b.init(&Gateway{}, kindBinary, "b", func(int) {})
	b.out.limit = fit * (size + messageOverhead)
	link := new(bus.Link)
	for i := range fit {
		if err := b.out.put(message{make([]byte, bus.Headroom+size), link}); err != nil {
			t.Fatalf("frame %d of %d: %v", i, fit, err)
		}
	}
	if err := b.out.put(message{make([]byte, bus.Headroom+1), link}); !errors.Is(err, bus.ErrBacklog) {
		t.Errorf("a frame over the limit: %v, want ErrBacklog", err)
	}
	if code, closing := b.out.closed(); closing {
		t.Errorf("closed with %+v", code)
	}
	notices := 0
	for ; b.out.put(message{buf: make([]byte, size)}) == nil; notices++ {
	}
	if want := noticeRoom / (size + messageOverhead); notices != want {
		t.Errorf("%d notices over the limit, want %d", notices, want)
	}
	if code, closing := b.out.closed(); !closing || code != codeTooSlow {
		t.Errorf("closing %v with %+v, want %+v", closing, code, codeTooSlow)
	}
	left := b.abandon()
	n := 0
	for _, m := range left {
		if m.link == link && m.buf == nil {
			n++
		}
	}
	if n != fit {
		t.Errorf("%d frames are left to be told of, want %d", n, fit)
	}
}

// The peer goes while a message is being written: that one and all behind it are
// told of.
func TestOutbox_PeerGoesUnderAMessage_AllThatIsLeftIsTold(t *testing.T) {
	for name, readerFirst := range map[string]bool{"the reader ends first": true, "the writer ends first": false} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, c *conn, peer net.Conn) {
				link := new(bus.Link)
				for range 5 {
					if err := c.out.put(message{make([]byte, 100_000), link}); err != nil { // more than the pipe takes
						t.Fatal(err)
					}
				}
				synctest.Wait()
				if !readerFirst {
					c.sock.drop()
					synctest.Wait()
				}
				peer.Close()
				if left := c.end(); len(left) != 5 || left[0].link != link || left[4].link != link {
					t.Errorf("left %v, want five messages of the link", left)
				}
			})
		})
	}
}

// A peer that is slow and steady gets everything that was queued before its close
// frame, however long that takes.
func TestOutbox_SlowPeer_GetsAllBeforeTheClose(t *testing.T) {
	bubble(t, func(t *testing.T, c *conn, peer net.Conn) {
		const messages = 10
		long := make([]byte, 60_000)
		for range messages {
			if err := c.Send(long); err != nil {
				t.Fatal(err)
			}
		}
		c.closeAs(closeCode{code: 4321})
		if err := c.ping(t.Context()); !errors.Is(err, bus.ErrClosed) {
			t.Errorf("ping while it is closed: %v, want ErrClosed", err)
		}
		ended := make(chan error, 1)
		go func() {
			_, err := c.sock.next()
			ended <- err
		}()
		got := make([]byte, len(textFrame(long)))
		for i := range messages {
			advanceBubble(c.g.cfg.WriteTimeout / 2)
			if _, err := io.ReadFull(peer, got); err != nil {
				t.Fatalf("message %d: %v", i, err)
			}
		}
		var head [4]byte
		if _, err := io.ReadFull(peer, head[:]); err != nil || head != [4]byte{0x88, 2, 4321 >> 8, 4321 & 0xff} {
			t.Fatalf("got % x, %v, want the close frame", head, err)
		}
		peer.Close()
		if err := <-ended; err == nil {
			t.Error("the reader got a message, want the end")
		}
		c.end()
	})
}

// Pings of a slow peer are answered between two messages, at the latest when the one
// in hand has left; only the latest need be.
func TestControl_PongBetweenMessages(t *testing.T) {
	bubble(t, func(t *testing.T, c *conn, peer net.Conn) {
		var reader sync.WaitGroup
		reader.Go(func() { _ = c.readMessages(discard{}) })
		long := make([]byte, 100_000)
		for range 2 {
			if err := c.Send(long); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait() // the first is being written
		for _, p := range []string{"one", "two"} {
			if _, err := peer.Write(maskedFrame(0x89, []byte(p))); err != nil {
				t.Fatal(err)
			}
		}
		advanceBubble(7 * time.Second) // longer than the library gives a pong
		got := make([]byte, len(textFrame(long)))
		if _, err := io.ReadFull(peer, got); err != nil {
			t.Fatal(err)
		}
		var pong [5]byte
		if _, err := io.ReadFull(peer, pong[:]); err != nil || string(pong[:]) != "\x8a\x03two" {
			t.Errorf("got %q, %v, want the pong to the latest ping", pong, err)
		}
		if _, err := io.ReadFull(peer, got); err != nil {
			t.Fatal(err)
		}
		peer.Close()
		reader.Wait()
		c.end()
	})
}

// A ping that the peer's full socket does not take has the time of a message, and
// its pong that of the heartbeat.
func TestControl_PingIntoAFullSocket(t *testing.T) {
	bubble(t, func(t *testing.T, c *conn, peer net.Conn) {
		var reader sync.WaitGroup
		reader.Go(func() { _ = c.readMessages(discard{}) })
		full := make([]byte, 64<<10-4)
		if err := c.Send(full); err != nil {
			t.Fatal(err)
		}
		synctest.Wait() // the pipe is full
		alive := make(chan error, 1)
		go func() { alive <- c.ping(t.Context()) }()
		advanceBubble(c.g.cfg.WriteTimeout - time.Second)
		got := make([]byte, len(textFrame(full)))
		if _, err := io.ReadFull(peer, got); err != nil {
			t.Fatal(err)
		}
		var ping [3]byte
		if _, err := io.ReadFull(peer, ping[:]); err != nil || string(ping[:]) != "\x89\x011" {
			t.Fatalf("got %q, %v, want a ping", ping, err)
		}
		for _, p := range []string{"0", "2", "x"} { // none of these answers it
			if _, err := peer.Write(maskedFrame(0x8a, []byte(p))); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		select {
		case err := <-alive:
			t.Errorf("ping returned %v before its pong", err)
		default:
		}
		if _, err := peer.Write(maskedFrame(0x8a, []byte("1"))); err != nil {
			t.Fatal(err)
		}
		if err := <-alive; err != nil {
			t.Errorf("ping: %v", err)
		}
		peer.Close()
		reader.Wait()
		c.end()
	})
}

// A writer that found nothing to write does not close what another one is to write to: a
// message and the close that follows it at once come in their order.
func TestOutbox_WriterThatFoundNothing_LeavesTheCloseToTheNext(t *testing.T) {
	t.Parallel()
	c := new(conn)
	c.init(&Gateway{}, kindPhone, "c", func(int) {})
	o, first, second := &c.out, new(batch), new(batch)
	o.writing = true // the first one is at its end
	if got := o.take(first); got != over || o.writing {
		t.Fatalf("an empty outbox gives its writer work %d, writing %v, want it over", got, o.writing)
	}
	if err := c.Send([]byte("last")); err != nil {
		t.Fatal(err)
	}
	c.closeAs(closeCode{code: 4321})
	o.writing = true // the second one, which that message began
	if got := o.take(second); got != writing || len(second.messages) != 1 {
		t.Fatalf("work %d with %d messages, want the message", got, len(second.messages))
	}
	second.clear()
	if got := o.take(second); got != closing || !o.writing {
		t.Errorf("work %d, writing %v, want the close, and nobody after it", got, o.writing)
	}
}
