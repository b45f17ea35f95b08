package registry

import (
	"context"
	"encoding/json"
	"errors"
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
	eachOf(holdings, sweepWorkers, func(h *holding) { r.check(ctx, h) })
	for s, o := range orphans {
		r.removeOrphan(ctx, s, o)
	}
	r.lookAtNodes(ctx)
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
	rec, err := r.presence.get(ctx, h.key())
	if e, ok := entryOf(rec); err == nil && ok && e.Session == h.session && r.agrees(h, e) {
		return
	}
	if rec, err = r.presence.getLeader(ctx, h.key()); err != nil {
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
	if e, ok := entryOf(rec); ok && e.Session == s {
		if err := r.presence.remove(ctx, bus.EncodeToken(o.serverID), rec.revision); errors.Is(err, errUnknown) {
			return
		}
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

// lookAtNodes reads the leases of all nodes: it warns of settings that differ.
func (r *Registry) lookAtNodes(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, decideTimeout)
	defer cancel()
	keys, err := r.nodes.keys(ctx)
	if err != nil {
		return
	}
	for _, key := range keys {
		r.mu.Lock()
		_, seen := r.warned[bus.NodeID(key)]
		r.mu.Unlock()
		if !seen && key != string(r.bus.Node()) {
			r.compareSettings(ctx, bus.NodeID(key))
		}
	}
}

func (r *Registry) compareSettings(ctx context.Context, n bus.NodeID) {
	rec, err := r.nodes.get(ctx, string(n))
	var e nodeEntry
	if err != nil || !rec.exists || json.Unmarshal(rec.value, &e) != nil {
		return
	}
	r.mu.Lock()
	r.warned[n] = struct{}{}
	r.mu.Unlock()
	if e.Settings != r.settings() {
		r.log.Warn("settings_differ", "node", string(n), "theirs", e.Settings, "ours", r.settings())
	}
}
