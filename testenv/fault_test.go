package testenv

import (
	"bytes"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"time"
)

// proxied returns a proxy and the two ends of a connection through it.
func proxied(t *testing.T) (p *Proxy, client, server *net.TCPConn) {
	t.Helper()
	ln := must(net.Listen("tcp", "127.0.0.1:0"))(t)
	defer ln.Close()
	p = must(NewProxy(ln.Addr().String()))(t)
	t.Cleanup(p.Close)
	client = must(net.Dial("tcp", p.Addr()))(t).(*net.TCPConn)
	t.Cleanup(func() { client.Close() })
	server = must(ln.Accept())(t).(*net.TCPConn)
	t.Cleanup(func() { server.Close() })
	return p, client, server
}

func write(t *testing.T, c net.Conn, s string) {
	t.Helper()
	if _, err := c.Write([]byte(s)); err != nil {
		t.Fatal(err)
	}
}

func wantRead(t *testing.T, c net.Conn, want string) {
	t.Helper()
	c.SetReadDeadline(time.Now().Add(10 * time.Second))
	got := make([]byte, len(want))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != want {
		t.Fatalf("read %q, %v; want %q", got, err, want)
	}
}

// wantSilence checks that nothing arrives on c for a while.
func wantSilence(t *testing.T, c net.Conn) {
	t.Helper()
	c.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	if n, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("read %d bytes, %v; want silence", n, err)
	}
}

func wantReset(t *testing.T, c net.Conn) {
	t.Helper()
	c.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.ReadAll(c); !errors.Is(err, syscall.ECONNRESET) {
		t.Fatalf("read: %v; want a reset", err)
	}
}

// wantRefused dials p; the reset may come before the dial has returned.
func wantRefused(t *testing.T, p *Proxy) {
	t.Helper()
	c, err := net.Dial("tcp", p.Addr())
	if errors.Is(err, syscall.ECONNRESET) {
		return
	}
	defer must(c, err)(t).Close()
	wantReset(t, c)
}

func TestProxyForwardsBothWaysAndHalfCloses(t *testing.T) {
	_, client, server := proxied(t)
	write(t, client, "ping")
	wantRead(t, server, "ping")
	client.CloseWrite()
	if rest, err := io.ReadAll(server); len(rest) > 0 || err != nil {
		t.Fatalf("server read %q, %v; want the end", rest, err)
	}
	write(t, server, "pong")
	wantRead(t, client, "pong")
}

func TestProxyHoldsBytesAndDeliversThemOnResume(t *testing.T) {
	p, client, server := proxied(t)
	write(t, client, "one")
	wantRead(t, server, "one")
	p.Hold()
	p.Hold() // twice is once
	write(t, client, "two")
	write(t, server, "deux")
	client.CloseWrite()
	wantSilence(t, server)
	wantSilence(t, client)
	p.Resume()
	wantRead(t, server, "two")
	wantRead(t, client, "deux")
	if _, err := server.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Fatalf("server read: %v; want EOF", err)
	}
}

// A write that is stuck in the proxy because nobody reads must not keep Hold
// from returning, and loses and repeats nothing.
func TestProxyHoldInterruptsStuckWrite(t *testing.T) {
	p, client, server := proxied(t)
	sent := make([]byte, 24<<20)
	rand.Read(sent)
	written := make(chan error, 1)
	go func() {
		_, err := client.Write(sent)
		client.CloseWrite()
		written <- err
	}()
	for range 20 {
		p.Hold()
		p.Resume()
	}
	got := make([]byte, 0, len(sent))
	for range 20 {
		b := make([]byte, 1<<20)
		n := must(io.ReadFull(server, b))(t)
		got = append(got, b[:n]...)
		p.Hold()
		p.Resume()
	}
	got = append(got, must(io.ReadAll(server))(t)...)
	if err := <-written; err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, sent) {
		t.Fatalf("%d of %d bytes arrived, or they changed", len(got), len(sent))
	}
}

func TestProxyHoldsNewConnections(t *testing.T) {
	ln := must(net.Listen("tcp", "127.0.0.1:0"))(t)
	defer ln.Close()
	p := must(NewProxy(ln.Addr().String()))(t)
	defer p.Close()
	p.Hold()
	client := must(net.Dial("tcp", p.Addr()))(t)
	defer client.Close()
	write(t, client, "hello")
	wantSilence(t, client)
	p.Resume()
	server := must(ln.Accept())(t)
	defer server.Close()
	wantRead(t, server, "hello")
}

func TestProxyCutResetsHeldConnection(t *testing.T) {
	p, client, server := proxied(t)
	p.Hold()
	write(t, client, "lost")
	p.Cut()
	p.Resume()
	wantReset(t, client)
	wantReset(t, server)
}

func TestProxyForwardsReset(t *testing.T) {
	p, client, server := proxied(t)
	p.Hold()
	reset(client)
	wantSilence(t, server)
	p.Resume()
	wantReset(t, server)
}

func TestProxyRefusesAndChangesTarget(t *testing.T) {
	p, client, server := proxied(t)
	p.Refuse()
	wantRefused(t, p)
	write(t, client, "still here")
	wantRead(t, server, "still here")

	ln := must(net.Listen("tcp", "127.0.0.1:0"))(t)
	defer ln.Close()
	p.SetTarget(ln.Addr().String())
	p.Accept()
	again := must(net.Dial("tcp", p.Addr()))(t)
	defer again.Close()
	other := must(ln.Accept())(t)
	defer other.Close()
	write(t, again, "hello")
	wantRead(t, other, "hello")
}

func TestProxyResetsWhenTargetIsDown(t *testing.T) {
	ln := must(net.Listen("tcp", "127.0.0.1:0"))(t)
	ln.Close()
	p := must(NewProxy(ln.Addr().String()))(t)
	defer p.Close()
	wantRefused(t, p)
}

// A hundred bursts are under way at once: the delay is paid once, not for each.
func TestProxyDelayKeepsOrderAndThroughput(t *testing.T) {
	p, client, server := proxied(t)
	const delay = 100 * time.Millisecond
	p.SetDelay(delay)
	start := time.Now()
	want := ""
	for i := range 100 {
		burst := string(rune('a'+i%26)) + "\n"
		write(t, client, burst)
		want += burst
		time.Sleep(time.Millisecond) //nolint:forbidigo // so that they are chunks of their own
	}
	wantRead(t, server, want)
	if took := time.Since(start); took < delay || took > 50*delay {
		t.Errorf("took %v; want a little more than %v", took, delay)
	}
}
