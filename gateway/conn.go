package gateway

import (
	"context"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pyrycode/pyrycode-relay/bus"
)

// kind of a connection; also the label of its metrics.
type kind uint8

const (
	kindBinary kind = iota
	kindPhone
)

// conn is one connection: what phones and binaries have in common. Its run starts
// the reader, awaits the writer, and is awaited by Gateway.Shutdown.
type conn struct {
	g     *Gateway
	kind  kind
	id    string
	slot  int           // of the heartbeat
	beat  beat          // owned by heartbeatLoop
	done  chan struct{} // closed when the socket has ended
	sock  *socket       // set by start
	out   outbox
	tasks sync.WaitGroup // the writer, and a claim under way

	handling atomic.Bool   // the reader is in its handler
	stalls   atomic.Uint64 // how often it was there for longer than stallTime

	// onClose is called once, with the code, when the relay begins to close the
	// connection. It must not block.
	onClose func(code int)
}

func (c *conn) init(g *Gateway, k kind, id string, onClose func(code int)) {
	c.g, c.kind, c.id, c.onClose = g, k, id, onClose
	c.done = make(chan struct{})
	c.out.conn, c.out.run = c, c.out.writeLoop
}

// ConnID names the connection.
func (c *conn) ConnID() string { return c.id }

// Send queues one message. It returns bus.ErrClosed when the connection is ending.
func (c *conn) Send(p []byte) error {
	return c.out.put(message{buf: p})
}

// Close closes the connection as one that the relay has no more use for.
func (c *conn) Close() { c.closeAs(closeCode{code: statusGoingAway}) }

// closeAs closes the connection; the first code wins. It does not wait.
func (c *conn) closeAs(code closeCode) {
	if c.out.close(code) {
		c.onClose(code.code)
	}
}

// abandon is end for a connection whose upgrade failed.
func (c *conn) abandon() []message {
	close(c.done)
	c.out.fail()
	c.tasks.Wait()
	return c.out.left()
}

// start gives the connection its socket.
func (c *conn) start(s *socket) {
	c.sock = s
	c.out.open(s)
}

// end says that the socket has ended and waits for whatever works for the
// connection. It returns what was never written.
func (c *conn) end() []message {
	close(c.done)
	c.out.fail()
	c.sock.drop()
	c.tasks.Wait()
	return c.out.left()
}

// ping proves that the peer is alive: nil when the pong to a ping sent now came
// before ctx ended. A connection that the relay closes is as good as gone: nobody is
// told 4409 for its sake.
func (c *conn) ping(ctx context.Context) error {
	if _, closing := c.out.closed(); closing {
		return bus.ErrClosed
	}
	n := c.out.control.ask()
	c.out.wake()
	return c.out.control.wait(ctx, n, c.done)
}

// pinged has a ping of the peer answered.
func (c *conn) pinged(payload []byte) {
	c.out.control.pinged(payload)
	c.out.wake()
}

// sink takes the messages of a peer.
type sink interface {
	// begin returns what a message is appended to, of size bytes if it is like the one
	// before.
	begin(size int) []byte
	// message takes what begin returned, the message appended, for good.
	message(p []byte)
}

// readMessages gives s each message of the peer until the connection ends, and returns
// why. Messages that come while the relay closes the connection are read and dropped,
// so that the peer's close frame is seen.
func (c *conn) readMessages(s sink) error {
	size := usualMessage
	for {
		r, err := c.sock.next()
		if err != nil {
			return err
		}
		if size, err = c.readMessage(r, s, size); err != nil {
			return err
		}
		c.sock.endMessage()
	}
}

// readMessage reads one message, where the one before had size bytes, and returns its own
// size.
func (c *conn) readMessage(r io.Reader, s sink, size int) (int, error) {
	p := s.begin(size)
	start := len(p)
	p, err := readAll(r, p, start+c.g.cfg.MaxFrameBytes)
	size = len(p) - start
	switch {
	case err != nil:
		return 0, err
	case size > c.g.cfg.MaxFrameBytes:
		c.closeAs(codeTooBig)
		_, err := io.Copy(io.Discard, r)
		return 0, err
	}
	if _, closing := c.out.closed(); closing {
		return size, nil
	}
	begun := time.Now()
	c.handling.Store(true)
	s.message(p)
	c.handling.Store(false)
	if time.Since(begun) > stallTime {
		c.stalls.Add(1)
	}
	return size, nil
}

// discard is the sink of a peer that the relay has nothing to do with.
type discard struct{}

func (discard) begin(size int) []byte { return bus.NewBuffer(size) }
func (discard) message(p []byte)      { bus.Free(p) }

// readAll reads r to its end into p, or until there is more than limit.
func readAll(r io.Reader, p []byte, limit int) ([]byte, error) {
	for len(p) <= limit {
		if len(p) == cap(p) {
			p = append(p, 0)[:len(p)]
		}
		n, err := r.Read(p[len(p):min(cap(p), limit+1)])
		p = p[:len(p)+n]
		if err == io.EOF {
			return p, nil
		}
		if err != nil {
			return p, err
		}
	}
	return p, nil
}

// endedAs returns the code that says how a connection ended: the relay's own if it
// closed it, else the peer's, else 1001.
func (c *conn) endedAs(err error) int {
	if own, ok := c.out.closed(); ok {
		return own.code
	}
	if code, ok := peerCode(err); ok {
		return code
	}
	if brokeProtocol(err) {
		return codeProtocol.code
	}
	return statusGoingAway
}
