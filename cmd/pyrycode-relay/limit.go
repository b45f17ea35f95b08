package main

import (
	"net"
	"sync"
	"sync/atomic"
)

// limitListeners makes ports share a bound on open connections, WebSockets and
// others: over it, new ones wait in the kernel. The cap on WebSockets alone would
// not keep idle HTTP connections from taking every file descriptor.
func limitListeners(limit int) func(net.Listener) net.Listener {
	if limit <= 0 {
		return func(port net.Listener) net.Listener { return port }
	}
	slots := make(chan struct{}, limit)
	return func(port net.Listener) net.Listener {
		return &limitedListener{Listener: port, slots: slots, closed: make(chan struct{})}
	}
}

type limitedListener struct {
	net.Listener
	slots  chan struct{}
	once   sync.Once
	closed chan struct{}
}

func (l *limitedListener) Accept() (net.Conn, error) {
	select {
	case l.slots <- struct{}{}:
	case <-l.closed:
		return nil, net.ErrClosed
	}
	conn, err := l.Listener.Accept()
	if err != nil {
		<-l.slots
		return nil, err
	}
	return &limitedConn{TCPConn: conn.(*net.TCPConn), slots: l.slots}, nil
}

func (l *limitedListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return l.Listener.Close()
}

// limitedConn gives its slot back when it is closed.
type limitedConn struct {
	*net.TCPConn
	slots  chan struct{}
	closed atomic.Bool
}

// PlainTCP says that nothing stands between the connection and its reader: the gateway
// reads past the connection's own methods then.
func (c *limitedConn) PlainTCP() *net.TCPConn { return c.TCPConn }

func (c *limitedConn) Close() error {
	if !c.closed.Swap(true) {
		defer func() { <-c.slots }()
	}
	return c.TCPConn.Close()
}
