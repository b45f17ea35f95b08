package gateway

import (
	"sync"
	"time"

	"github.com/pyrycode/pyrycode-relay/bus"
)

// outbox is a connection's queue of messages to its peer. Its writer is a
// goroutine that exists only while there is something to write, and that also
// writes the close frame: so a close never overtakes a message, and a message that
// is half written is finished first. The queue needs no bound of its own: what
// comes over links is bounded by their credit.
type outbox struct {
	conn *conn

	// Guarded by mu.
	mu      sync.Mutex
	sock    *socket // nil until the upgrade is done
	queue   []message
	writing bool // the writer runs
	closing bool // closeAs is set; nothing more is queued
	closeAs closeCode
	failed  bool // the connection has ended; nothing can be written
}

// message is one message to the peer, and the link that is told when the socket
// has taken it.
type message struct {
	p    []byte
	link *bus.Link
}

// put queues m. It returns false when the connection is ending.
func (o *outbox) put(m message) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closing || o.failed {
		return false
	}
	o.queue = append(o.queue, m)
	o.wakeLocked()
	return true
}

// open gives the outbox its socket.
func (o *outbox) open(s *socket) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.sock = s
	if len(o.queue) > 0 || o.closing {
		o.wakeLocked()
	}
}

// close has the connection closed as c after what is queued, or after the message
// in hand where c says so or patience is over. The first call wins; it returns
// false for the others.
func (o *outbox) close(c closeCode, patience time.Duration) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closing || o.failed {
		return false
	}
	o.closing, o.closeAs = true, c
	if !c.now && len(o.queue) > 0 {
		o.conn.after(patience, o.dropQueue)
	}
	if c.now {
		o.queue = nil
	}
	o.wakeLocked()
	return true
}

func (o *outbox) dropQueue() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.queue = nil
}

// fail says that the connection has ended. It returns what was never written.
func (o *outbox) fail() []message {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.failed = true
	left := o.queue
	o.queue = nil
	return left
}

// closed returns how the relay closed the connection, if it did.
func (o *outbox) closed() (closeCode, bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.closeAs, o.closing
}

func (o *outbox) wakeLocked() {
	if o.writing || o.sock == nil || o.failed {
		return
	}
	o.writing = true
	o.conn.tasks.Go(o.writeLoop)
}

// writeLoop writes what is queued and ends when there is nothing left.
func (o *outbox) writeLoop() {
	for {
		o.mu.Lock()
		if len(o.queue) == 0 {
			o.writing = false
			sock, c, closing := o.sock, o.closeAs, o.closing && !o.failed
			o.mu.Unlock()
			if closing {
				sock.close(c)
			}
			return
		}
		m := o.queue[0]
		o.queue[0] = message{}
		o.queue = o.queue[1:]
		sock := o.sock
		o.mu.Unlock()
		if err := sock.write(m.p); err != nil {
			o.lost(m)
			sock.drop() // the reader ends with it
			return
		}
		if m.link != nil {
			m.link.Consumed(len(m.p))
			o.conn.g.metrics.forwarded(o.conn.kind)
		}
	}
}

// lost puts a message that could not be written back, to be told as such.
func (o *outbox) lost(m message) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.queue = append([]message{m}, o.queue...)
	o.failed = true
	o.writing = false
}
