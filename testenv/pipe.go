package testenv

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// pipeBytes is what one direction of an in-memory connection buffers, like a
// small socket buffer.
const pipeBytes = 64 << 10

// Listener is a network of one address, in memory. Its connections behave like
// TCP: each direction buffers 64 KiB, Write blocks while that is full, deadlines
// work, and what was written before Close (or CloseWrite) is read before io.EOF.
// Unlike TCP's, Close never discards what the peer has yet to read. Addresses
// look like those of TCP, with a port of its own for each connection.
//
// A goroutine that waits in a connection or in a Listener is durably blocked in
// the sense of testing/synctest. All methods may be called concurrently.
type Listener struct {
	accept chan net.Conn
	done   chan struct{}
	close  sync.Once
}

// NewListener returns a Listener that is ready to be dialled.
func NewListener() *Listener {
	return &Listener{accept: make(chan net.Conn), done: make(chan struct{})}
}

// Accept returns the next connection. It fails with net.ErrClosed after Close.
func (l *Listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.accept:
		return c, nil
	case <-l.done:
		return nil, &net.OpError{Op: "accept", Net: "tcp", Addr: l.Addr(), Err: net.ErrClosed}
	}
}

// Close ends Accept and Dial. Connections stay.
func (l *Listener) Close() error {
	l.close.Do(func() { close(l.done) })
	return nil
}

// Addr returns 127.0.0.1:1, which no real server listens on.
func (l *Listener) Addr() net.Addr { return pipeAddr(1) }

// Dial returns a connection once the Listener has accepted it, whatever network
// and address are. It fails with net.ErrClosed after Close, or when ctx ends.
func (l *Listener) Dial(ctx context.Context, network, addr string) (net.Conn, error) {
	client, server := newPipe(l.Addr())
	select {
	case l.accept <- server:
		return client, nil
	case <-l.done:
		return nil, &net.OpError{Op: "dial", Net: "tcp", Addr: l.Addr(), Err: net.ErrClosed}
	case <-ctx.Done():
		return nil, &net.OpError{Op: "dial", Net: "tcp", Addr: l.Addr(), Err: ctx.Err()}
	}
}

var lastPipePort atomic.Uint32

func pipeAddr(port int) net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: port} }

func newPipe(listener net.Addr) (client, server *pipeConn) {
	dialer := pipeAddr(2 + int(lastPipePort.Add(1)%65_000))
	up, down := newStream(), newStream()
	client = &pipeConn{in: down, out: up, local: dialer, remote: listener}
	server = &pipeConn{in: up, out: down, local: listener, remote: dialer}
	return client, server
}

// pipeConn is one end of an in-memory connection.
type pipeConn struct {
	in, out       *stream
	local, remote net.Addr
}

func (c *pipeConn) Read(b []byte) (int, error) {
	n, err := c.in.read(b)
	return n, c.wrap("read", err)
}

func (c *pipeConn) Write(b []byte) (int, error) {
	n, err := c.out.write(b)
	return n, c.wrap("write", err)
}

// CloseWrite ends this end's stream: the peer reads io.EOF after the last byte.
func (c *pipeConn) CloseWrite() error {
	c.out.closeWriter()
	return nil
}

func (c *pipeConn) Close() error {
	c.out.closeWriter()
	c.in.closeReader()
	return nil
}

func (c *pipeConn) LocalAddr() net.Addr  { return c.local }
func (c *pipeConn) RemoteAddr() net.Addr { return c.remote }

func (c *pipeConn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

func (c *pipeConn) SetReadDeadline(t time.Time) error {
	c.in.setDeadline(&c.in.readBy, t)
	return nil
}

func (c *pipeConn) SetWriteDeadline(t time.Time) error {
	c.out.setDeadline(&c.out.writeBy, t)
	return nil
}

// wrap makes err look like that of a net.Conn. io.EOF stays as it is.
func (c *pipeConn) wrap(op string, err error) error {
	if err == nil || errors.Is(err, io.EOF) {
		return err
	}
	return &net.OpError{Op: op, Net: "tcp", Source: c.local, Addr: c.remote, Err: err}
}

// stream is one direction of an in-memory connection: a bounded buffer.
type stream struct {
	changed *sync.Cond // on mu, of everything below

	// Guarded by mu.
	mu                       sync.Mutex
	buf                      []byte
	readBy, writeBy          deadline
	readerClosed, writerDone bool
}

type deadline struct {
	at    time.Time // zero means none
	timer *time.Timer
}

func (d *deadline) passed() bool { return !d.at.IsZero() && !time.Now().Before(d.at) }

func newStream() *stream {
	s := new(stream)
	s.changed = sync.NewCond(&s.mu)
	return s
}

func (s *stream) read(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		switch {
		case s.readerClosed:
			return 0, net.ErrClosed
		case s.readBy.passed():
			return 0, os.ErrDeadlineExceeded
		case len(b) == 0:
			return 0, nil
		case len(s.buf) > 0:
			n := copy(b, s.buf)
			s.buf = append(s.buf[:0], s.buf[n:]...)
			s.changed.Broadcast()
			return n, nil
		case s.writerDone:
			return 0, io.EOF
		}
		s.changed.Wait()
	}
}

// write returns net.ErrClosed after its own end was closed and io.ErrClosedPipe
// after the reader's, with the number of bytes that were taken before.
func (s *stream) write(b []byte) (n int, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		switch {
		case s.writerDone:
			return n, net.ErrClosed
		case s.readerClosed:
			return n, io.ErrClosedPipe
		case s.writeBy.passed():
			return n, os.ErrDeadlineExceeded
		}
		if m := min(len(b), pipeBytes-len(s.buf)); m > 0 {
			s.buf = append(s.buf, b[:m]...)
			b, n = b[m:], n+m
			s.changed.Broadcast()
		}
		if len(b) == 0 {
			return n, nil
		}
		s.changed.Wait()
	}
}

func (s *stream) closeWriter() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.writerDone = true
	s.writeBy.stop()
	s.changed.Broadcast()
}

func (s *stream) closeReader() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.readerClosed = true
	s.readBy.stop()
	s.changed.Broadcast()
}

// setDeadline sets d, which is one of s's own.
func (s *stream) setDeadline(d *deadline, t time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	d.stop()
	d.at = t
	if wait := time.Until(t); !t.IsZero() && wait > 0 {
		d.timer = time.AfterFunc(wait, func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.changed.Broadcast()
		})
	}
	s.changed.Broadcast()
}

func (d *deadline) stop() {
	if d.timer != nil {
		d.timer.Stop()
		d.timer = nil
	}
}
