package registry

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/pyrycode/pyrycode-relay/bus"
)

func (r *Registry) sweepSoon() { nudge(r.sweepNow) }

// sweepLoop compares what this node holds with the KV every sweepEvery, and at
// once after something that may have changed it.
func (r *Registry) sweepLoop(ctx context.Context) {
	ticker := time.NewTicker(sweepEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		case <-r.sweepNow:
		}
		if r.Ready() == nil {
			r.sweep(ctx)
		}
	}
}

// sweep makes "connected means registered" true again, whatever happened to the
// KV, and removes what this node left behind there.
func (r *Registry) sweep(ctx context.Context) {
	r.mu.Lock()
	holdings := make([]*holding, 0, len(r.current))
	for _, h := range r.current {
		holdings = append(holdings, h)
	}
	orphans := make(map[bus.SessionID]orphan, len(r.orphans))
	for s, o := range r.orphans {
		orphans[s] = o
	}
	r.mu.Unlock()
	for chunk := range slices.Chunk(holdings, maxGetMany) {
		eachOf(r.differing(ctx, chunk), sweepWorkers, func(h *holding) { r.check(ctx, h) })
	}
	for s, o := range orphans {
		r.removeOrphan(ctx, s, o)
	}
	r.lookAtNodes(ctx)
}

// differing picks the holdings that the KV may not agree with.
func (r *Registry) differing(ctx context.Context, holdings []*holding) (differ []*holding) {
	keys := make([]string, len(holdings))
	for i, h := range holdings {
		keys[i] = h.key()
	}
	found, err := r.presence.getMany(ctx, keys)
	if err != nil {
		return holdings
	}
	for i, h := range holdings {
		if e, ok := entryOf(found[keys[i]]); !ok || e.Session != h.session || !r.agrees(h, e) {
			differ = append(differ, h)
		}
	}
	return differ
}

// eachOf calls f for each of list, on as many goroutines as workers.
func eachOf[T any](list []T, workers int, f func(T)) {
	if len(list) == 0 {
		return
	}
	var wg sync.WaitGroup
	work := make(chan T)
	for range min(workers, len(list)) {
		wg.Go(func() {
			for x := range work {
				f(x)
			}
		})
	}
	for _, x := range list {
		work <- x
	}
	close(work)
	wg.Wait()
}

// check compares one holding with the KV: its own entry is fine, a missing one is
// written again, another session's supersedes the holding.
func (r *Registry) check(ctx context.Context, h *holding) {
	rec, err := r.presence.getLeader(ctx, h.key())
	if err != nil {
		return // the next sweep tries again
	}
	e, ok := entryOf(rec)
	switch {
	case ok && e.Session != h.session:
		r.supersede(h)
	case ok && r.agrees(h, e):
	default:
		r.wrote(h, claiming, rec.revision)
		ctx, cancel := context.WithTimeout(ctx, decideTimeout)
		defer cancel()
		if err := r.writeHolding(ctx, h); err != nil {
			r.log.Debug("entry_not_written", "server_id", logID(h.serverID), "error", err.Error())
		}
	}
}

// agrees reports whether the KV's entry of h says what h is.
func (r *Registry) agrees(h *holding, e entry) bool {
	return (r.stateOf(h) == grace) == (e.State == stateGrace)
}

// removeOrphan removes the entry of a session that this node does not hold, if it
// is there.
func (r *Registry) removeOrphan(ctx context.Context, s bus.SessionID, o orphan) {
	rec, err := r.presence.getLeader(ctx, bus.EncodeToken(o.serverID))
	if err != nil {
		return
	}
	e, ok := entryOf(rec)
	if ok && e.Session == s {
		err = r.presence.remove(ctx, bus.EncodeToken(o.serverID), rec.revision)
	} else if time.Now().Before(o.until) {
		return
	}
	if errors.Is(err, errUnknown) {
		return
	}
	r.mu.Lock()
	delete(r.orphans, s)
	r.mu.Unlock()
}

// watchLoop asks the nodes that links lead to whether they are there.
func (r *Registry) watchLoop(ctx context.Context) {
	for {
		wait := watchEvery
		nodes := r.bus.LinkedNodes()
		eachOf(nodes, len(nodes), func(n bus.NodeID) { r.watch(ctx, n) })
		r.mu.Lock()
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
	if err == nil || !r.bus.Conn().Connected() { // this node learns nothing about others while it is cut off itself
		r.mu.Lock()
		delete(r.suspects, n)
		r.mu.Unlock()
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
// turns what dead nodes held into grace, if this node is the one to do that.
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
		if _, known := r.known[n]; !known && n != me && e.Settings != r.settings() {
			r.log.Warn("settings_differ", "node", string(n), "theirs", e.Settings, "ours", r.settings())
		}
	}
	for n := range r.known {
		if _, ok := alive[n]; !ok {
			r.reapDue = true
		}
	}
	r.known = alive
	if r.reapDue && first == me && r.unbrokenFor() >= r.cfg.LeaseTTL {
		r.reapDue = r.reap(ctx, alive) != nil
	}
}

// leases lists the nodes that have one: a hint.
func (r *Registry) leases(ctx context.Context) (map[bus.NodeID]nodeEntry, error) {
	keys, err := r.nodes.keys(ctx)
	if err != nil {
		return nil, err
	}
	found, err := r.nodes.getMany(ctx, keys)
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
// several nodes that try, the KV lets one succeed.
func (r *Registry) reap(ctx context.Context, alive map[bus.NodeID]nodeEntry) error {
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
		return err
	}
	for n := range dead {
		dead[n] = r.leaseGone(ctx, n)
	}
	eachOf(entries, sweepWorkers, func(l left) {
		if !dead[l.Node] {
			return
		}
		l.State = stateGrace
		if _, err := r.presence.put(ctx, l.key, l.encode(), l.rev, r.cfg.Grace); err == nil {
			r.log.Info("server_orphaned", "node", string(l.Node))
		}
	})
	return nil
}
