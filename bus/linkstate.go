package bus

import "time"

// linkState is one end of a link as a state machine: no goroutine, no
// clock, no NATS. Messages, ticks and what the socket did go in; next says what
// to send, and receive says what to deliver.
//
// The invariant, per direction: the receiver takes exactly the number after the
// last one, and the sender keeps each numbered message until it is acknowledged, or
// until the receiver, if it is on this node, has taken the buffer itself.
// So what is delivered is what was sent, in order, without a gap; and if that
// cannot be kept up, the link is lost on both sides.       (doc.go: Guarantee)
//
// Credit is counted in bytes from the link's start, frames with their overhead.
// "Received" (ack) and "consumed" (credit) are two numbers: a peer that reads
// slowly uses up its credit and is not mistaken for loss.
type linkState struct {
	window  uint64
	timeout time.Duration

	// Sending.
	out      Queue[outbound] // sent and not acknowledged, then not sent yet
	lastSeq  uint64          // number of the last element of out, or of the last acknowledged
	acked    uint64          // everything up to here has been acknowledged
	sendNext uint64          // the number that is sent next
	maxSent  uint64          // the highest number ever sent
	accepted uint64          // bytes given to send
	offset   uint64          // bytes of everything up to sendNext-1
	ackedTo  uint64          // bytes of everything up to acked
	burst    uint64          // after a loss: how many bytes may be unacknowledged; 0: a window
	sent     uint64          // bytes of everything up to maxSent
	base     uint64          // the first credit: what it grew by since has been consumed
	credit   uint64          // how far offset may grow
	closing  bool            // a CLOSE is in out; nothing follows it
	inHand   uint64          // the number that is being sent, or 0: its buffer is in use
	frees    bool            // buffers of what is acknowledged are freed

	// Waiting for an answer, or for credit at all.
	heldSince    time.Time // since when a first frame waits for a binary that is away
	waitingSince time.Time // since when an answer is owed without progress: DATA or CLOSE is unacknowledged, or a frame or Send waits for more credit; zero: none is
	nextProbe    time.Time
	asks         int // how many more times an idle end asks whether the other one is there

	// Receiving.
	received  uint64    // every number up to here has arrived
	tookAt    time.Time // when the last of them did
	taken     uint64    // bytes of these
	consumed  uint64    // bytes of these that the socket has taken
	granted   uint64    // credit that was announced
	reported  uint64    // bytes of taken that the last ack covered
	ackAt     time.Time
	ackNow    bool
	gap       bool // a later number came first
	gapTold   bool
	remoteEnd bool // a CLOSE has been received
	heard     bool // anything but a RESET has

	reset      bool // lost: nothing but RESET is sent
	resetCause error
	resetDone  bool
	resetsLeft int
}

type outbound struct {
	buf    []byte // Headroom free bytes, then the payload; nil once it was handed over
	cost   uint64 // of a frame
	reason Reason // of a CLOSE
	close  bool
}

func frameCost(n int) uint64 { return uint64(n) + frameOverhead } //nolint:gosec // a length

func newLinkState(cfg Config) linkState {
	return linkState{
		window:   uint64(cfg.Window), //nolint:gosec // positive
		timeout:  cfg.LinkTimeout,
		sendNext: 1,
		granted:  uint64(cfg.Window), //nolint:gosec // positive
	}
}

// outstanding is how many bytes have been given to send and not been consumed at
// the other end, as far as its credit tells.
func (s *linkState) outstanding() uint64 {
	return s.accepted - (s.credit - s.base) // receive refuses credit for more than was sent
}

// queued is how many bytes of frames this end keeps for itself: not acknowledged, or
// not sent yet.
func (s *linkState) queued() uint64 {
	if s.reset || s.done() {
		return 0
	}
	return s.accepted - s.ackedTo
}

// full reports whether a window's worth is outstanding.
func (s *linkState) full() bool {
	n := s.outstanding()
	return n >= s.window && n > 0
}

// send queues one frame. buf belongs to the link from now on.
func (s *linkState) send(buf []byte, now time.Time) {
	if s.credit == 0 && s.heldSince.IsZero() {
		s.heldSince = now
	}
	o := outbound{buf: buf, cost: frameCost(len(buf) - Headroom)}
	s.out.Push(o)
	s.lastSeq++
	s.accepted += o.cost
}

// handOver says that the buffer of number seq belongs to the other end's receiver now,
// which is on this node and has taken that frame: it is never sent again.
func (s *linkState) handOver(seq uint64) {
	if seq > s.acked && !s.reset {
		s.at(seq).buf = nil
	}
}

// at is the element of out with number seq.
func (s *linkState) at(seq uint64) *outbound { return s.out.At(int(seq - s.acked - 1)) } //nolint:gosec // it is in out

// close queues the last message, after every frame queued before. With urgent,
// frames that have not been sent yet are given up.
func (s *linkState) close(err error, urgent bool) {
	if s.closing || s.reset {
		return
	}
	if urgent {
		s.out.Truncate(int(s.maxSent - s.acked)) //nolint:gosec // a length
		s.lastSeq = s.maxSent
	}
	reason, payload := reasonOf(err)
	buf := append(make([]byte, Headroom), payload...)
	s.out.Push(outbound{buf: buf, reason: reason, close: true})
	s.lastSeq++
	s.closing = true
}

// lose ends the link from this side because it cannot go on. It does nothing to
// one that has ended on both sides.
func (s *linkState) lose(err error, now time.Time) {
	if s.reset || s.done() {
		return
	}
	s.reset, s.resetCause, s.nextProbe, s.resetsLeft = true, err, now, resetTries
	s.out.Truncate(0)
}

// forget ends the link without a word to the other side.
func (s *linkState) forget() {
	s.reset, s.resetDone = true, true
	s.out.Truncate(0)
}

// consume says that the socket has taken n frame bytes (with overhead). The other
// end is told at each quarter of the window, and when there is nothing left: its
// own window may be smaller than that quarter.
func (s *linkState) consume(n uint64, now time.Time) {
	s.consumed += n
	switch {
	case s.reset || s.remoteEnd:
	case s.consumed+s.window >= s.granted+s.window/4:
		s.ackNow = true
	case s.consumed == s.taken:
		s.ackSoon(now)
	}
}

func (s *linkState) ackSoon(now time.Time) {
	if s.ackAt.IsZero() {
		s.ackAt = now.Add(ackDelay)
	}
}

// tick looks at the clock. It returns ErrLinkLost when nothing has been
// acknowledged for too long, and ErrAway when the binary did not return for the
// first frame. An end that has not asked for long although it should have was
// stopped with its process: the answer may be here, so it asks once more first.
// One that takes frames of the other end waits for the answer behind them, up to twice
// as long: after an outage what was held comes first.
func (s *linkState) tick(now time.Time) error {
	switch {
	case s.reset:
		return nil
	case !s.waitingSince.IsZero() && !s.remoteEnd && now.Sub(s.nextProbe) >= thawGap:
		s.nextProbe = now
		s.waitingSince = later(s.waitingSince, now.Add(probeInterval-s.timeout))
	case !s.waitingSince.IsZero() && now.Sub(s.waitingSince) >= s.patience(now):
		return ErrLinkLost
	case !s.heldSince.IsZero() && now.Sub(s.heldSince) >= holdTimeout:
		return ErrAway
	}
	return nil
}

// patience is how long an answer may be owed.
func (s *linkState) patience(now time.Time) time.Duration {
	if now.Sub(s.tookAt) < s.timeout/2 {
		return 2 * s.timeout
	}
	return s.timeout
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// idle reports whether the clock means nothing to this end.
func (s *linkState) idle() bool {
	if s.reset {
		return s.resetDone
	}
	return s.waitingSince.IsZero() && s.heldSince.IsZero() && s.ackAt.IsZero() && !s.ackNow && s.asks == 0
}

// due reports whether next has something to say because of the time.
func (s *linkState) due(now time.Time) bool {
	if s.reset {
		return !s.resetDone && !now.Before(s.nextProbe)
	}
	return s.probeDue(now) || s.ackDue(now)
}

// speaks reports whether next has something to say or to note, or the link is done.
func (s *linkState) speaks(now time.Time) bool {
	return s.reset || s.gap && !s.gapTold || s.sendNext <= s.lastSeq || s.full() || s.due(now) || s.done()
}

// done reports whether this end has nothing left to say or to hear.
func (s *linkState) done() bool {
	return s.resetDone || !s.ackNow && (s.remoteEnd || s.closing && s.acked == s.lastSeq)
}

// maySwitch reports whether the link has carried nothing but its own close, so
// that the two ends' numbers mean nothing yet.
func (s *linkState) maySwitch() bool {
	return s.maxSent == 0 && s.taken == 0
}

// rebind makes the end ready for another session, with the frames that wait to
// be sent.                                               (only if maySwitch)
func (s *linkState) rebind(cfg Config) {
	fresh := newLinkState(cfg)
	fresh.out, fresh.lastSeq, fresh.accepted = s.out, s.lastSeq, s.accepted
	fresh.closing, fresh.heldSince = s.closing, s.heldSince
	*s = fresh
}

// open sets the credit that the other end starts with.
func (s *linkState) open(credit uint64) {
	s.base, s.credit, s.heldSince = credit, max(s.credit, credit), time.Time{}
}

// confirm tells the holder that this end knows of its ACCEPT. missed says that
// messages came before it and were not taken.
func (s *linkState) confirm(missed bool) {
	s.ackNow = true
	if missed {
		s.gap, s.gapTold = true, false
	}
}

// await starts the clock: the other side owes a message.
func (s *linkState) await(now time.Time) {
	if s.waitingSince.IsZero() {
		s.waitingSince, s.nextProbe = now, now.Add(probeInterval)
	}
}

// retransmit goes back to the first unacknowledged number. Whatever lost messages
// has lost those of all links: if each sent a window at once it would lose them again.
// So each begins with a little, and doubles that with each ack.
func (s *linkState) retransmit() {
	s.burst = lossBurst
	for s.sendNext > s.acked+1 {
		s.sendNext--
		s.offset -= s.at(s.sendNext).cost
	}
}

// probeNow makes this end ask at once, after the path was disturbed. An idle end
// has nothing to lose: it asks a few times, to find out whether it is the only
// end left, and no answer means nothing.
func (s *linkState) probeNow(now time.Time) {
	s.nextProbe = now
	if s.waitingSince.IsZero() {
		s.asks = idleAsks
	}
}

// next returns the next message to send. It is called until ok is false. buf, if
// not nil, is the payload with Headroom bytes in front.
func (s *linkState) next(now time.Time) (m Message, buf []byte, ok bool) {
	switch {
	case s.reset:
		return s.nextReset(now)
	case s.gap && !s.gapTold: // before DATA, which could carry the ack but not this
		s.gapTold = true
		return s.stamp(Message{Kind: KindAck, Seq: s.received + 1}), nil, true
	case s.remoteEnd: // nobody is left there to take anything
	case s.sendNext <= s.lastSeq:
		o := s.at(s.sendNext)
		if s.maySend(o) {
			return s.nextNumbered(o, now), o.buf, true
		}
		if s.credit > 0 {
			s.await(now) // the message that raises the credit may be lost
		}
	case s.full():
		s.await(now) // for the same reason
	}
	switch {
	case s.probeDue(now):
		s.nextProbe = now.Add(probeInterval)
		s.asks = max(0, s.asks-1)
		return s.stamp(Message{Kind: KindProbe, Seq: s.maxSent}), nil, true
	case s.ackDue(now):
		return s.stamp(Message{Kind: KindAck}), nil, true
	}
	return Message{}, nil, false
}

// maySend reports whether o, which is next, may go out now: a CLOSE needs no credit.
func (s *linkState) maySend(o *outbound) bool {
	return (o.close || s.offset < s.credit) && s.mayBurst()
}

// mayBurst reports whether one more message may be unacknowledged.
func (s *linkState) mayBurst() bool {
	return s.burst == 0 || s.sendNext == s.acked+1 || s.offset-s.ackedTo < s.burst
}

func (s *linkState) nextNumbered(o *outbound, now time.Time) Message {
	m := Message{Kind: KindData, Seq: s.sendNext, Payload: o.buf[Headroom:]}
	if o.close {
		m.Kind, m.Reason = KindClose, o.reason
	}
	s.offset += o.cost
	s.sendNext++
	s.maxSent, s.sent = max(s.maxSent, m.Seq), max(s.sent, s.offset)
	s.await(now)
	return s.stamp(m)
}

func (s *linkState) probeDue(now time.Time) bool {
	return (!s.waitingSince.IsZero() || s.asks > 0) && !s.remoteEnd && !now.Before(s.nextProbe)
}

func (s *linkState) ackDue(now time.Time) bool {
	return s.ackNow || !s.ackAt.IsZero() && !now.Before(s.ackAt)
}

func (s *linkState) nextReset(now time.Time) (Message, []byte, bool) {
	if s.resetDone || now.Before(s.nextProbe) {
		return Message{}, nil, false
	}
	s.nextProbe = now.Add(probeInterval)
	if s.resetsLeft--; s.resetsLeft < 0 {
		s.resetDone = true
		return Message{}, nil, false
	}
	reason, payload := reasonOf(s.resetCause)
	return Message{Kind: KindReset, Reason: reason, Payload: payload}, nil, true
}

// stamp puts the receiving half's news on a message that goes out anyway.
func (s *linkState) stamp(m Message) Message {
	s.granted = max(s.granted, s.consumed+s.window)
	s.reported = s.taken
	s.ackNow, s.ackAt = false, time.Time{}
	m.Ack, m.Credit = s.received, s.granted
	return m
}

// receive takes one message of the other end. deliver is its frame, if it is the
// next one. end is not nil when the other end closes (after every frame before
// it) or the link is lost; errViolation means that the other end broke the rules,
// and the caller resets the link.
func (s *linkState) receive(m Message, now time.Time) (deliver []byte, end error) {
	if s.reset {
		if m.Kind == KindReset || m.Kind == KindAck && m.Reason == flagReset {
			s.resetDone = true
		}
		return nil, nil
	}
	switch m.Kind {
	case KindReset:
		s.forget()
		return nil, errorOf(m.Reason, m.Payload)
	case KindData, KindClose, KindAck, KindProbe:
	default:
		return nil, errViolation
	}
	if m.Ack > s.maxSent || m.Credit > s.credit && m.Credit-s.base > s.sent {
		return nil, errViolation // for what was never sent
	}
	s.asks, s.heard = 0, true
	s.acknowledge(m.Ack, now)
	s.credit = max(s.credit, m.Credit)
	switch m.Kind {
	case KindAck:
		if m.Seq != 0 && m.Seq == s.acked+1 {
			if s.sendNext > m.Seq && (s.at(m.Seq).buf == nil || s.inHand == m.Seq && !s.frees) {
				return nil, errViolation // it was handed over, or is being: no end on this node sees a gap then
			}
			s.retransmit()
		}
	case KindProbe:
		s.ackNow = true
		if m.Seq > s.received {
			s.gap, s.gapTold = true, false
		}
	case KindData, KindClose:
		return s.receiveNumbered(m, now)
	}
	return nil, nil
}

func (s *linkState) receiveNumbered(m Message, now time.Time) (deliver []byte, end error) {
	switch {
	case m.Seq <= s.received: // a duplicate: its ack was lost
		s.ackNow = true
		return nil, nil
	case m.Seq != s.received+1:
		if !s.gap {
			s.gap, s.gapTold = true, false
			s.ackNow = true
		}
		return nil, nil
	case s.remoteEnd, s.taken >= s.granted && m.Kind == KindData:
		return nil, errViolation // after the end, or beyond the credit given
	}
	s.received++
	s.tookAt = now
	s.gap, s.gapTold = false, false
	if m.Kind == KindClose {
		s.remoteEnd, s.ackNow = true, true
		return nil, errorOf(m.Reason, m.Payload)
	}
	s.taken += frameCost(len(m.Payload))
	if s.taken-s.reported >= s.window/4 {
		s.ackNow = true
	} else {
		s.ackSoon(now)
	}
	return m.Payload, nil
}

func (s *linkState) acknowledge(ack uint64, now time.Time) {
	if ack > s.acked {
		for ; s.sendNext <= ack; s.sendNext++ {
			s.offset += s.at(s.sendNext).cost
		}
		for s.acked < ack {
			o := s.out.Pop()
			s.acked++
			s.ackedTo += o.cost
			if s.frees && s.acked != s.inHand {
				Free(o.buf)
			}
		}
		if s.burst *= 2; s.burst >= s.window {
			s.burst = 0
		}
		if !s.waitingSince.IsZero() {
			s.waitingSince, s.nextProbe = now, now.Add(probeInterval)
		}
	}
	if s.acked == s.maxSent {
		s.waitingSince = time.Time{}
	}
}
