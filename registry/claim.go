package registry

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/pyrycode/pyrycode-relay/bus"
)

// ClaimServer takes serverID for conn, a binary. It returns nil when the KV names
// this connection; ErrServerIDConflict if the incumbent answered a ping sent after
// this call began; ErrHeld if only a ping could tell and the claim is
// WithoutProbe; ErrUndecided if it could not be found out in time; ErrNotReady
// while this node decides nothing. Without a probe it takes 4.5 s at most, with one
// 10 s, or ProbeTimeout and one KV call if that is longer. On nil the caller owes a
// ReleaseServer.
//
//	(protocol.md: Life of a claim)
func (r *Registry) ClaimServer(serverID string, conn Conn, opts ...Option) error {
	o := optionsFor(conn, opts)
	if err := r.Ready(); err != nil {
		return err
	}
	h := &holding{
		serverID: serverID, session: bus.NewSessionID(), conn: conn, opts: o,
		since: time.Now(),
	}
	r.mu.Lock()
	r.sessions[h.session] = h // a phone may find it the instant that the KV knows
	r.mu.Unlock()
	err := r.claim(h)
	if err == nil {
		return nil
	}
	r.endHolding(h, bus.ErrNoSession)
	if h.unsure {
		r.addOrphan(h.session, serverID)
	}
	return err
}

func (r *Registry) claim(h *holding) error {
	limit := decideTimeout
	if !h.opts.noProbe {
		limit = max(parkTimeout, r.cfg.ProbeTimeout+kvTimeout)
	}
	ctx, cancel := context.WithTimeout(h.opts.ctx, limit)
	defer cancel()
	var before entry // what the write goes over, at revision rev
	var rev uint64
	looked := false
	if _, here := r.ownEntry(h.serverID); here { // the KV should have it, too
		var err error
		if before, rev, err = r.replaceable(ctx, h); err != nil {
			return err
		}
	} else if r.lookFirst.Load() {
		var ok bool
		before, rev, ok = r.left(ctx, h)
		r.lookFirst.Store(ok)
		looked = true
	}
	for try := 0; ; try++ {
		newRev, err := r.take(ctx, h, before, rev)
		bus.Yield()
		if err == nil {
			return r.claimed(h, before, newRev)
		}
		h.unsure = h.unsure || !errors.Is(err, errLost)
		if try == 0 && !looked {
			if found, at, ok := r.left(ctx, h); ok {
				r.lookFirst.Store(true)
				before, rev = found, at
				continue
			}
		}
		found, at, err := r.replaceable(ctx, h)
		switch {
		case err != nil:
			return err
		case found.Session == h.session: // a write that we took for lost
			return r.claimed(h, before, at)
		case at == rev && !pause(ctx, retryWait): // refused, and yet nothing has changed
			return fmt.Errorf("%w: the KV takes no write", ErrUndecided)
		}
		before, rev = found, at
	}
}

// take writes h over before, which is at revision rev. A grace is first written once
// more as it is: NATS ends a key by a message that expects no revision, and one that
// was decided on before this claim could land on top of it, and erase a claim that was
// acknowledged (seen: 3 of 723 on R3). Now it lands below, and the claim loses or wins
// by its revision.
func (r *Registry) take(ctx context.Context, h *holding, before entry, rev uint64) (uint64, error) {
	if before.State == stateGrace {
		again, err := r.presence.put(ctx, h.key(), before.encode(), rev, r.cfg.Grace)
		if err != nil {
			return 0, err
		}
		rev = again
	}
	return r.presence.put(ctx, h.key(), r.entryFor(h, stateHeld).encode(), rev, 0)
}

// replaceable finds what h may be written over: nothing, an entry that may be
// taken, or h's own from a write that seemed lost. It tries again while that cannot
// be told, and returns ErrUndecided when that takes too long.
func (r *Registry) replaceable(ctx context.Context, h *holding) (entry, uint64, error) {
	start := time.Now()
	for wait := retryWait; ; wait = min(2*wait, retryWaitMax) {
		there, err := r.presence.getLeader(ctx, h.key())
		bus.Yield()
		if err == nil {
			found, ok := entryOf(there)
			if !ok { // it may have lost what this node holds: the next sweep writes it again
				found, ok = r.ownEntry(h.serverID)
			}
			if ok && found.Session != h.session {
				err = r.mayTake(ctx, h, found)
			}
			if err == nil || !errors.Is(err, ErrUndecided) {
				return found, there.revision, err
			}
		}
		if time.Since(start) >= parkTimeout || !pause(ctx, wait) {
			return entry{}, 0, fmt.Errorf("%w: %w", ErrUndecided, err)
		}
	}
}

// left looks whether the entry is one that nobody is behind any more, of a dead node or in
// its grace. A read from any replica is enough for that: the write that follows expects
// its revision. The leader answers one read after the other, with everybody else's in
// between, and a gateway that dies has its binaries claim by the thousand.
func (r *Registry) left(ctx context.Context, h *holding) (found entry, rev uint64, ok bool) {
	there, err := r.presence.get(ctx, h.key())
	bus.Yield()
	if err != nil {
		return entry{}, 0, false
	}
	found, ok = entryOf(there)
	if !ok || found.Session == h.session || found.Node == r.bus.Node() {
		return entry{}, 0, false
	}
	if found.State != stateGrace && r.askNode(ctx, found.Node) != nodeDead {
		return entry{}, 0, false
	}
	return found, there.revision, true
}

// ownEntry is what the KV should say of serverID if this node has its binary.
func (r *Registry) ownEntry(serverID string) (entry, bool) {
	h := r.localHolding(serverID)
	if h == nil || r.stateOf(h) != held {
		return entry{}, false
	}
	return r.entryFor(h, stateHeld), true
}

// mayTake decides whether h may be written over found. nil: yes.
func (r *Registry) mayTake(ctx context.Context, h *holding, found entry) error {
	if found.State == stateGrace {
		return nil
	}
	if found.Node == r.bus.Node() {
		// A claim of this node whose write has just been seen is as good as held.
		if in := r.holdingOf(found.Session); in == nil || r.stateOf(in) == grace || r.stateOf(in) == over {
			return nil // an entry that this node left behind
		}
	} else if state := r.askNode(ctx, found.Node); state != nodeAlive {
		if state == nodeDead {
			return nil
		}
		return fmt.Errorf("%w: the holder's node does not answer", ErrUndecided)
	}
	if h.opts.noProbe {
		return ErrHeld
	}
	alive, err := r.challenge(ctx, h.serverID, found)
	switch {
	case err != nil:
		return fmt.Errorf("%w: the holder's node does not answer: %w", ErrUndecided, err)
	case alive:
		return ErrServerIDConflict
	}
	return nil
}

// challenge asks the node of found whether its binary answers a ping, and no longer
// once that node has no responders: it may have gone with the question, as one does that
// drains.
func (r *Registry) challenge(ctx context.Context, serverID string, found entry) (alive bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, r.cfg.ProbeTimeout+answerTime)
	var watch sync.WaitGroup
	defer watch.Wait()
	defer cancel()
	watch.Go(func() {
		for pause(ctx, watchEvery) {
			if errors.Is(r.bus.Hello(ctx, found.Node), bus.ErrNoResponders) {
				cancel()
			}
		}
	})
	return r.bus.Challenge(ctx, found.Node, serverID, found.Session)
}

// claimed installs h, which the KV names at revision, and tells the node that held
// the server-id before. It returns ErrUndecided if h has been displaced already.
func (r *Registry) claimed(h *holding, before entry, revision uint64) error {
	if !r.install(h, before.Session, revision) {
		h.unsure = true // its entry may be what the KV has
		return fmt.Errorf("%w: displaced at once", ErrUndecided)
	}
	if before.Node == "" {
		return nil
	}
	if before.State == stateHeld {
		r.log.Info("server_id_takeover", "server_id", logID(h.serverID), "remote", h.opts.remote)
	}
	r.bus.Taken(before.Node, h.serverID, before.Session)
	return nil
}

// Alive implements bus.Handler.
func (r *Registry) Alive(ctx context.Context, serverID string, session bus.SessionID) bool {
	h := r.holdingOf(session)
	if h == nil || h.serverID != serverID {
		return false
	}
	p := r.nextProbe(h)
	select {
	case <-p.done:
	case <-ctx.Done():
		return false
	}
	s := r.stateOf(h)
	return p.alive && (s == held || s == claiming)
}

// probe is a ping to the binary of a holding.
type probe struct {
	done  chan struct{} // closed when alive is set
	alive bool
}

// nextProbe returns a ping that is not on its way yet. Claims that come within
// probeEvery share one, so that no binary has more to answer, however many claim.
func (r *Registry) nextProbe(h *holding) *probe {
	r.mu.Lock()
	p := h.next
	if p != nil {
		r.mu.Unlock()
		return p
	}
	p = &probe{done: make(chan struct{})}
	h.next = p
	wait := time.Until(h.probed.Add(probeEvery))
	r.mu.Unlock()
	r.spawn(func() {
		defer close(p.done)
		pause(r.ctx, wait)
		r.mu.Lock()
		h.next, h.probed = nil, time.Now()
		r.mu.Unlock()
		ctx, cancel := context.WithTimeout(r.ctx, r.cfg.ProbeTimeout)
		defer cancel()
		p.alive = h.opts.ping(ctx) == nil
	})
	return p
}

// Taken implements bus.Handler: another session is said to hold serverID.
func (r *Registry) Taken(_ string, session bus.SessionID) {
	h := r.holdingOf(session)
	if h == nil {
		return
	}
	r.spawn(func() {
		if !r.check(r.ctx, h) {
			r.sweepSoon()
		}
	})
}

func (r *Registry) holdingOf(s bus.SessionID) *holding {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.sessions[s]
}

func (r *Registry) stateOf(h *holding) holdingState {
	r.mu.Lock()
	defer r.mu.Unlock()
	return h.state
}
