package registry

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pyrycode/pyrycode-relay/bus"
)

// watchLoop has every node watched that links lead to, each on a goroutine of its own:
// one that is slow to answer holds up nobody.
func (r *Registry) watchLoop(ctx context.Context) {
	var watches sync.WaitGroup
	defer watches.Wait()
	var watched sync.Map // the nodes that are
	for {
		for _, n := range r.bus.LinkedNodes() {
			if _, is := watched.LoadOrStore(n, true); !is {
				watches.Go(func() {
					defer watched.Delete(n)
					r.watch(ctx, n)
				})
			}
		}
		if !pause(ctx, watchEvery) {
			return
		}
	}
}

// watch asks n whether it is there, until no link leads to it. The links end when it is
// dead: it has been silent for deadAfter, or its lease is gone.
func (r *Registry) watch(ctx context.Context, n bus.NodeID) {
	var s silence
	for slices.Contains(r.bus.LinkedNodes(), n) {
		wait, suspected := suspectEvery, s.since
		asked := time.Now()
		err := r.bus.Hello(ctx, n)
		dead := false
		switch {
		case err == nil || !r.bus.Connected(): // this node learns nothing about others while it is cut off itself
			wait, s = watchEvery, silence{}
			if err == nil && !suspected.IsZero() {
				r.bus.ProbeAll() // it may have taken this node for dead meanwhile
			}
		case errors.Is(err, bus.ErrNoResponders):
			dead = s.proves(r, asked)
		default: // it has subscribers, so it may be frozen: only its lease tells
			s.since = time.Now()
			dead = r.leaseGone(ctx, n)
		}
		if dead {
			r.log.Warn("node_gone", "node", string(n))
			r.bus.EndNode(n)
			return
		}
		if !pause(ctx, wait) {
			return
		}
	}
}

// silence is what one observer has heard of a node that has no responders.
type silence struct {
	since time.Time // zero: it may have
}

// proves notes that there were no responders to a message sent at asked. It reports
// whether that means that the node is dead: there have been none for deadAfter, and the
// KV has taken a write of this node that began after they were gone. So it is on the
// side of NATS that can decide: on the other one everybody is silent.
func (s *silence) proves(r *Registry, asked time.Time) bool {
	if s.since.IsZero() {
		s.since = time.Now()
	}
	return r.renewedSince(s.since) && asked.Sub(s.since) >= deadAfter
}

// lookAtNodes reads the leases of all nodes. It warns of settings that differ, and
// turns what dead nodes held into grace: the first node at once, the others a sweep
// later, so that one of them does the work, whichever can.
func (r *Registry) lookAtNodes(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, decideTimeout)
	defer cancel()
	alive, err := r.leases(ctx)
	if err != nil {
		return
	}
	me, first := r.bus.Node(), r.bus.Node()
	for n, e := range alive {
		first = min(first, n)
		if _, known := r.known[n]; !known && n != me {
			r.compare(n, e)
		}
	}
	for n := range r.known {
		if _, ok := alive[n]; !ok {
			r.reapDue, r.reapAgain = max(r.reapDue, 1), time.Now().Add(reapAgain)
			r.reaping.left = r.reaping.left || r.reaping.from > 0 // what has been passed over may be its
		}
	}
	if !r.reapAgain.IsZero() && time.Now().After(r.reapAgain) {
		r.reapDue, r.reapAgain = max(r.reapDue, 1), time.Time{}
	}
	r.known = alive
	switch {
	case r.reapDue == 0 || r.unbrokenFor() < r.cfg.LeaseTTL:
	case first != me && r.reapDue == 1:
		r.reapDue = 2 // the first one is about to do it, unless it cannot
	case r.reap(ctx, &r.reaping, alive):
		r.reapDue = 0
	}
}

// compare warns of another node that does not go with this one.
func (r *Registry) compare(n bus.NodeID, e nodeEntry) {
	if e.Settings != r.settings() {
		r.log.Warn("settings_differ", "node", string(n), "theirs", e.Settings, "ours", r.settings())
	}
	if ours := r.bus.Versions(); ours.Common(e.Protocol) == 0 {
		r.log.Warn("protocol_differs", "node", string(n), "theirs", e.Protocol, "ours", ours)
	}
}

// leases lists the nodes that have one: a hint.
func (r *Registry) leases(ctx context.Context) (map[bus.NodeID]nodeEntry, error) {
	keys, err := r.nodes.keys(ctx)
	if err != nil {
		return nil, err
	}
	found, err := r.nodes.getMany(ctx, keys, 0)
	if err != nil {
		return nil, err
	}
	alive := make(map[bus.NodeID]nodeEntry, len(found))
	for key, rec := range found {
		var e nodeEntry
		if rec.exists && json.Unmarshal(rec.value, &e) == nil {
			alive[bus.NodeID(key)] = e
		}
	}
	return alive, nil
}

// scan is how far reap has come in the bucket.
type scan struct {
	from uint64 // revision; 0: it has not begun
	left bool   // some entries were passed over that may be of dead nodes
}

// reap turns the entries that dead nodes hold into grace, so that they end. Of
// several nodes that try, the KV lets one succeed. It returns false if some may be
// left: of nodes that could not be proven dead, because a write failed, or because
// it has not come to the end in this sweep.
func (r *Registry) reap(ctx context.Context, s *scan, alive map[bus.NodeID]nodeEntry) (done bool) {
	dead := make(map[bus.NodeID]bool)
	for start := time.Now(); ; {
		next, err := r.reapPage(ctx, s, alive, dead)
		if err != nil {
			return false
		}
		s.from = next
		if next == 0 {
			break
		}
		if time.Since(start) > reapTime || !pause(ctx, pageWait) {
			return false
		}
	}
	done = !s.left
	s.left = false
	return done
}

// reapPage does that for the entries from revision s.from on. dead has the nodes that
// were asked for in this sweep.
func (r *Registry) reapPage(ctx context.Context, s *scan, alive map[bus.NodeID]nodeEntry, dead map[bus.NodeID]bool) (next uint64, err error) {
	type left struct {
		key string
		rev uint64
		entry
	}
	var entries []left
	next, err = r.presence.each(ctx, s.from, func(key string, rec record) {
		e, ok := entryOf(rec)
		if _, has := alive[e.Node]; ok && !has && e.State == stateHeld {
			entries = append(entries, left{key, rec.revision, e})
		}
	})
	if err != nil {
		return 0, err
	}
	for _, l := range entries {
		if _, asked := dead[l.Node]; !asked {
			dead[l.Node] = r.leaseGone(ctx, l.Node) && r.bus.Hello(ctx, l.Node) != nil // a lease may be deleted by hand
		}
	}
	var failed atomic.Bool
	eachOf(entries, sweepWorkers, func(l left) {
		if !dead[l.Node] {
			failed.Store(true)
			return
		}
		l.State = stateGrace
		if _, err := r.presence.put(ctx, l.key, l.encode(), l.rev, r.cfg.Grace); err != nil {
			failed.Store(true)
			return
		}
		r.log.Info("server_orphaned", "node", string(l.Node))
	})
	s.left = s.left || failed.Load()
	return next, nil
}
