package bus

import (
	"sync"
	"time"
)

// Receiver is what a link hands frames to: a connection. Its methods are called
// one at a time for each link, in order, and must not block: they run on the
// dispatch goroutine or on the other end's.
type Receiver interface {
	// Deliver takes one frame, Frame(buf), exactly once and in order. buf belongs to
	// the receiver, which must not change it, which calls l.Consumed when its socket
	// has taken the frame, and which may free it then. One that was under way when
	// this side closed the link may still come after Close has returned.
	Deliver(l *Link, buf []byte)
	// End tells that the link has ended, after its last frame. err is one of the
	// errors of errors.go or a CodeError. It is called at most once, and not when
	// this side closed the link.
	End(l *Link, err error)
}

// side is the end of a link that this node is.
type side uint8

const (
	phoneSide side = iota
	binarySide
)

// linkKey finds a link. The session in it is the fence: a message for another
// session of the same server-id finds nothing.
type linkKey struct {
	id      LinkID
	session SessionID
	side    side
}

// Link is this node's end of the path of one phone connection. It is bound to
// one session; a link whose session was replaced before it carried anything may
// be opened again (Bus.Open), every other one ends. All methods may be called
// concurrently.
type Link struct {
	// Static after construction; recv of a binary's end after Handler.Open.
	bus      *Bus
	side     side
	serverID string
	token    string
	connID   string
	recv     Receiver

	// Guarded by mu. Lock order: Link.mu before Bus.mu and Bus.pumpMu; never two
	// links' mu at once.
	mu         sync.Mutex
	writable   sync.Cond // outstanding fell, or ended
	st         linkState
	bound      bool // id, node, session and the rest of the path are set
	id         LinkID
	node       NodeID
	local      bool // node is this one
	session    SessionID
	version    uint8  // of what the two ends say; set with the ACCEPT
	attempt    uint64 // the phone's end: how often it was opened; the binary's: in which attempt
	subject    string
	peer       *Link // the other end, if it is on this node
	opening    bool  // Bus.Open is under way: nothing is sent, and the phone's end takes nothing
	missed     bool  // something came meanwhile
	ended      bool  // closed by this side, or failed, or by the other side
	delivering bool  // the receiver is in Deliver
	failed     error // what to tell the receiver after that
	running    bool  // a goroutine is in run
	queued     bool  // in Bus.ready
	counted    int64 // bytes of this link in Bus.backlog
	timed      bool  // in Bus.timed
}

// Ended reports whether the link has ended, from either side.
func (l *Link) Ended() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.ended
}

// ServerID is the server-id that the link belongs to.
func (l *Link) ServerID() string { return l.serverID }

// ConnID is the phone connection's id.
func (l *Link) ConnID() string { return l.connID }

// Node is where the other end is; empty while the link is not bound.
func (l *Link) Node() NodeID {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.node
}

// After reports whether l is a later attempt than other to open the link of one
// phone: then nothing of other is in use.
func (l *Link) After(other *Link) bool {
	return l.connID == other.connID && l.attempts() > other.attempts()
}

func (l *Link) attempts() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.attempt
}

// Session is the session that the link is bound to; zero while it is not.
func (l *Link) Session() SessionID {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.session
}

// Send queues the frame in buf, which is NewBuffer's or has Headroom bytes in front
// of it too, and blocks while a window's worth is waiting or on its way. The buffer
// belongs to the link from then on. It returns ErrClosed when the link has ended. When it
// has blocked for pauseTimeout it ends the link on both sides with ErrLinkLost,
// which the receiver is told, and returns that.
func (l *Link) Send(buf []byte) error {
	l.mu.Lock()
	if !l.waitLocked() {
		l.mu.Unlock()
		l.Fail(ErrLinkLost)
		return ErrLinkLost
	}
	if l.ended {
		l.mu.Unlock()
		return ErrClosed
	}
	now := time.Now()
	l.st.send(buf, now)
	l.watchLocked()
	l.unlockAndSend(now)
	return nil
}

// waitLocked waits until there is room for a frame, or the link has ended. It returns
// false when that takes too long. l.mu is held, and released meanwhile.
func (l *Link) waitLocked() bool {
	if l.ended || !l.st.full() {
		return true
	}
	late := false
	defer time.AfterFunc(pauseTimeout, func() {
		l.mu.Lock()
		late = true
		l.mu.Unlock()
		l.writable.Broadcast()
	}).Stop()
	for !l.ended && l.st.full() {
		if late {
			return false
		}
		l.writable.Wait()
	}
	return true
}

// Offer queues one frame like Send and never blocks. When more than
// Config.Backlog would wait, or more than a window while all links together have more
// than Config.TotalBacklog waiting, it ends the link on both sides with ErrBacklog,
// which the receiver is told, and returns that; it returns ErrClosed when the link
// has ended.
func (l *Link) Offer(buf []byte) error {
	l.mu.Lock()
	if l.ended {
		l.mu.Unlock()
		return ErrClosed
	}
	if l.st.outstanding()+frameCost(len(buf)-Headroom) > l.bus.backlogLimit() {
		l.mu.Unlock()
		l.fail(ErrBacklog, func() { l.st.close(ErrBacklog, true) })
		l.kick()
		return ErrBacklog
	}
	now := time.Now()
	l.st.send(buf, now)
	l.countLocked()
	l.watchLocked()
	l.unlockAndSend(now)
	return nil
}

// countLocked keeps Bus.backlog true. l.mu is held.
func (l *Link) countLocked() {
	if l.side == phoneSide {
		return // bounded by its window
	}
	now := int64(l.st.queued()) //nolint:gosec // bounded by Config.Backlog
	l.bus.backlog.Add(now - l.counted)
	l.counted = now
}

// Consumed tells that the socket has taken frames, of so many bytes in all. It does
// nothing once the link has ended.
func (l *Link) Consumed(frames, bytes int) {
	now := time.Now()
	l.mu.Lock()
	l.st.consume(uint64(frames)*frameOverhead+uint64(bytes), now) //nolint:gosec // counts
	l.watchLocked()
	if l.st.ackNow {
		l.unlockAndSend(now)
		return
	}
	l.mu.Unlock()
}

// Close ends the link from this side: the other side is told err after every
// frame before it. Calls after the first do nothing.
func (l *Link) Close(err error) { l.close(err, false) }

// Abort is Close, but gives up frames that have not been sent yet.
func (l *Link) Abort(err error) { l.close(err, true) }

func (l *Link) close(err error, urgent bool) {
	l.mu.Lock()
	if l.ended {
		l.mu.Unlock()
		return
	}
	l.endLocked()
	if l.bound {
		l.st.close(err, urgent)
	} else {
		l.st.forget()
	}
	l.mu.Unlock()
	l.tellHandler()
	l.kick()
}

// Fail ends the link on this side with err, tells the receiver, and resets the
// other side.
func (l *Link) Fail(err error) {
	l.fail(err, func() {
		if l.bound {
			l.st.lose(err, time.Now())
		} else {
			l.st.forget()
		}
	})
	l.kick()
}

// forget ends the link on this side because the other node is dead.
func (l *Link) forget(err error) {
	l.fail(err, l.st.forget)
	l.bus.remove(l)
}

// fail does change to the state, under l.mu, and ends the link. The receiver is
// told now, or by the goroutine that is in its Deliver when that has returned.
func (l *Link) fail(err error, change func()) {
	l.mu.Lock()
	change()
	tell := !l.ended
	l.endLocked()
	if tell && l.delivering {
		l.failed, tell = err, false
	}
	l.mu.Unlock()
	if tell {
		l.tellEnd(err)
	}
}

// endLocked marks the end and wakes who waits for credit. l.mu is held.
func (l *Link) endLocked() {
	l.ended = true
	l.writable.Broadcast()
}

// tellEnd has the place in the attach table free before anybody can hear of the end, and
// dial because of it.
func (l *Link) tellEnd(err error) {
	l.tellHandler()
	l.recv.End(l, err)
}

func (l *Link) tellHandler() {
	if l.side == binarySide {
		l.bus.handler.Ended(l)
	}
}

// bindLocked ties the link to a session on a node, by way of t there. l.mu is held.
func (l *Link) bindLocked(id LinkID, node NodeID, session SessionID, t topic) {
	l.id, l.node, l.session = id, node, session
	l.local = node == l.bus.node
	l.bound, l.opening, l.missed = true, true, false
	l.st.frees = !l.local
	l.subject = tokenSubject(node, t, l.token)
}

// unbindLocked is the reverse of bindLocked. l.mu is held.
func (l *Link) unbindLocked() {
	l.bus.unregister(l.key(), l)
	l.id, l.node, l.session, l.local = 0, "", SessionID{}, false
	l.bound, l.opening = false, false
	l.subject, l.peer = "", nil
	if l.ended {
		l.st.forget()
	}
}

// leaveLocked takes a link that has carried nothing off its session. The caller
// runs tellPeer, which acknowledges the other end's CLOSE, without l.mu.
func (l *Link) leaveLocked() (tellPeer func()) {
	ack := l.st.stamp(Message{Kind: KindAck})
	ack.Version, ack.Link, ack.Session = l.version, l.id, l.session
	peer, subject := l.peer, l.subject
	l.st.rebind(l.bus.cfg)
	l.unbindLocked()
	if peer != nil {
		return func() { peer.handle(ack, nil, time.Now()) }
	}
	return func() { l.bus.reply(subject, ack) }
}

// key is where Bus.links has the link. l.mu is held.
func (l *Link) key() linkKey { return linkKey{id: l.id, session: l.session, side: l.side} }

// replyTo is where an answer to a message finds this end even if the link is
// unknown there; empty for the kinds that get none.
func (l *Link) replyTo(k Kind) string {
	if k != KindProbe && k != KindClose && k != KindReset {
		return ""
	}
	t := topicPhone
	if l.side == binarySide {
		t = topicServer
	}
	return tokenSubject(l.bus.node, t, l.token)
}
