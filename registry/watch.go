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
func (r *Registry) lookAtNodes(ctx context.Context, since uint64) {
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
			r.reapSoon(first == me)
		}
	}
	r.known = alive
	due := since > 0 && !r.reapAt.IsZero() && !time.Now().Before(r.reapAt) && r.unbrokenFor() >= r.cfg.LeaseTTL
	if due && r.reap(ctx, &r.reaping, alive, since) {
		r.reapAt = time.Time{}
	}
}

// reapSoon notes that a node has died.
func (r *Registry) reapSoon(first bool) {
	at := time.Now()
	if !first {
		at = at.Add(sweepEvery / 2) // the first one is about to do it, unless it cannot
	}
	if r.reapAt.IsZero() || at.Before(r.reapAt) {
		r.reapAt = at
	}
	r.reaping.left = len(r.reaping.keys) > 0 // what has been passed over may be its
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

// scan is how far reap has come.
type scan struct {
	keys []string // of the bucket when it began, without those that have been looked at
	left bool     // of what has been looked at, something may be a dead node's still
}

// reap turns the entries that dead nodes hold into grace, so that they end. Of
// several nodes that try, the KV lets one succeed. What it reads has every write up to
// revision since. It returns false if some may be left: of nodes that could not be proven
// dead, because a call failed, or because it has not come to the end in this sweep.
func (r *Registry) reap(ctx context.Context, s *scan, alive map[bus.NodeID]nodeEntry, since uint64) (done bool) {
	if len(s.keys) == 0 {
		keys, err := r.presence.keys(ctx)
		if err != nil {
			return false
		}
		*s = scan{keys: keys}
	}
	dead := make(map[bus.NodeID]bool) // what was asked for in this sweep
	inTime, cancel := context.WithTimeout(ctx, reapTime)
	defer cancel()
	s.keys = byPages(inTime, s.keys, func(page []string) bool {
		left, err := r.reapPage(ctx, page, alive, dead, since)
		s.left = s.left || left
		return err == nil
	})
	return len(s.keys) == 0 && !s.left
}

// reapPage is reap for some keys. left says that one may be of a dead node still.
func (r *Registry) reapPage(ctx context.Context, keys []string, alive map[bus.NodeID]nodeEntry, dead map[bus.NodeID]bool, since uint64) (left bool, err error) {
	type orphaned struct {
		key string
		rev uint64
		entry
	}
	found, err := r.presence.getMany(ctx, keys, since)
	if err != nil {
		return false, err
	}
	var entries []orphaned
	for key, rec := range found {
		e, ok := entryOf(rec)
		if _, has := alive[e.Node]; ok && !has && e.State == stateHeld {
			entries = append(entries, orphaned{key, rec.revision, e})
		}
	}
	for _, l := range entries {
		if _, asked := dead[l.Node]; !asked {
			dead[l.Node] = r.leaseGone(ctx, l.Node) && r.bus.Hello(ctx, l.Node) != nil // a lease may be deleted by hand
		}
	}
	var failed atomic.Bool
	eachOf(entries, sweepWorkers, func(l orphaned) {
		if !dead[l.Node] {
			failed.Store(true)
			return
		}
		l.State = stateGrace
		switch _, err := r.presence.put(ctx, l.key, l.encode(), l.rev, r.cfg.Grace); {
		case err == nil:
			r.log.Info("server_orphaned", "node", string(l.Node))
		case !errors.Is(err, errLost): // to whoever claimed or orphaned it
			failed.Store(true)
		}
	})
	return failed.Load(), nil
}
