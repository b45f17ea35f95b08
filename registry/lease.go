package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/pyrycode/pyrycode-relay/bus"
)

const (
	nodeReady    = "ready"
	nodeDraining = "draining"
)

// nodeEntry is the value of one key of the nodes bucket: a node's lease.
type nodeEntry struct {
	Version  string       `json:"version"`
	Protocol bus.Versions `json:"protocol"`
	Region   string       `json:"region,omitempty"`
	State    string       `json:"state"`
	Settings settings     `json:"settings"`
}

// settings are the rules that must agree between the nodes of a cluster.
type settings struct {
	Grace     string `json:"grace"`
	LeaseTTL  string `json:"lease_ttl"`
	MaxPhones int    `json:"max_phones"`
}

// lease is this node's own. Times are from this node's monotonic clock, and a
// renewal counts from when it was started: others may have let the lease go a TTL
// after that.
type lease struct {
	mu       sync.Mutex
	revision uint64    // of the last acknowledged renewal
	renewed  time.Time // start of the last acknowledged renewal
	unbroken time.Time // start of the first renewal since the lease was last missing or stale
	doubts   uint64    // how often what this node holds may have been given away without a word to it
	swept    uint64    // doubts when the last complete sweep began
	misfit   error     // the buckets are not those that this node needs
	draining bool
}

// freshLocked reports whether the lease is young enough to decide anything.
func (l *lease) freshLocked(c Config, now time.Time) bool {
	return !l.renewed.IsZero() && now.Sub(l.renewed) < c.freshFor()
}

// Ready returns nil while this node can decide claims and look-ups, and else
// what is wrong, wrapping ErrNotReady.
func (r *Registry) Ready() error {
	now := time.Now()
	r.lease.mu.Lock()
	defer r.lease.mu.Unlock()
	switch {
	case r.lease.draining:
		return fmt.Errorf("%w: draining", ErrNotReady)
	case !r.bus.Connected():
		return fmt.Errorf("%w: not connected to NATS", ErrNotReady)
	case r.lease.misfit != nil:
		return fmt.Errorf("%w: %w", ErrNotReady, r.lease.misfit)
	case r.lease.renewed.IsZero():
		return fmt.Errorf("%w: no lease yet", ErrNotReady)
	case !r.lease.freshLocked(r.cfg, now):
		return fmt.Errorf("%w: lease not renewed for %s", ErrNotReady, now.Sub(r.lease.renewed).Round(time.Second))
	}
	return nil
}

// unbrokenFor tells how long the lease has been without a gap; 0 if it is not
// fresh.
func (r *Registry) unbrokenFor() time.Duration {
	now := time.Now()
	r.lease.mu.Lock()
	defer r.lease.mu.Unlock()
	if !r.lease.freshLocked(r.cfg, now) {
		return 0
	}
	return now.Sub(r.lease.unbroken)
}

// swept reports whether what this node holds has been compared with the KV since its
// lease was last missing or stale, or its NATS connection disturbed. If not, its tables
// are a hint like any other.
func (r *Registry) swept() bool {
	r.lease.mu.Lock()
	defer r.lease.mu.Unlock()
	return r.lease.swept == r.lease.doubts
}

// doubt makes the tables of this node a hint, until a sweep that begins now is done. It
// does not block.
func (r *Registry) doubt() {
	r.lease.mu.Lock()
	r.lease.doubts++
	r.lease.mu.Unlock()
	r.sweepSoon()
}

// renewedSince reports whether a renewal of the lease that began after t was
// acknowledged. If not, one begins soon.
func (r *Registry) renewedSince(t time.Time) bool {
	r.lease.mu.Lock()
	renewed := r.lease.renewed.After(t)
	r.lease.mu.Unlock()
	if !renewed {
		nudge(r.renewNow)
	}
	return renewed
}

// leaseLoop creates the buckets and keeps the lease until ctx ends.
func (r *Registry) leaseLoop(ctx context.Context) {
	for {
		wait := r.cfg.renewEvery()
		if err := r.renew(ctx); err != nil && ctx.Err() == nil {
			r.leaseTrouble(err)
			wait = min(wait, leaseRetry)
		}
		select {
		case <-ctx.Done():
			return
		case <-r.renewNow:
			pause(ctx, renewWait)
			drain(r.renewNow)
		case <-time.After(wait):
		}
	}
}

// leaseTrouble says why the lease is not renewed: the first time, and then when
// the node stops deciding.
func (r *Registry) leaseTrouble(err error) {
	r.lease.mu.Lock()
	fresh := r.lease.freshLocked(r.cfg, time.Now())
	r.lease.mu.Unlock()
	if r.troubleOnce(!fresh) {
		r.log.Warn("lease_not_renewed", "deciding", fresh, "error", err.Error())
	}
}

// renew writes the lease once. A bucket that is gone is made again.
func (r *Registry) renew(ctx context.Context) error {
	start := time.Now()
	r.lease.mu.Lock()
	rev, draining, misfit := r.lease.revision, r.lease.draining, r.lease.misfit != nil
	r.lease.mu.Unlock()
	value, err := json.Marshal(r.nodeEntry(draining))
	if err != nil {
		return err
	}
	if rev == 0 || misfit {
		if err := r.createBuckets(ctx); err != nil {
			return err
		}
	}
	key := string(r.bus.Node())
	rev2, err := r.nodes.put(ctx, key, value, rev, 0)
	if err == nil {
		r.renewed(rev2, start, false)
		return nil
	}
	// Lost or unknown: only this node writes this key, so what is there is its own
	// earlier write, or nothing.
	if errors.Is(err, errUnknown) {
		if err2 := r.createBuckets(ctx); err2 != nil {
			return errors.Join(err, err2)
		}
	}
	there, err2 := r.nodes.getLeader(ctx, key)
	if err2 != nil {
		return errors.Join(err, err2)
	}
	start = time.Now()
	if rev2, err = r.nodes.put(ctx, key, value, there.revision, 0); err != nil {
		return err
	}
	r.renewed(rev2, start, !there.exists)
	return nil
}

// renewed notes a renewal that began at start. anew says that the lease had been
// missing.
func (r *Registry) renewed(rev uint64, start time.Time, anew bool) {
	r.lease.mu.Lock()
	anew = anew || !r.lease.freshLocked(r.cfg, time.Now())
	if anew {
		r.lease.unbroken = start
		r.lease.doubts++ // whatever this node holds may have been given away
	}
	r.lease.revision, r.lease.renewed = rev, start
	r.lease.mu.Unlock()
	r.troubleOver()
	if anew {
		r.sweepSoon()
		r.bus.ProbeAll() // others may have ended their links to this node
	}
}

func (r *Registry) nodeEntry(draining bool) nodeEntry {
	e := nodeEntry{Version: r.cfg.Version, Protocol: r.bus.Versions(), Region: r.cfg.Region, State: nodeReady, Settings: r.settings()}
	if draining {
		e.State = nodeDraining
	}
	return e
}

func (r *Registry) settings() settings {
	return settings{Grace: r.cfg.Grace.String(), LeaseTTL: r.cfg.LeaseTTL.String(), MaxPhones: r.cfg.MaxPhones}
}

// nodeState is what this node knows about another.
type nodeState int

const (
	nodeUnknown nodeState = iota
	nodeAlive
	nodeDead
)

// leaseGone reports whether node's lease is missing, as this node may conclude:
// its own has been unbroken for a whole TTL, so it has seen a KV that works.
func (r *Registry) leaseGone(ctx context.Context, node bus.NodeID) bool {
	if r.unbrokenFor() < r.cfg.LeaseTTL {
		return false
	}
	rec, err := r.nodes.getLeader(ctx, string(node))
	return err == nil && !rec.exists && r.unbrokenFor() >= r.cfg.LeaseTTL
}

// asking is one question to a node. All claims share it that came before it began: a
// gateway that dies has its binaries claim elsewhere by the thousand.
type asking struct {
	done  chan struct{} // closed when state is set
	state nodeState
}

// askNode tells a claim whether node is there, by a question that begins after this call.
// One that another claim began may be nodeUnknown because that had no time left: then
// it is asked once more.
func (r *Registry) askNode(ctx context.Context, node bus.NodeID) nodeState {
	for range 2 {
		a, before, mine := r.joinAsking(node)
		if mine {
			return r.ask(ctx, node, a, before)
		}
		select {
		case <-a.done:
			bus.Yield()
		case <-ctx.Done():
			return nodeUnknown
		}
		if a.state != nodeUnknown {
			return a.state
		}
	}
	return nodeUnknown
}

// joinAsking returns the question to node that has not begun yet. mine says that it is
// new and the caller's to ask, after before, which is under way, if that is not nil.
func (r *Registry) joinAsking(node bus.NodeID) (a, before *asking, mine bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if a := r.nextAsking[node]; a != nil {
		return a, nil, false
	}
	a = &asking{done: make(chan struct{})}
	r.nextAsking[node] = a
	return a, r.nowAsking[node], true
}

func (r *Registry) ask(ctx context.Context, node bus.NodeID, a, before *asking) nodeState {
	if before != nil {
		select {
		case <-before.done:
		case <-ctx.Done():
		}
	}
	r.mu.Lock()
	delete(r.nextAsking, node)
	r.nowAsking[node] = a
	r.mu.Unlock()
	a.state = r.findOut(ctx, node)
	r.mu.Lock()
	if r.nowAsking[node] == a {
		delete(r.nowAsking, node)
	}
	r.mu.Unlock()
	close(a.done)
	return a.state
}

// findOut asks whether node is there: it answers, or nobody does twice with
// deadCheckWait between, while the KV answers, or its lease is gone.
func (r *Registry) findOut(ctx context.Context, node bus.NodeID) nodeState {
	for try := 0; ; try++ {
		err := r.bus.Hello(ctx, node)
		switch {
		case err == nil:
			return nodeAlive
		case r.leaseGone(ctx, node):
			return nodeDead
		case !errors.Is(err, bus.ErrNoResponders) || !r.bus.Connected():
			return nodeUnknown
		case try > 0:
			return nodeDead
		}
		if !pause(ctx, deadCheckWait) {
			return nodeUnknown
		}
		if _, err := r.nodes.getLeader(ctx, string(node)); err != nil {
			return nodeUnknown // this node's own server may have lost the others, and then all are silent
		}
	}
}

// pause waits for d. It returns false if ctx ended first.
func pause(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}
