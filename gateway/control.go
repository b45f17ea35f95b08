package gateway

import (
	"context"
	"strconv"
	"sync"

	"github.com/pyrycode/pyrycode-relay/bus"
)

// control is the pings and pongs of a connection. The outbox writes them, between two
// batches of messages, like everything else: so they have the write deadline of a
// message, and not the 5 s after which the library breaks the connection, and no
// pong is left out because of a long message.
type control struct {
	mu       sync.Mutex
	pong     []byte        // payload of the peer's latest ping
	pongDue  bool          // RFC 6455, 5.5.3: only the latest ping need be answered
	asked    uint64        // pings are numbered; the latest that somebody waits for
	written  uint64        // the latest that was written
	answered uint64        // the latest whose pong came
	news     chan struct{} // closed when answered grows; nil while nobody waits
}

// pinged notes a ping of the peer.
func (c *control) pinged(payload []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pong, c.pongDue = append(c.pong[:0], payload...), true
}

// ask wants a ping, and returns its number.
func (c *control) ask() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.asked++
	return c.asked
}

// ponged notes a pong of the peer, which answers all pings up to its own.
func (c *control) ponged(payload []byte) {
	n, err := strconv.ParseUint(string(payload), 10, 64)
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil || n <= c.answered || n > c.written { // unsolicited, which is allowed
		return
	}
	c.answered = n
	if c.news != nil {
		close(c.news)
		c.news = nil
	}
}

// answeredTo reports whether ping n was answered.
func (c *control) answeredTo(n uint64) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.answered >= n
}

// wait returns nil when ping n was answered.
func (c *control) wait(ctx context.Context, n uint64, ended <-chan struct{}) error {
	for {
		c.mu.Lock()
		if c.answered >= n {
			c.mu.Unlock()
			return nil
		}
		if c.news == nil {
			c.news = make(chan struct{})
		}
		news := c.news
		c.mu.Unlock()
		select {
		case <-news:
		case <-ended:
			return bus.ErrClosed
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// due reports whether there is a control frame to write.
func (c *control) due() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.pongDue || c.asked > c.written
}

// next returns the next control frame to write.
func (c *control) next() (op opcode, payload []byte, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.pongDue:
		c.pongDue = false
		return opPong, append([]byte(nil), c.pong...), true
	case c.asked > c.written:
		c.written = c.asked
		return opPing, strconv.AppendUint(nil, c.written, 10), true
	}
	return 0, nil, false
}
