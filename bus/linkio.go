package bus

import (
	"errors"
	"time"
)

// What a link does with messages: takes those of the other end, sends its own, and looks
// at the clock for both.

// receipt is what became of a message.
type receipt uint8

const (
	refused   receipt = iota // the link takes none now; the message is sent again
	taken                    // its news
	delivered                // it was the next frame, and its buffer is the receiver's now
)

// handle takes one message of the other end; buf is all of it if it carries a frame.
// Calls come one at a time.
func (l *Link) handle(m Message, buf []byte, now time.Time) receipt {
	l.mu.Lock()
	switch {
	case !l.bound || m.Session != l.session || m.Link != l.id:
		l.mu.Unlock()
		return refused
	case l.opening && l.side == phoneSide:
		l.missed = true // the other end was told to start before this one
		l.mu.Unlock()
		return refused
	case m.Version != l.version && !m.ofHandshake():
		l.mu.Unlock()
		return refused // no relay sends it
	}
	unheard := l.side == binarySide && !l.st.heard
	deliver, end := l.st.receive(m, now)
	switch {
	case errors.Is(end, errViolation):
		l.mu.Unlock()
		l.Fail(ErrLinkLost)
		return taken
	case errors.Is(end, ErrMoved) && l.side == phoneSide && !l.ended && l.st.maySwitch():
		tellPeer := l.leaveLocked()
		l.mu.Unlock()
		tellPeer()
		l.bus.handler.Moved(l)
		return taken
	}
	silent := l.ended
	if end != nil {
		l.endLocked()
	}
	if unheard && m.Kind == KindReset && m.Reason == reasonUnknown && !silent { // the phone's node gave this attempt up
		l.mu.Unlock()
		l.tellHandler()
		l.kick()
		return taken
	}
	l.writable.Broadcast()
	if deliver == nil || silent {
		if deliver != nil { // nobody is there to take it
			l.st.consume(frameCost(len(deliver)), now)
			l.watchLocked()
		}
		if end != nil && !silent {
			l.mu.Unlock()
			l.tellEnd(end)
			l.mu.Lock()
		}
		l.unlockAndSend(now)
		return taken
	}
	l.delivering = true
	l.mu.Unlock()
	l.recv.Deliver(l, buf)
	l.mu.Lock()
	l.delivering = false
	if err := l.failed; err != nil {
		l.failed = nil
		l.mu.Unlock()
		l.tellEnd(err)
		l.mu.Lock()
	}
	l.unlockAndSend(now)
	return delivered
}

// kick makes what the link has to say go out.
func (l *Link) kick() {
	l.mu.Lock()
	l.unlockAndSend(time.Now())
}

// unlockAndSend is kick for who holds l.mu.
func (l *Link) unlockAndSend(now time.Time) {
	if l.local {
		l.unlockAndRun(0, nil, now)
		return
	}
	switch {
	case !l.bound || l.queued:
	case l.st.speaks(now):
		l.queued = true
		l.bus.enqueue(l)
	default:
		l.countLocked()
		l.watchLocked() // an ack may be due later
	}
	l.mu.Unlock()
}

// unlockAndRun sends what next gives, in order, until there is nothing left or budget
// bytes have gone (0: no limit). more tells that the budget ended it. Small frames are
// joined in scratch, of maxJoined bytes, unless it is nil. Only one goroutine at a time is in
// it: another one's news is seen by the first. l.mu is held, and released.
func (l *Link) unlockAndRun(budget int, scratch []byte, now time.Time) (more bool) {
	if l.running || l.opening {
		l.mu.Unlock()
		return false
	}
	l.running = true
	sent := 0
	for l.bound {
		m, buf, ok := l.st.next(now)
		if !ok {
			break
		}
		m.Link, m.Session = l.id, l.session
		if !m.ofHandshake() {
			m.Version = l.version
		}
		peer, subject := l.peer, l.subject
		joined := peer == nil && scratch != nil && m.Kind == KindData && l.st.join(&m, scratch, now)
		switch {
		case joined:
			buf = scratch[:Headroom+len(m.Payload)]
		case buf != nil:
			l.st.inHand = m.Seq
		}
		l.mu.Unlock()
		got := taken
		if peer != nil {
			got = peer.handle(m, buf, now)
		} else {
			l.bus.publish(subject, l.replyTo(m.Kind), &m, buf)
		}
		l.mu.Lock()
		l.st.inHand = 0
		if got == delivered {
			l.st.handOver(m.Seq)
		}
		if peer != nil && m.Kind == KindReset {
			l.st.resetDone = true // nothing is lost on the way, so it needs no answer
		}
		if l.st.reset {
			now = time.Now() // of the reset, whose first message is due at once
		}
		if sent += Headroom + len(m.Payload); budget > 0 && sent >= budget {
			more = true
			break
		}
	}
	l.running = false
	l.countLocked()
	done := l.st.done()
	if !done {
		l.watchLocked()
	}
	l.mu.Unlock()
	if done {
		l.bus.remove(l)
	}
	return more
}

// watchLocked has the clock looked at for the link if that matters. l.mu is held.
func (l *Link) watchLocked() {
	if !l.timed && !l.st.idle() {
		l.timed = true
		l.bus.addTimed(l)
	}
}

// start ends opening.
func (l *Link) start() {
	l.mu.Lock()
	l.opening = false
	l.watchLocked()
	l.mu.Unlock()
	l.kick()
}

// tick looks at the clock for the link, and no more once it means nothing to it.
func (l *Link) tick(now time.Time) {
	l.mu.Lock()
	err := l.st.tick(now)
	if err == nil && (l.st.idle() || l.st.done()) {
		l.timed = false
		l.bus.removeTimed(l)
		l.mu.Unlock()
		return
	}
	due := l.st.due(now)
	l.mu.Unlock()
	switch {
	case err != nil:
		l.Fail(err)
	case due:
		l.kick()
	}
}

// probe makes the link ask where the other end is, after the path was disturbed.
func (l *Link) probe(now time.Time) {
	l.mu.Lock()
	l.st.probeNow(now)
	l.mu.Unlock()
	l.kick()
}
