package gateway

import (
	"sync"
	"time"

	"github.com/pyrycode/pyrycode-relay/bus"
)

// outbox is a connection's queue of messages to its peer. Its writer is a
// goroutine that exists only while there is something to write, and that also
// writes the close frame: so a close never overtakes a message, and a message that
// is half written is finished first. A phone's queue is bounded by its link's
// credit; a binary's by limit, because frames of phones that have left stay in it.
type outbox struct {
	conn  *conn
	limit int // bytes that may wait; 0: no limit of its own

	// Guarded by mu.
	mu      sync.Mutex
	sock    *socket // nil until the upgrade is done
	queue   []message
	size    int  // bytes of queue, each message with messageOverhead
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

// cost is how m counts against a limit.
func (m message) cost() int { return len(m.p) + messageOverhead }

// put queues m. It returns false when the connection is ending, and ends one whose
// peer takes too little for what comes.
func (o *outbox) put(m message) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closing || o.failed {
		return false
	}
	if o.limit > 0 && o.size+m.cost() > o.limit {
		o.closing, o.closeAs = true, codeTooSlow
		o.dropLocked()
		o.wakeLocked()
		return false
	}
	o.queue = append(o.queue, m)
	o.size += m.cost()
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
		o.dropLocked()
	}
	o.wakeLocked()
	return true
}

func (o *outbox) dropQueue() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.dropLocked()
}

// dropLocked gives up what is queued. o.mu is held.
func (o *outbox) dropLocked() { o.queue, o.size = nil, 0 }

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
				sock.close(c, o.conn.done)
			}
			return
		}
		m := o.queue[0]
		o.queue[0] = message{}
		o.queue = o.queue[1:]
		o.size -= m.cost()
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
