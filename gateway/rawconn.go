package gateway

import (
	"errors"
	"net"
	"syscall"
)

// rawConn gives access to a plain TCP connection: a *net.TCPConn, or one that says by
// PlainTCP that it is no more than that. It is nil for any other, which may have bytes in
// buffers of its own (TLS, the PROXY protocol).
func rawConn(conn net.Conn) syscall.RawConn {
	if plain, ok := conn.(interface{ PlainTCP() *net.TCPConn }); ok {
		conn = plain.PlainTCP()
	}
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return nil
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return nil // it is closed, as the first read will tell
	}
	return raw
}

// readFD is one read of a socket that does not block: EAGAIN if there is nothing yet, 0
// without an error at its end.
func readFD(fd uintptr, p []byte) (int, error) {
	for {
		n, err := syscall.Read(int(fd), p)
		if !errors.Is(err, syscall.EINTR) {
			return n, err
		}
	}
}

// writeFD is one write to a socket that does not block. It returns how much of p was
// taken: nothing if the socket is full, or broken, as the next write that waits will tell.
func writeFD(fd uintptr, p []byte) int {
	for {
		n, err := syscall.Write(int(fd), p)
		if !errors.Is(err, syscall.EINTR) {
			return max(0, n)
		}
	}
}
