package registry

import (
	"errors"
	"fmt"
	"time"

	"github.com/pyrycode/pyrycode-relay/bus"
)

// evicted is told when b's node takes it for displaced.
func (w *simWorld) evicted(b *simBinary) {
	w.holdKV.truth(b.serverID) // brings it up to now
	w.mu.Lock()
	if c := w.commits[bus.EncodeToken(b.serverID)]; len(c) > 0 && c[len(c)-1].e.Session == b.session && b.gone.IsZero() {
		w.breakLocked("%s evicted, and the KV names it", b.id)
	}
	w.mu.Unlock()
	w.leave(b, "evicted")
}

func (w *simWorld) claimOnce(b *simBinary, bound time.Duration, opts ...Option) error {
	b.called = time.Now()
	err := b.at.ClaimServer(b.serverID, b, opts...)
	h := b.at.localHolding(b.serverID)
	w.mu.Lock()
	defer w.mu.Unlock()
	if took := time.Since(b.called); took > bound+3*simDelay { // the simulation's requests do not end with their context
		w.breakLocked("%s: claim took %s, bound %s", b.id, took, bound)
	}
	switch {
	case err == nil && b.gone.IsZero():
		b.claimed = time.Now()
		if h == nil || h.conn != b {
			w.breakLocked("%s: claim succeeded, and the node does not hold it", b.id)
			return err
		}
		b.session = h.session
		w.checkTakeoverLocked(b)
		if !w.namedLocked(b.serverID, b.session, b.called, time.Now()) {
			w.breakLocked("%s: claim succeeded, and the KV did not name it", b.id)
		}
	case errors.Is(err, ErrServerIDConflict):
		if !w.pongSinceLocked(b) {
			w.breakLocked("%s: false 4409: no pong since the claim began", b.id)
		}
	}
	return err
}

// checkDecisionLocked: a node that cannot have renewed its lease for too long says
// nothing about who is there.
func (w *simWorld) checkDecisionLocked(n *simNode, err error) {
	if !errors.Is(err, ErrNoServer) {
		return // a conflict has its pong
	}
	n.port.net.mu.Lock()
	off := n.port.off
	n.port.net.mu.Unlock()
	if !off.IsZero() && time.Since(off) > n.cfg.freshFor()+simDelay {
		w.breakLocked("%s, cut off for %s, says: %v", n.port.id, time.Since(off), err)
	}
}

// checkTakeoverLocked looks at whom b has displaced.
func (w *simWorld) checkTakeoverLocked(b *simBinary) {
	var before simCommit
	var at time.Time
	for _, c := range w.commits[bus.EncodeToken(b.serverID)] {
		if c.ok && c.e.Session == b.session {
			at = c.at
			break
		}
		before = c
	}
	if !before.ok || before.e.State != stateHeld {
		return
	}
	for _, old := range w.binaries {
		if old.session != before.e.Session || old.mute || old.muted.After(b.called) || old.at.dead || !old.gone.IsZero() && old.gone.Before(at) {
			continue
		}
		leaseGone := w.nodesKV.missing(string(old.at.port.id), b.called) && b.at.unbrokenFor() >= b.at.cfg.LeaseTTL
		if b.at.port.deafTo(old.at.port.id, b.called) < 2 && !leaseGone {
			w.breakLocked("%s took %s from %s, which is alive, on %s", b.id, b.serverID, old.id, old.at.port.id)
		}
	}
}

func (w *simWorld) pongSinceLocked(b *simBinary) bool {
	for _, other := range w.binaries {
		if other == b || other.serverID != b.serverID {
			continue
		}
		for _, sent := range other.pongs {
			if !sent.Before(b.called) {
				return true
			}
		}
	}
	return false
}

// namedLocked reports whether the KV named session at some time in the interval.
func (w *simWorld) namedLocked(serverID string, session bus.SessionID, from, to time.Time) bool {
	named := false
	for _, c := range w.commits[bus.EncodeToken(serverID)] {
		if c.at.After(to) {
			break
		}
		named = c.ok && c.e.Session == session || named && c.at.After(from)
	}
	return named
}

// takenLocked reports whether the KV, at some time since from, named another session
// than that one.
func (w *simWorld) takenLocked(serverID string, session bus.SessionID, from time.Time) bool {
	taken := false
	for _, c := range w.commits[bus.EncodeToken(serverID)] {
		other := c.ok && c.e.Session != session
		if c.at.After(from) {
			taken = taken || other
		} else {
			taken = other
		}
	}
	return taken
}

// heldThroughoutLocked reports whether the KV named session all the time from from
// until now.
func (w *simWorld) heldThroughoutLocked(serverID string, session bus.SessionID, from time.Time) bool {
	held := false
	for _, c := range w.commits[bus.EncodeToken(serverID)] {
		is := c.ok && c.e.Session == session
		if !c.at.After(from) {
			held = is
		} else if !is {
			return false
		}
	}
	return held
}

// reachableLocked reports whether n could have found b all the time since from.
func (w *simWorld) reachableLocked(n *simNode, b *simBinary, from time.Time) bool {
	if b.claimed.IsZero() || b.claimed.After(from) || !b.gone.IsZero() || b.at.dead || n.dead ||
		!w.heldThroughoutLocked(b.serverID, b.session, from) {
		return false
	}
	if longest(n.less, from) > 0 {
		return false // it may have asked the old leader of the smaller side
	}
	return n == b.at || !w.silentLocked(n, b.at, from, deadAfter-retryWaitMax)
}

// ownLocked reports whether n itself has b, whom nobody has taken the server-id from.
func (w *simWorld) ownLocked(n *simNode, b *simBinary, from time.Time) bool {
	return n == b.at && !n.dead && !b.claimed.IsZero() && !b.claimed.After(from) && b.gone.IsZero() &&
		!w.takenLocked(b.serverID, b.session, b.claimed)
}

// silentLocked reports whether n or other, since from, could take the other one for
// dead: NATS has said for d that nobody listens there, or its lease is gone.
func (w *simWorld) silentLocked(n, other *simNode, from time.Time, d time.Duration) bool {
	if n.port.silence(other.port, from) >= d-2*simDelay {
		return true
	}
	return w.nodesKV.missing(string(n.port.id), from) || w.nodesKV.missing(string(other.port.id), from)
}

// longest is the longest of the intervals since from, as far as they overlap with
// it; intervals that touch count as one.
func longest(list []interval, from time.Time) (most time.Duration) {
	var sum time.Duration
	for _, i := range list {
		to := i.to
		if to.IsZero() {
			to = time.Now()
		}
		if begin := later(i.from, from); to.After(begin) {
			sum += to.Sub(begin)
		}
	}
	return sum
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// checkAttachedLocked: a phone whose node could see it is bound to the session that
// the KV names, or named a moment before the call; and a node that comes back to a
// lease that was over does not trust what it held before.
func (w *simWorld) checkAttachedLocked(n *simNode, serverID string, session bus.SessionID, called time.Time) {
	if back := w.nodesKV.gap(string(n.port.id), n.cfg.freshFor(), called); !back.IsZero() && longest(n.less, back) == 0 &&
		!w.namedLocked(serverID, session, back, time.Now()) && w.takenLocked(serverID, session, back) {
		w.breakLocked("phone on %s, back since %.3f, attached to session %.4x of %s, and the KV names another one", n.port.id, back.Sub(w.start).Seconds(), session[:2], serverID)
	}
	before := called.Add(-100 * time.Millisecond)
	if w.faults > 0 || before.Sub(w.calmAt) < 6*time.Second { // a replica may lag for that long
		return
	}
	if !w.namedLocked(serverID, session, before, time.Now()) {
		w.breakLocked("phone on %s attached to session %.4x of %s, which the KV does not name", n.port.id, session[:2], serverID)
	}
}

// checkRegistered: a binary that is connected is in the KV, if there has been no
// fault for long enough, unless it has just come or has just been displaced.
func (w *simWorld) checkRegistered() {
	for _, id := range simIDs {
		w.holdKV.truth(bus.EncodeToken(id)) // brings it up to now
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	since := time.Now().Add(-simSettle)
	if w.faults > 0 || w.calmAt.After(since) {
		return
	}
	for _, b := range w.binaries {
		if b.claimed.IsZero() || b.claimed.After(since) || !b.gone.IsZero() || b.at.dead {
			continue
		}
		if !w.namedLocked(b.serverID, b.session, since, time.Now()) {
			w.breakLocked("%s is connected to %s, and the KV has not named it for %s", b.id, b.at.port.id, simSettle)
			b.gone = time.Now() // told once
		}
	}
}

// checkToldLocked looks at the end that a phone of session is told. Those that are
// 4404 on the wire need a reason.
func (w *simWorld) checkToldLocked(p *simPhone, session bus.SessionID, err error) {
	if p.at.dead || p.attached.IsZero() {
		return
	}
	complain := func(why string) {
		w.breakLocked("%s on %s, attached to session %.4x, is told %v: %s", p.id, p.at.port.id, session[:2], err, why)
	}
	var binary *simBinary
	for _, b := range w.binaries {
		switch {
		case b.session != (bus.SessionID{}) && b.session == session:
			binary = b
		case b.serverID == p.serverID && errors.Is(err, bus.ErrNoSession) && w.reachableLocked(p.at, b, time.Now().Add(-decideTimeout)):
			complain(b.id + " was there all the time")
		}
	}
	if binary == nil {
		return // it moved, or its claim is under way, or has failed
	}
	calm := w.faults == 0 && p.attached.Sub(w.calmAt) > simSettle
	switch {
	case errors.Is(err, bus.ErrGraceOver):
		if binary.gone.IsZero() || time.Since(binary.gone) < p.at.cfg.Grace {
			complain("its grace is not over")
		}
	case errors.Is(err, bus.ErrReclaimed):
		if w.namedLocked(p.serverID, session, time.Now(), time.Now()) {
			complain("the KV names it")
		}
	case errors.Is(err, bus.ErrNodeGone), errors.Is(err, bus.ErrNoSession):
		if w.namedLocked(p.serverID, session, time.Now(), time.Now()) && !binary.at.dead &&
			!w.silentLocked(p.at, binary.at, p.attached, deadAfter-suspectEvery) {
			complain("the KV names it, and its node could be heard")
		}
	case calm && !binary.at.dead:
		complain("nothing has happened")
	}
}

// calm waits until all is as it should be, or with long as long as that may take: then
// nothing may change any more.
func (w *simWorld) calm(long bool) {
	most := 2*simConfig.LeaseTTL + 2*sweepEvery + simConfig.Grace
	for end := time.Now().Add(most); time.Now().Before(end) && (long || len(w.left()) > 0); {
		w.sleep(time.Second)
	}
}

// left says what is not as it should be after a long calm: the KV names whoever is
// connected and nobody else, and so do the links of all phones that were not told of
// their end.
func (w *simWorld) left() (list []string) {
	for _, id := range simIDs {
		e, held := entryOf(w.holdKV.truth(bus.EncodeToken(id)))
		holder := w.connected(id, true)
		switch {
		case holder == nil && held:
			list = append(list, fmt.Sprintf("%s: %s is left, and nobody is connected", id, short(e, held)))
		case holder != nil && (!held || e.State != stateHeld || e.Session != holder.session):
			list = append(list, fmt.Sprintf("%s: %s is connected, and the KV has %s", id, holder.id, short(e, held)))
		}
		w.mu.Lock()
		for _, p := range w.phones {
			if p.serverID == id && !p.over && !p.at.dead && (holder == nil || p.link.Session() != holder.session || !holder.at.knows(holder.session, p)) {
				list = append(list, fmt.Sprintf("%s: %s on %s is told nothing, and its binary is not there", id, p.id, p.at.port.id))
			}
		}
		w.mu.Unlock()
	}
	return list
}

// knows reports whether p is in the attach table of session.
func (n *simNode) knows(session bus.SessionID, p *simPhone) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	if h := n.sessions[session]; h != nil {
		for l := range h.links {
			if l.ConnID() == p.id {
				return true
			}
		}
	}
	return false
}

// checkEnd: after a long calm, nothing is left; a claim succeeds on every node if the
// server-id may be had, every node finds who has it, and no node gives it away.
func (w *simWorld) checkEnd() {
	for _, why := range w.left() {
		w.mu.Lock()
		w.breakLocked("%s", why)
		w.mu.Unlock()
	}
	for i, id := range simIDs {
		if holder := w.connected(id, true); holder != nil {
			w.mu.Lock()
			holder.mute = false
			w.mu.Unlock()
			w.checkHolder(holder)
		}
		for _, n := range w.nodes[i:] {
			if holder := w.connected(id, true); holder != nil {
				w.mu.Lock()
				holder.gone = time.Now()
				w.mu.Unlock()
				holder.at.ReleaseServer(id, holder)
			}
			w.checkClaim(n, id)
		}
	}
	old := w.connected(simIDs[0], true)
	if old == nil {
		return
	}
	w.mu.Lock()
	old.mute = true
	w.mu.Unlock()
	w.checkClaim(w.nodes[0], simIDs[0])
	w.mu.Lock()
	defer w.mu.Unlock()
	if old.gone.IsZero() {
		w.breakLocked("%s is displaced in the end, and not told", old.id)
	}
}

// checkClaim: nothing is in the way of a claim on n.
func (w *simWorld) checkClaim(n *simNode, id string) {
	b, err := w.claim(n, id)
	if err != nil {
		w.mu.Lock()
		w.breakLocked("%s: claim on %s in the end: %v", id, n.port.id, err)
		w.mu.Unlock()
		return
	}
	w.checkHolder(b)
}

// checkHolder: every node finds holder, and refuses a rival.
func (w *simWorld) checkHolder(holder *simBinary) {
	id := holder.serverID
	for _, n := range w.nodes {
		p := &simPhone{id: fmt.Sprintf("last-%p", n)}
		link := n.Bus().NewLink(id, p.id, simReceiver{})
		err := n.RegisterPhone(id, p, WithLink(link))
		rival := n.ClaimServer(id, &simBinary{id: "rival"})
		w.mu.Lock()
		if err != nil || link.Session() != holder.session {
			w.breakLocked("%s: dial on %s in the end: %v", id, n.port.id, err)
		}
		if !errors.Is(rival, ErrServerIDConflict) {
			w.breakLocked("%s: rival claim on %s in the end: %v", id, n.port.id, rival)
		}
		w.mu.Unlock()
		n.UnregisterPhone(id, p.id)
	}
}
