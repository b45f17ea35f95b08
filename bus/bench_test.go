package bus

import (
	"fmt"
	"testing"

	"github.com/pyrycode/pyrycode-relay/testenv"
)

func BenchmarkCodec(b *testing.B) {
	payload := make([]byte, 300)
	buf := append(make([]byte, Headroom), payload...)
	m := Message{Kind: KindData, Link: 1, Session: NewSessionID(), Seq: 2, Ack: 3, Credit: 4}
	b.SetBytes(int64(len(buf)))
	b.ReportAllocs()
	for b.Loop() {
		m.putHeader(buf)
		if _, err := decode(buf, spoken); err != nil {
			b.Fatal(err)
		}
	}
}

// The header is written into, and read from, the buffer of the frame.
func TestCodec_AllocatesNothing(t *testing.T) {
	buf := make([]byte, Headroom+300)
	m := Message{Kind: KindData, Session: NewSessionID()}
	if n := testing.AllocsPerRun(100, func() {
		m.putHeader(buf)
		if _, err := decode(buf, spoken); err != nil {
			t.Fatal(err)
		}
	}); n > 0 {
		t.Errorf("%v allocations a message, want none", n)
	}
}

func BenchmarkLinkLocal(b *testing.B) {
	forSizes(b, func(b *testing.B, size int) {
		bus, h := benchBus(b, "nats://127.0.0.1:1")
		benchLink(b, bus, bus, h, size)
	})
}

func BenchmarkLinkNATS(b *testing.B) {
	s, err := testenv.StartServer(testenv.ServerOptions{})
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	forSizes(b, func(b *testing.B, size int) {
		phones, _ := benchBus(b, s.URL())
		binaries, h := benchBus(b, s.URL())
		for phones.Hello(b.Context(), binaries.Node()) != nil { // until its subscription is known
		}
		benchLink(b, phones, binaries, h, size)
	})
}

func forSizes(b *testing.B, bench func(b *testing.B, size int)) {
	for _, size := range []int{300, 8 << 10} {
		b.Run(fmt.Sprintf("%dB", size), func(b *testing.B) { bench(b, size) })
	}
}

func benchBus(b *testing.B, url string) (*Bus, *holder) {
	conn, err := Dial(ConnConfig{URL: url}, NewNodeID("gw"), logger)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(conn.Close)
	bus, h := New(conn, NewNodeID("gw"), Config{}, logger), newHolder()
	if err := bus.Start(h); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(bus.Close)
	return bus, h
}

// counter takes frames and says when all have come.
type counter struct {
	left int
	all  chan struct{}
}

func (c *counter) Deliver(l *Link, buf []byte) {
	l.Consumed(1, len(Frame(buf)))
	Free(buf)
	if c.left--; c.left == 0 {
		close(c.all)
	}
}

func (c *counter) End(*Link, error) {}

// benchLink sends one way as fast as the window allows. An op is one frame.
func benchLink(b *testing.B, phones, binaries *Bus, h *holder, size int) {
	c := &counter{left: b.N, all: make(chan struct{})}
	h.lets(c, false)
	p := phones.NewLink("s", "c", &counter{})
	if err := phones.Open(b.Context(), p, binaries.Node(), NewSessionID()); err != nil {
		b.Fatal(err)
	}
	b.SetBytes(int64(size))
	b.ReportAllocs()
	b.ResetTimer()
	for range b.N {
		if err := p.Send(make([]byte, Headroom+size)); err != nil {
			b.Fatal(err)
		}
	}
	<-c.all
}
