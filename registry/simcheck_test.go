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
	if took := time.Since(b.called); took > bound+simDelay {
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
		leaseGone := !w.nodesKV.truth(string(old.at.port.id)).exists && b.at.unbrokenFor() >= b.at.cfg.LeaseTTL
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
	const silence = deadAfter - 2*retryWaitMax // about what proves a node dead
	if longest(n.less, from) > 0 {
		return false // it may have asked the old leader of the smaller side
	}
	return n == b.at || longest(append(append([]interval(nil), n.cuts...), b.at.cuts...), from) < silence
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
// the KV names, or named a moment before the call.
func (w *simWorld) checkAttachedLocked(n *simNode, serverID string, session bus.SessionID, called time.Time) {
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

// checkEnd: after a long calm, the KV names whoever is connected and nobody else,
// every node finds them, and nobody can take their place.
func (w *simWorld) checkEnd() {
	for _, id := range simIDs {
		e, held := entryOf(w.holdKV.truth(bus.EncodeToken(id)))
		holder := w.connected(id, true)
		w.mu.Lock()
		if holder != nil {
			holder.mute = false
		}
		switch {
		case holder == nil && held:
			w.breakLocked("%s: %s is left, and nobody is connected", id, short(e, held))
		case holder != nil && (!held || e.State != stateHeld || e.Session != holder.session):
			w.breakLocked("%s: %s is connected, and the KV has %s", id, holder.id, short(e, held))
		}
		w.mu.Unlock()
		for _, n := range w.nodes {
			if holder == nil {
				continue
			}
			link := n.Bus().NewLink(id, fmt.Sprintf("last-%p", n), simReceiver{})
			if err := n.RegisterPhone(id, &simPhone{id: link.ConnID()}, WithLink(link)); err != nil || link.Session() != holder.session {
				w.mu.Lock()
				w.breakLocked("%s: dial on %s in the end: %v", id, n.port.id, err)
				w.mu.Unlock()
			}
			if err := n.ClaimServer(id, &simPhone{id: "rival"}); !errors.Is(err, ErrServerIDConflict) {
				w.mu.Lock()
				w.breakLocked("%s: rival claim on %s in the end: %v", id, n.port.id, err)
				w.mu.Unlock()
			}
		}
	}
}
