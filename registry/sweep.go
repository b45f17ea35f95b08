package registry

import (
	"context"
	"maps"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pyrycode/pyrycode-relay/bus"
)

func (r *Registry) sweepSoon() { nudge(r.sweepNow) }

// sweepLoop compares what this node holds with the KV every sweepEvery, and at
// once after something that may have changed it.
func (r *Registry) sweepLoop(ctx context.Context) {
	ticker := time.NewTicker(sweepEvery)
	defer ticker.Stop()
	missing := false // a bucket is, and that has been logged
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		case <-r.sweepNow:
		}
		if r.Ready() != nil {
			if !r.swept() && pause(ctx, sweepPause) {
				r.sweepSoon() // as soon as it is
			}
			continue
		}
		err := r.createBuckets(ctx) // one may have been deleted
		if err != nil && !missing {
			r.log.Warn("bucket_missing", "error", err.Error())
		}
		missing = err != nil
		r.lease.mu.Lock()
		doubts := r.lease.doubts
		doubtful := doubts != r.lease.swept
		r.lease.mu.Unlock()
		if missing || doubtful {
			r.settled = version{}
		}
		if missing || !r.sweep(ctx) {
			pause(ctx, leaseRetry)
			r.sweepSoon()
			continue
		}
		r.lease.mu.Lock()
		r.lease.swept = doubts
		r.lease.mu.Unlock()
		pause(ctx, sweepPause)
	}
}

// sweep makes "connected means registered" true again, whatever happened to the
// KV, and removes what this node left behind there. It returns false if something
// could not be found out, and gives up when the KV does not seem to answer at all. While
// the KV is what it was when all agreed, it looks only at what is not written yet, or was
// never compared; and at everything now and then, because a KV that lost its last writes
// may come by as many others to look the same.
func (r *Registry) sweep(ctx context.Context) bool {
	r.sweeps++
	now, err := r.presence.version(ctx)
	unchanged := err == nil && now == r.settled && r.sweeps%fullSweepEvery != 0
	r.settled = version{}
	r.mu.Lock()
	var holdings []*holding
	for _, h := range r.current {
		if !unchanged || h.written != h.state || !h.agreed {
			holdings = append(holdings, h)
		}
	}
	orphans := maps.Clone(r.orphans)
	r.mu.Unlock()
	answering, giveUp := context.WithCancel(ctx)
	defer giveUp()
	var unknown atomic.Int32
	differ := false
	byPages(answering, holdings, func(page []*holding) bool {
		if err == nil {
			page = r.differing(answering, page, now.last)
		}
		differ = differ || len(page) > 0
		eachOf(page, sweepWorkers, func(h *holding) {
			if !r.check(answering, h) && unknown.Add(1) == sweepWorkers {
				giveUp()
			}
		})
		return true
	})
	if answering.Err() != nil {
		return false
	}
	eachOf(slices.Collect(maps.Keys(orphans)), sweepWorkers, func(s bus.SessionID) { r.removeOrphan(ctx, s, orphans[s]) })
	r.lookAtNodes(ctx, now.last)
	if err == nil && !differ {
		r.settled = now
	}
	return unknown.Load() == 0
}

// differing picks the holdings that the KV may not agree with, as of revision since.
func (r *Registry) differing(ctx context.Context, holdings []*holding, since uint64) (differ []*holding) {
	keys := make([]string, len(holdings))
	for i, h := range holdings {
		keys[i] = h.key()
	}
	found, err := r.presence.getMany(ctx, keys, since)
	if err != nil {
		return holdings
	}
	for i, h := range holdings {
		if e, ok := entryOf(found[keys[i]]); !ok || e.Session != h.session || !r.agrees(h, e) {
			differ = append(differ, h)
			continue
		}
		r.mu.Lock()
		h.agreed = true
		r.mu.Unlock()
	}
	return differ
}

// byPages calls f for one page of list after the other, until it fails or ctx ends, and
// returns what is left.
func byPages[T any](ctx context.Context, list []T, f func(page []T) (ok bool)) (left []T) {
	size, fastest := pageSize, time.Duration(math.MaxInt64)
	for len(list) > 0 {
		page := list[:min(size, len(list))]
		start := time.Now()
		if !f(page) {
			return list
		}
		list = list[len(page):]
		if fastest = min(fastest, time.Since(start)); fastest > farRead {
			size = farPage
		}
		if !pause(ctx, pageWait) {
			return list
		}
	}
	return nil
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
// written again, another session's supersedes the holding. It returns false if the
// KV did not answer, or changed under it all the time.
func (r *Registry) check(ctx context.Context, h *holding) bool {
	for range checkTries {
		rec, err := r.presence.getLeader(ctx, h.key())
		if err != nil {
			return false
		}
		e, ok := entryOf(rec)
		switch {
		case ok && e.Session != h.session:
			if r.lostTo(ctx, h, rec, e) {
				return true
			}
		case ok && r.agrees(h, e):
			return true
		default:
			r.wrote(h, claiming, rec.revision)
			return r.rewrite(ctx, h)
		}
		if !pause(ctx, retryWait) {
			return false
		}
	}
	return false
}

func (r *Registry) rewrite(ctx context.Context, h *holding) bool {
	ctx, cancel := context.WithTimeout(ctx, decideTimeout)
	defer cancel()
	err := r.writeHolding(ctx, h)
	if err != nil {
		r.log.Debug("entry_not_written", "server_id", logID(h.serverID), "error", err.Error())
	}
	return err == nil
}

// lostTo supersedes h if rec, which names another session, is what the KV says
// now: an old leader that was cut off would answer with what it knew. Writing the
// entry once more as it is proves it. It returns false if that did not succeed.
func (r *Registry) lostTo(ctx context.Context, h *holding, rec record, e entry) bool {
	ttl := time.Duration(0)
	if e.State == stateGrace {
		ttl = r.cfg.Grace
	}
	if _, err := r.presence.put(ctx, h.key(), rec.value, rec.revision, ttl); err != nil {
		return false
	}
	r.supersede(h)
	return true
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
	if err != nil {
		return // the next sweep looks again; what changed may be our own late write
	}
	r.mu.Lock()
	delete(r.orphans, s)
	r.mu.Unlock()
}
