package gateway

import (
	"sync"

	"github.com/pyrycode/pyrycode-relay/bus"
)

// outbox is a connection's queue of messages to its peer. Its writer is a
// goroutine that exists only while there is something to write. It writes control
// frames and the close frame too: so a close never overtakes a message, and a
// message that is half written is finished first. A phone's queue is bounded by its
// link's credit; a binary's by limit, because frames of phones that have left stay
// in it.
type outbox struct {
	conn    *conn
	limit   int // bytes that may wait; 0: no limit of its own
	control control

	// Guarded by mu.
	mu      sync.Mutex
	sock    *socket // nil until the upgrade is done
	queue   []message
	size    int       // bytes of queue, each message with messageOverhead
	unsent  []message // that were queued and can never be written, without their bytes
	writing bool      // the writer runs
	closing bool      // closeAs is set; nothing more is queued
	closeAs closeCode
	failed  bool // nothing can be written any more
}

// message is one message to the peer, and the link that is told when the socket
// has taken it.
type message struct {
	p    []byte
	link *bus.Link
}

// cost is how m counts against a limit.
func (m message) cost() int { return len(m.p) + messageOverhead }

// put queues m. The error is bus.ErrClosed when the connection is ending, and
// bus.ErrBacklog when there is no room for a phone's frame. What the relay itself
// has to say finds room beyond the limit; a connection whose peer does not even take
// that is closed.
func (o *outbox) put(m message) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closing || o.failed {
		return bus.ErrClosed
	}
	if o.limit > 0 && m.link != nil && o.size+m.cost() > o.limit {
		return bus.ErrBacklog
	}
	if o.limit > 0 && o.size+m.cost() > o.limit+noticeRoom {
		o.closing, o.closeAs = true, codeTooSlow
		o.dropLocked()
		o.wakeLocked()
		return bus.ErrClosed
	}
	o.queue = append(o.queue, m)
	o.size += m.cost()
	o.wakeLocked()
	return nil
}

// open gives the outbox its socket.
func (o *outbox) open(s *socket) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.sock = s
	if len(o.queue) > 0 || o.closing || o.control.due() {
		o.wakeLocked()
	}
}

// wake has the writer look for control frames.
func (o *outbox) wake() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.wakeLocked()
}

// close has the connection closed as c after what is queued, or after the messages in
// hand where c says so. Each message has its write deadline, so a peer that takes
// nothing does not delay it for longer. The first call wins; it returns false for
// the others.
func (o *outbox) close(c closeCode) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closing || o.failed {
		return false
	}
	o.closing, o.closeAs = true, c
	if c.now {
		o.dropLocked()
	}
	o.wakeLocked()
	return true
}

// dropLocked gives up what is queued. o.mu is held.
func (o *outbox) dropLocked() {
	o.giveUpLocked(o.queue)
	o.queue, o.size = nil, 0
}

// giveUpLocked remembers whose messages were never written. o.mu is held.
func (o *outbox) giveUpLocked(messages []message) {
	for _, m := range messages {
		o.unsent = append(o.unsent, message{link: m.link})
	}
}

// fail says that the connection has ended.
func (o *outbox) fail() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.failed = true
	o.dropLocked()
}

// left returns the messages that were never written, without their bytes. The caller
// has called fail, and waited for the writer.
func (o *outbox) left() []message {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.unsent
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

// batch is what leaves in one write, as far as it fits. A writer has one while it
// runs.
type batch struct {
	messages []message
	buf      []byte // nil until there are messages: most pings come alone
}

var batches = sync.Pool{New: func() any { return new(batch) }}

// writeLoop writes what is queued, in batches, and ends when there is nothing left.
func (o *outbox) writeLoop() {
	b := batches.Get().(*batch)
	defer batches.Put(b)
	for o.take(b) {
		if err := o.write(b); err != nil {
			o.lost(b)
			o.sock.drop() // the reader ends with it
			return
		}
		o.wrote(b)
	}
	o.mu.Lock()
	c, closing := o.closeAs, o.closing && !o.failed
	o.mu.Unlock()
	if closing {
		o.sock.close(c, o.conn.done)
	}
}

// take moves messages from the queue to b, one at least. It returns false when there
// is nothing to write; then the writer has ended, and for good if the connection is
// closing.
func (o *outbox) take(b *batch) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.failed || len(o.queue) == 0 && !o.control.due() {
		o.writing = o.closing
		return false
	}
	n := 0
	for size := 0; n < len(o.queue) && (n == 0 || size+o.queue[n].cost() <= batchSize); n++ {
		size += o.queue[n].cost()
		o.size -= o.queue[n].cost()
	}
	b.messages = append(b.messages, o.queue[:n]...)
	clear(o.queue[:n])
	if o.queue = o.queue[n:]; len(o.queue) == 0 {
		o.queue = nil
	}
	return true
}

// write writes the control frames that are due and then the messages of b.
func (o *outbox) write(b *batch) error {
	if len(b.messages) > 0 {
		if b.buf == nil {
			b.buf = make([]byte, 0, batchSize)
		}
		o.sock.hold(b.buf)
	}
	err := o.writeHeld(b.messages)
	if flushErr := o.sock.flush(); err == nil { // b.buf is not used after it
		err = flushErr
	}
	return err
}

func (o *outbox) writeHeld(messages []message) error {
	for op, payload, ok := o.control.next(); ok; op, payload, ok = o.control.next() {
		if err := o.sock.writeControl(op, payload); err != nil {
			return err
		}
	}
	for _, m := range messages {
		if err := o.sock.write(m.p); err != nil {
			return err
		}
	}
	return nil
}

// wrote tells the links of b that the socket has taken their frames.
func (o *outbox) wrote(b *batch) {
	frames := 0
	for i, m := range b.messages {
		if m.link != nil {
			m.link.Consumed(len(m.p))
			frames++
		}
		b.messages[i] = message{}
	}
	b.messages = b.messages[:0]
	if frames > 0 {
		o.conn.g.metrics.forwarded(o.conn.kind, frames)
	}
}

// lost ends the writer, whose messages in hand could not be written.
func (o *outbox) lost(b *batch) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.giveUpLocked(b.messages)
	clear(b.messages)
	b.messages = b.messages[:0]
	o.failed, o.writing = true, false
}
