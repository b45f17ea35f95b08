package registry

import (
	"context"
	"encoding/json"
	"errors"
	"maps"
	"slices"
	"sync/atomic"
	"time"

	"github.com/pyrycode/pyrycode-relay/bus"
)

// watchLoop asks the nodes that links lead to whether they are there.
func (r *Registry) watchLoop(ctx context.Context) {
	for {
		wait := watchEvery
		nodes := r.bus.LinkedNodes()
		eachOf(nodes, len(nodes), func(n bus.NodeID) { r.watch(ctx, n) })
		r.mu.Lock()
		maps.DeleteFunc(r.suspects, func(n bus.NodeID, _ time.Time) bool { return !slices.Contains(nodes, n) })
		if len(r.suspects) > 0 {
			wait = suspectEvery
		}
		r.mu.Unlock()
		if !pause(ctx, wait) {
			return
		}
	}
}

// watch asks one node. Its links end when it is dead: nobody has responded for
// deadAfter without a break, or its lease is gone.
func (r *Registry) watch(ctx context.Context, n bus.NodeID) {
	err := r.bus.Hello(ctx, n)
	if err == nil || !r.bus.Connected() { // this node learns nothing about others while it is cut off itself
		r.mu.Lock()
		_, suspected := r.suspects[n]
		delete(r.suspects, n)
		r.mu.Unlock()
		if err == nil && suspected {
			r.bus.ProbeAll() // it may have taken this node for dead meanwhile
		}
		return
	}
	now := time.Now()
	r.mu.Lock()
	since, suspected := r.suspects[n]
	if !errors.Is(err, bus.ErrNoResponders) {
		since = now // it has subscribers, so it may be frozen: only its lease tells
	}
	if !suspected {
		since = now
	}
	r.suspects[n] = since
	r.mu.Unlock()
	if now.Sub(since) < deadAfter && !r.leaseGone(ctx, n) {
		return
	}
	r.log.Warn("node_gone", "node", string(n))
	r.bus.EndNode(n)
	r.mu.Lock()
	delete(r.suspects, n)
	r.mu.Unlock()
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
			r.reapDue = max(r.reapDue, 1)
		}
	}
	r.known = alive
	switch {
	case r.reapDue == 0 || r.unbrokenFor() < r.cfg.LeaseTTL:
	case first != me && r.reapDue == 1:
		r.reapDue = 2 // the first one is about to do it, unless it cannot
	case r.reap(ctx, alive):
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

// reap turns the entries that dead nodes hold into grace, so that they end. Of
// several nodes that try, the KV lets one succeed. It returns false if some may be
// left: of nodes that could not be proven dead, or because a write failed.
func (r *Registry) reap(ctx context.Context, alive map[bus.NodeID]nodeEntry) (done bool) {
	dead := make(map[bus.NodeID]bool)
	type left struct {
		key string
		rev uint64
		entry
	}
	var entries []left
	err := r.presence.each(ctx, func(key string, rec record) {
		e, ok := entryOf(rec)
		if !ok || e.State != stateHeld {
			return
		}
		if _, ok := alive[e.Node]; ok {
			return
		}
		entries = append(entries, left{key, rec.revision, e})
		dead[e.Node] = false
	})
	if err != nil {
		return false
	}
	for n := range dead {
		dead[n] = r.leaseGone(ctx, n) && r.bus.Hello(ctx, n) != nil // a lease may be deleted by hand
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
	return !failed.Load()
}
