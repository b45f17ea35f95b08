package gateway

import (
	"bytes"
	bin "encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"

	"github.com/pyrycode/pyrycode-relay/testenv"
)

// bubble runs f in a synctest bubble, with a phone's connection that has just been
// upgraded and the raw bytes' end of it. f calls ends. Times are exact there.
func bubble(t *testing.T, f func(t *testing.T, c *conn, peer net.Conn)) {
	synctest.Test(t, func(t *testing.T) {
		c, handler, upgraded := phoneConn(t, Config{WriteTimeout: 8 * time.Second})
		l := testenv.NewListener()
		srv := &http.Server{Handler: handler}
		go func() { _ = srv.Serve(l) }() // until Close
		defer srv.Close()
		peer, err := l.Dial(t.Context(), "tcp", "relay.test")
		if err != nil {
			t.Fatal(err)
		}
		defer peer.Close()
		handshake(t, peer, "s")
		peer.SetReadDeadline(time.Time{})
		c.start(<-upgraded)
		f(t, c, peer)
	})
}

// phoneConn returns a phone's connection without a socket, and who upgrades a request for
// it.
func phoneConn(t *testing.T, cfg Config) (c *conn, handler http.Handler, upgraded <-chan *socket) {
	c = new(conn)
	c.init(&Gateway{cfg: cfg.withDefaults()}, kindPhone, "c", func(int) {})
	sockets := make(chan *socket, 1)
	return c, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s, err := upgrade(w, r, c, func() error { return nil })
		if err != nil {
			t.Error(err)
		}
		sockets <- s
	}), sockets
}

// overTCP returns a phone's connection that has just been upgraded over TCP, and the
// peer's end of it. They end with the test.
func overTCP(t *testing.T) (c *conn, peer net.Conn) {
	t.Helper()
	c, handler, upgraded := phoneConn(t, Config{})
	srv := httptest.NewServer(handler)
	t.Cleanup(srv.Close)
	peer, err := net.Dial("tcp", srv.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { peer.Close() })
	handshake(t, peer, "s")
	c.start(<-upgraded)
	t.Cleanup(func() { c.end() })
	return c, peer
}

// textFrame is a server's WebSocket frame.
func textFrame(p []byte) []byte {
	f := []byte{0x81, byte(len(p))}
	switch n := len(p); {
	case n > 0xffff:
		f[1] = 127
		f = bin.BigEndian.AppendUint64(f, uint64(n))
	case n > 125:
		f[1] = 126
		f = bin.BigEndian.AppendUint16(f, uint16(n)) //nolint:gosec // at most 65535
	}
	return append(f, p...)
}

// ends waits until the connection has ended, and checks that it took so long.
func (c *conn) ends(t *testing.T, since time.Time, want time.Duration) {
	t.Helper()
	_, err := c.sock.next()
	read := time.Since(since)
	c.end()
	if done := time.Since(since); err == nil || read != want || done != want {
		t.Errorf("the reader ended with %v after %v, all of it after %v, want %v", err, read, done, want)
	}
}

// A peer that takes a message a little at a time gets no new deadline for each of
// the writes that the message is made of.
func TestSocket_OneDeadlineForAMessage(t *testing.T) {
	bubble(t, func(t *testing.T, c *conn, peer net.Conn) {
		const pipe, header = 64 << 10, 4
		for _, p := range [][]byte{make([]byte, pipe-header), make([]byte, 200_000)} {
			if err := c.Send(p); err != nil {
				t.Fatal(err)
			}
		}
		start := time.Now()
		synctest.Wait() // the first fills the pipe, the second waits with all its bytes
		var peerReads sync.WaitGroup
		defer peerReads.Wait()
		peerReads.Go(func() {
			for p, err := make([]byte, writeBuffer), error(nil); err == nil; _, err = io.ReadFull(peer, p) {
				advanceBubble(c.g.cfg.WriteTimeout / 8)
			}
		})
		c.ends(t, start, c.g.cfg.WriteTimeout)
	})
}

// And a message that comes after one that was slow has its full time.
func TestSocket_EachMessageHasItsOwnDeadline(t *testing.T) {
	bubble(t, func(t *testing.T, c *conn, peer net.Conn) {
		const messages = 3
		long := make([]byte, 100_000)
		for range messages {
			if err := c.Send(long); err != nil {
				t.Fatal(err)
			}
		}
		for i := range messages {
			advanceBubble(c.g.cfg.WriteTimeout - time.Second)
			got := make([]byte, len(textFrame(long)))
			if _, err := io.ReadFull(peer, got); err != nil || !bytes.Equal(got, textFrame(long)) {
				t.Fatalf("message %d: %v", i, err)
			}
		}
		peer.Close()
		c.ends(t, time.Now(), 0)
	})
}

// A close code that may not go on the wire: what was written before arrives, then
// the end of the stream without a close frame, and the connection stays open for
// the peer to read that.
func TestSocket_UnsendableCode_PeerReadsEverythingThenEOF(t *testing.T) {
	const late = 300 * time.Millisecond
	for name, tt := range map[string]struct {
		leave bool // the peer closes, late, when it has read the end
		want  time.Duration
	}{
		"PeerCloses": {true, late},
		"PeerStays":  {false, dropPatience},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, c *conn, peer net.Conn) {
				var want []byte
				for i := range 5 {
					p := fmt.Appendf(nil, "[%d,%q]", i, strings.Repeat("x", 10_000))
					want = append(want, textFrame(p)...)
					if err := c.Send(p); err != nil {
						t.Fatal(err)
					}
				}
				start := time.Now()
				c.closeAs(closeCode{code: 1006})
				go func() {
					got, err := io.ReadAll(peer)
					if err != nil || !bytes.Equal(got, want) {
						t.Errorf("the peer got %d bytes, %v, want the %d of the messages", len(got), err, len(want))
					}
					if took := time.Since(start); took != 0 {
						t.Errorf("the peer saw the end after %v, want at once", took)
					}
					if tt.leave {
						advanceBubble(late)
						peer.Close()
					}
				}()
				c.ends(t, start, tt.want)
			})
		})
	}
}

// Nothing of a request outlives its upgrade, but for the token until the first
// envelope has it.
func TestUpgrade_ReleasesTheRequest(t *testing.T) {
	t.Parallel()
	n := newCluster(t, 1)[0]
	var headers, tokens atomic.Int32 // freed
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mark := []string{"x"}
		r.Header["X-Mark"] = mark
		runtime.AddCleanup(&mark[0], func(int) { headers.Add(1) }, 0)
		if token := strings.Clone(r.Header.Get(headerToken)); token != "" {
			r.Header[headerToken] = []string{token}
			runtime.AddCleanup(unsafe.StringData(token), func(int) { tokens.Add(1) }, 0)
		}
		n.gw.Handler().ServeHTTP(w, r)
	}))
	defer srv.Close()
	n.url = "ws" + strings.TrimPrefix(srv.URL, "http")
	p, b, connID := meet(n, n)
	await(t, "the requests' headers are freed", func() bool { runtime.GC(); return headers.Load() == 2 })
	await(t, "the token is freed", func() bool { runtime.GC(); return tokens.Load() == 1 })
	b.send(connID, "1")
	p.wantFrame("1")
}

// However a phone's bytes are cut on their way, behind the handshake's or in the middle of
// a header, its messages arrive whole, in order, once; with a ping and a pong between the
// fragments of one, and a pong before each.
func TestSocket_BytesCutAnywhere(t *testing.T) {
	t.Parallel()
	n := newCluster(t, 1)[0]
	for _, cut := range []int{1, 7, 63, 64, 65, 1 << 10, readSize - 1, readSize, readSize + 1, 1 << 20} {
		t.Run(fmt.Sprintf("every %d bytes", cut), func(t *testing.T) {
			t.Parallel()
			rng := rand.New(rand.NewPCG(1, uint64(cut)))
			id := newServerID()
			b := n.binary(id)
			var stream []byte
			var want []string
			sizes := []int{1, 58, 59, 60, 125, 126, 300, 5000, 40_000}
			if cut < 64 {
				sizes = sizes[:7] // or it would take a minute
			}
			for i := range 60 {
				text := fmt.Sprintf(`"%d-%s"`, i, strings.Repeat("x", sizes[rng.IntN(len(sizes))]))
				want = append(want, text)
				stream = append(stream, maskedFrame(0x8a, []byte("not asked for"))...)
				if half := len(text) / 2; i%3 == 0 {
					stream = append(stream, maskedFrame(0x01, []byte(text[:half]))...)
					stream = append(stream, maskedFrame(0x89, []byte("between"))...)
					stream = append(stream, maskedFrame(0x8a, []byte("between"))...)
					stream = append(stream, maskedFrame(0x80, []byte(text[half:]))...)
				} else {
					stream = append(stream, maskedFrame(0x81, []byte(text))...)
				}
			}
			c, err := net.Dial("tcp", strings.TrimPrefix(n.http, "http://"))
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			early := min(cut, 100) // in one segment with the handshake, as far as the network lets it
			handshake(t, &glued{Conn: c, behind: stream[:early]}, id)
			go func() { _, _ = io.Copy(io.Discard, c) }() // pongs
			for stream = stream[early:]; len(stream) > 0; stream = stream[min(cut, len(stream)):] {
				if _, err := c.Write(stream[:min(cut, len(stream))]); err != nil {
					t.Fatal(err)
				}
			}
			for i, text := range want {
				e, err := b.NextEnvelope(soon(t))
				if err != nil || string(e.Frame) != text {
					t.Fatalf("message %d: %.40q, %v, want %.40q", i, e.Frame, err, text)
				}
			}
		})
	}
}

// glued sends what stands behind with the first write.
type glued struct {
	net.Conn
	behind []byte
}

func (g *glued) Write(p []byte) (int, error) {
	_, err := g.Conn.Write(append(bytes.Clone(p), g.behind...))
	g.behind = nil
	return len(p), err
}

// What the socket did not take of a frame comes before whatever is written next.
func TestTryWrite_TheRestComesFirst(t *testing.T) {
	t.Parallel()
	frame := appendFrame(nil, opText, bytes.Repeat([]byte("x"), 40_000))
	for name, tt := range map[string]struct {
		write func(t *testing.T, c *conn)
		want  string
	}{
		"the writer's": {func(t *testing.T, c *conn) {
			c.out.owing = true
			if err := c.Send([]byte("after")); err != nil {
				t.Error(err)
			}
			c.closeAs(closeCode{code: 4321})
		}, "\x81\x05after\x88\x02\x10\xe1"},
		"nothing else": {func(_ *testing.T, c *conn) {
			c.out.owing = true
			c.out.wake()
		}, ""},
		"the library's": {func(t *testing.T, c *conn) {
			if n, err := c.sock.wire.Write([]byte("close frame")); n != len("close frame") || err != nil {
				t.Errorf("wrote %d bytes of the library, %v", n, err)
			}
			if !c.sock.tryWrite(frame) {
				t.Error("something is owed after the close frame")
			}
		}, "close frame"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c, peer := overTCP(t)
			whole := 0
			for c.sock.tryWrite(frame) {
				whole++
			}
			if whole == 0 {
				t.Fatal("a socket with nothing in it took no frame")
			}
			t.Logf("%d frames were taken, and %d bytes of the next", whole, len(frame)-len(c.sock.wire.owed))
			var writing sync.WaitGroup
			writing.Go(func() { tt.write(t, c) })
			defer writing.Wait()
			want := append(bytes.Repeat(frame, whole+1), tt.want...)
			got := make([]byte, len(want))
			peer.SetReadDeadline(time.Now().Add(patience))
			if _, err := io.ReadFull(peer, got); err != nil || !bytes.Equal(got, want) {
				t.Errorf("the peer did not get %d whole frames and %q: %v; the end is %q", whole+1, tt.want, err, got[len(got)-20:])
			}
		})
	}
}

// A ping that comes alone leaves without a writer; into a full socket, with one, once, and
// before what comes after it.
func TestBeat(t *testing.T) {
	t.Parallel()
	c, peer := overTCP(t)
	peer.SetReadDeadline(time.Now().Add(patience))
	want := func(text string) {
		t.Helper()
		got := make([]byte, len(text))
		if _, err := io.ReadFull(peer, got); err != nil || string(got) != text {
			t.Fatalf("the peer got %q, %v, want %q", got, err, text)
		}
	}
	state := func() (writing bool) {
		c.out.mu.Lock()
		defer c.out.mu.Unlock()
		return c.out.writing
	}
	c.out.beat()
	c.out.control.ask()
	c.out.beat()
	if state() {
		t.Error("a ping into an empty socket has a writer")
	}
	want("\x89\x011")

	filler, full := make([]byte, 64<<10), 0
	fill := func() (took int) {
		if c.sock.tryWrite(filler) {
			return len(filler)
		}
		took = len(filler) - len(c.sock.wire.owed)
		c.sock.wire.owed = nil
		return took
	}
	ping := 2
	for c.out.control.ask(); ; ping++ {
		for n := fill(); n > 0; n = fill() {
			full += n
		}
		if c.out.beat(); state() {
			break
		}
		full += len("\x89\x012") // there was room again: the peer's kernel had taken some
		if c.out.control.ask(); ping == 8 {
			t.Fatal("the socket was never full")
		}
	}
	c.out.beat() // the next heartbeat comes while it is being written
	if err := c.Send([]byte("after")); err != nil {
		t.Fatal(err)
	}
	c.closeAs(closeCode{code: 4321})
	if got, err := io.CopyN(io.Discard, peer, int64(full)); err != nil {
		t.Fatalf("the peer got %d bytes of %d: %v", got, full, err)
	}
	want(fmt.Sprint("\x89\x01", ping) + "\x81\x05after\x88\x02\x10\xe1")
}

// The relay takes itself only what the library would take for a pong, and for no more
// than that.
func TestTookPong_OnlyAWholePongAlone(t *testing.T) {
	t.Parallel()
	w, p := &wire{pongs: new(control)}, make([]byte, 2+4+130)
	took := 0
	for first := range 256 {
		for second := range 256 {
			for n := range len(p) + 1 {
				p[0], p[1] = byte(first), byte(second)
				want := first == 0x8a && n >= 6 && n <= 6+125 && second == 0x80+n-6
				if got := n > 0 && w.tookPong(p[:n]); got != want {
					t.Fatalf("% x and so on, %d bytes: took it %v, want %v", p[:2], n, got, want)
				} else if got {
					took++
				}
			}
		}
	}
	if took != 126 {
		t.Errorf("took %d pongs, want one of each length", took)
	}
	pong := maskedFrame(0x8a, nil)
	for what, w := range map[string]*wire{"in a header": {inHand: true}, "in a message": {inMessage: true}} {
		w.pongs = new(control)
		if w.tookPong(pong) {
			t.Errorf("took bytes %s for a pong", what)
		}
	}
}

// A pong that comes alone is taken without the library, which gets what comes after it.
func TestFill_LonePong(t *testing.T) {
	t.Parallel()
	c, peer := overTCP(t)
	w, number := c.sock.wire, uint64(12345) // long enough for all of the mask
	c.out.control.asked, c.out.control.written = number, number
	pong := append([]byte("\x8a\x85mask"), "12345"...)
	for i := range 5 {
		pong[6+i] ^= pong[2+i%4]
	}
	filled := false
	fill := func() bool {
		if err := w.raw.Control(func(fd uintptr) { filled = w.fill(fd) }); err != nil {
			t.Fatal(err)
		}
		return filled
	}
	if _, err := peer.Write(pong); err != nil {
		t.Fatal(err)
	}
	await(t, "the pong", func() bool { return fill() || c.out.control.answeredTo(number) })
	if filled || w.inHand || len(w.unread) > 0 {
		t.Errorf("the library gets %q of a pong", w.unread)
	}
	if _, err := peer.Write([]byte("next")); err != nil {
		t.Fatal(err)
	}
	await(t, "the next bytes", fill)
	if string(w.unread) != "next" {
		t.Errorf("the library gets %q, want what comes after the pong", w.unread)
	}
	peer.Close()
	w.unread = nil
	await(t, "the end", fill)
	if len(w.unread) > 0 || w.failed != nil {
		t.Errorf("got %q, %v, want the end", w.unread, w.failed)
	}
}
