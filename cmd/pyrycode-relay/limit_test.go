package main

import (
	"net"
	"testing"
	"time"
)

func TestLimitListeners_OverTheBoundConnectionsWait(t *testing.T) {
	t.Parallel()
	port, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port = limitListeners(2)(port)
	accepted := make(chan net.Conn, 8)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := port.Accept()
			if err != nil {
				return
			}
			accepted <- c
		}
	}()
	for range 4 {
		c, err := net.Dial("tcp", port.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
	}
	open := []net.Conn{<-accepted, <-accepted}
	select {
	case <-accepted:
		t.Error("a third connection was accepted")
	case <-time.After(50 * time.Millisecond):
	}
	_ = open[0].Close()
	_ = open[0].Close() // gives back one slot, not two
	third := <-accepted
	select {
	case <-accepted:
		t.Error("a fourth connection was accepted")
	case <-time.After(50 * time.Millisecond):
	}
	_ = open[1].Close()
	_ = (<-accepted).Close()
	_ = third.Close()
	_ = port.Close() // while Accept waits for a connection
	<-done
}
