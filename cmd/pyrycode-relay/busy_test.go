package main

import (
	"context"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/pyrycode/pyrycode-relay/testenv"
)

// A phone whose frames keep arriving is alive, even if its pong is stuck behind
// them because its binary takes them slowly.
func TestBusyPhone_IsNotTakenForDead(t *testing.T) { // alone: the peers' library gives a pong 5 s
	const frames, size = 12_000, 1 << 10
	ctx := scenarioContext(t, time.Minute)
	n := startNode(t, "--ping-interval", "1s", "--pong-timeout", "3s")
	serverID := randomUUID()
	binary, err := testenv.DialBinary(ctx, n.url, testenv.BinaryOptions{ServerID: serverID, DialContext: dialSlowly})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(binary.Drop)
	phone := dialPhone(ctx, t, n, serverID)
	frame := []byte(`"` + strings.Repeat("x", size) + `"`)
	sent := make(chan error, 1)
	go func() {
		for range frames {
			if err := phone.Send(ctx, frame); err != nil {
				sent <- err
				return
			}
		}
		sent <- nil
	}()
	for i := range frames {
		e, err := binary.NextEnvelope(ctx)
		if err != nil || e.HasClose {
			t.Fatalf("after %d frames: got %s (%v), want a frame%s", i, describe(e), err, phoneEnd(phone))
		}
	}
	if err := <-sent; err != nil {
		t.Error(err)
	}
}

// dialSlowly dials a connection that reads 1.3 MB a second.
func dialSlowly(ctx context.Context, network, addr string) (net.Conn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	tcp := conn.(*net.TCPConn)
	return &slowConn{TCPConn: tcp, tick: time.NewTicker(50 * time.Millisecond)}, tcp.SetReadBuffer(32 << 10)
}

type slowConn struct {
	*net.TCPConn
	tick *time.Ticker
	left int // bytes that may be read before the next tick; owned by the reader
}

func (s *slowConn) Read(p []byte) (int, error) {
	if s.left == 0 {
		<-s.tick.C
		s.left = 64 << 10
	}
	n, err := s.TCPConn.Read(p[:min(len(p), s.left)])
	s.left -= n
	return n, err
}

func (s *slowConn) Close() error {
	s.tick.Stop()
	return s.TCPConn.Close()
}
