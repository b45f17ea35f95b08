package testenv

import (
	"errors"
	"net"
	"os"
	"sync"
	"time"
)

// socket is a net.Conn whose reads can be paused. Its read deadline is taken.
type socket struct {
	net.Conn
	valve   valve
	reading sync.Mutex    // held while Conn is read
	dead    chan struct{} // closed by Close
	close   sync.Once
}

func (s *socket) pause() {
	s.valve.shutWith(func() { s.Conn.SetReadDeadline(longAgo) })
	s.reading.Lock()   // wait for the interrupted read to end
	s.reading.Unlock() //nolint:staticcheck // nothing is done under it
}

func (s *socket) Read(b []byte) (int, error) {
	for s.valve.wait(s.dead) {
		n, err := s.readIfOpen(b)
		if n == 0 && errors.Is(err, os.ErrDeadlineExceeded) {
			continue // paused
		}
		return n, err
	}
	return 0, net.ErrClosed
}

func (s *socket) readIfOpen(b []byte) (int, error) {
	s.reading.Lock()
	defer s.reading.Unlock()
	if !s.valve.ifOpen(func() { s.Conn.SetReadDeadline(time.Time{}) }) {
		return 0, os.ErrDeadlineExceeded
	}
	return s.Conn.Read(b)
}

func (s *socket) Close() error {
	s.close.Do(func() { close(s.dead) })
	return s.Conn.Close()
}

func (s *socket) SetLinger(sec int) error {
	if c, ok := s.Conn.(interface{ SetLinger(int) error }); ok {
		return c.SetLinger(sec)
	}
	return nil
}
