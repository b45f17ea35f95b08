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
		g := &Gateway{cfg: Config{WriteTimeout: 8 * time.Second}.withDefaults()}
		c := new(conn)
		c.init(g, kindPhone, "c", func(int) {})
		upgraded := make(chan *socket, 1)
		l := testenv.NewListener()
		srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			s, err := upgrade(w, r, c, func() error { return nil })
			if err != nil {
				t.Error(err)
			}
			upgraded <- s
		})}
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
// a header, its messages arrive whole, in order, once; with a ping between the fragments
// of one.
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
				if half := len(text) / 2; i%3 == 0 {
					stream = append(stream, maskedFrame(0x01, []byte(text[:half]))...)
					stream = append(stream, maskedFrame(0x89, []byte("between"))...)
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
