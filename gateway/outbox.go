package gateway

import (
	"sync"

	"github.com/pyrycode/pyrycode-relay/bus"
)

// outbox is a connection's queue of messages to its peer. Its writer is a
// goroutine that exists only while there is something to write, but for a ping that
// beat can write without waiting. It writes control frames and the close frame too: so a
// close never overtakes a message, and a message that is half written is finished first.
// A phone's queue is bounded by its link's credit; a binary's by limit, because frames
// of phones that have left stay in it.
type outbox struct {
	conn    *conn
	run     func() // writeLoop; made once, because go allocates what it has to bind
	limit   int    // bytes that may wait; 0: no limit of its own
	control control

	// Guarded by mu.
	mu      sync.Mutex
	sock    *socket // nil until the upgrade is done
	queue   bus.Queue[message]
	size    int       // bytes of queue, each message with messageOverhead
	unsent  []message // that were queued and can never be written, without their bytes
	writing bool      // the writer runs, or beat writes in its place
	owing   bool      // sock has a part of a ping to write
	closing bool      // closeAs is set; nothing more is queued
	closeAs closeCode
	failed  bool // nothing can be written any more
}

// message is one message to the peer. With a link, buf is a buffer of the bus, and the
// link is told when the socket has taken the frame in it.
type message struct {
	buf  []byte
	link *bus.Link
}

// text is what the peer gets.
func (m message) text() []byte {
	if m.link != nil {
		return bus.Frame(m.buf)
	}
	return m.buf
}

// cost is how m counts against a limit.
func (m message) cost() int { return len(m.text()) + messageOverhead }

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
	o.queue.Push(m)
	o.size += m.cost()
	o.wakeLocked()
	return nil
}

// open gives the outbox its socket.
func (o *outbox) open(s *socket) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.sock = s
	if o.queue.Len() > 0 || o.closing || o.control.due() {
		o.wakeLocked()
	}
}

// wake has the writer look for control frames.
func (o *outbox) wake() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.wakeLocked()
}

// beat writes the control frame that is due without waiting, and so without a writer.
// What the socket does not take at once is the writer's.
func (o *outbox) beat() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.writing || o.sock == nil || o.failed {
		return
	}
	op, payload, ok := o.control.next()
	if !ok {
		return
	}
	o.writing = true
	o.mu.Unlock()
	owing := !o.sock.tryWrite(appendFrame(nil, op, payload))
	o.mu.Lock()
	o.writing, o.owing = false, owing
	if owing || o.queue.Len() > 0 || o.closing || o.control.due() {
		o.wakeLocked()
	}
}

// close has the connection closed as c after what is queued, or after the messages in
// hand where c says so. Each write has its deadline, so a peer that takes
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

// dropLocked gives up what is queued, and remembers whose messages were never written.
// o.mu is held.
func (o *outbox) dropLocked() {
	for o.queue.Len() > 0 {
		o.unsent = append(o.unsent, message{link: o.queue.Pop().link})
	}
	o.size = 0
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
	o.conn.tasks.Add(1)
	go o.run()
}

// batch is what leaves in one write. A writer has one while it runs.
type batch struct {
	messages []message
	control  [2 * controlFrame]byte // for a pong and a ping that leave alone
	frames   []byte                 // nil until there are messages: most pings come alone
}

var batches = sync.Pool{New: func() any { return new(batch) }}

// writeLoop writes what is queued, in batches, and ends when there is nothing left.
func (o *outbox) writeLoop() {
	defer o.conn.tasks.Done()
	b := batches.Get().(*batch)
	defer batches.Put(b)
	for {
		switch o.take(b) {
		case over:
			return
		case closing:
			o.sock.close(o.closeAs, o.conn.done) // closeAs stays as it is
			return
		}
		if err := o.write(b); err != nil {
			o.lost(b)
			o.sock.drop() // the reader ends with it
			return
		}
		o.wrote(b)
	}
}

// work is what a writer is to do.
type work uint8

const (
	over    work = iota // nothing: it ends, and another one may begin
	closing             // the close, which nothing follows: no other one begins
	writing             // what take put into the batch
)

// take moves messages from the queue to b, if there are any. What it returns is decided
// together with whether another writer may begin: else that one's message could come
// after this one's close.
func (o *outbox) take(b *batch) work {
	o.mu.Lock()
	defer o.mu.Unlock()
	switch {
	case o.failed:
		return over // nothing begins any more
	case o.queue.Len() > 0 || o.owing || !o.closing && o.control.due(): // a flood of pings puts off no close
	case o.closing:
		return closing
	default:
		o.writing = false
		return over
	}
	o.owing = false
	for size := 0; o.queue.Len() > 0; {
		m := *o.queue.At(0)
		if size += m.cost(); size > batchSize && len(b.messages) > 0 {
			break
		}
		o.size -= m.cost()
		b.messages = append(b.messages, o.queue.Pop())
	}
	return writing
}

// write writes the control frames that are due and then the messages of b. A message
// that is larger than a batch is alone in it, and is not copied.
func (o *outbox) write(b *batch) error {
	frames := b.control[:0]
	if len(b.messages) > 0 {
		if b.frames == nil {
			b.frames = make([]byte, 0, len(b.control)+batchSize)
		}
		frames = b.frames[:0]
	}
	for op, payload, ok := o.control.next(); ok; op, payload, ok = o.control.next() {
		frames = appendFrame(frames, op, payload)
		if len(frames)+controlFrame > len(b.control) {
			break // the next batch has the others
		}
	}
	var rest []byte
	for _, m := range b.messages {
		if m.cost() > batchSize {
			frames, rest = appendHeader(frames, opText, len(m.text())), m.text()
			break
		}
		frames = appendFrame(frames, opText, m.text())
	}
	return o.sock.write(frames, rest)
}

// wrote tells the links of b that the socket has taken their frames.
func (o *outbox) wrote(b *batch) {
	total, frames, bytes := 0, 0, 0
	for i, m := range b.messages {
		if m.link == nil {
			continue
		}
		total, frames, bytes = total+1, frames+1, bytes+len(m.text())
		if i+1 == len(b.messages) || b.messages[i+1].link != m.link {
			m.link.Consumed(frames, bytes)
			frames, bytes = 0, 0
		}
		bus.Free(m.buf)
	}
	b.clear()
	if total > 0 {
		o.conn.g.metrics.forwarded(o.conn.kind, total)
	}
}

func (b *batch) clear() {
	clear(b.messages)
	b.messages = b.messages[:0]
}

// lost ends the writer, whose messages in hand could not be written.
func (o *outbox) lost(b *batch) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, m := range b.messages {
		o.unsent = append(o.unsent, message{link: m.link})
	}
	b.clear()
	o.failed, o.writing = true, false
}
