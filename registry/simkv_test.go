package registry

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/pyrycode/pyrycode-relay/bus"
)

// simStore is the committed state of one simulated bucket, with its past, and the
// faults that JetStream showed when it was measured. (nats-measured.md 1.12, 2.1-2.4)
type simStore struct {
	net     *simNet
	cluster *simCluster
	maxAge  time.Duration                // of every key; 0: none
	wrote   func(key string, rec record) // sees every commit, in order
	mu      sync.Mutex                   // guards what follows
	exists  bool
	wiped   time.Time               // latest time
	last    uint64                  // revision
	log     map[string][]simVersion // by key, oldest first
	lasts   []simVersion            // the latest revision after each change
}

// simCluster is what the buckets of a cluster have in common: its Raft groups.
// Guarded by mu.
type simCluster struct {
	mu       sync.Mutex
	stalls   []interval // without a leader
	splitAt  time.Time  // latest split; the smaller side has what was there then
	healedAt time.Time  // of that split
	oldLeads time.Time  // until then, the leader of before answers reads on the smaller side
	rough    int        // percent of calls that meet a fault of their own
}

type interval struct{ from, to time.Time }

func (i interval) has(t time.Time) bool { return !t.Before(i.from) && t.Before(i.to) }

// leader returns when there is a leader: t, or the end of the stall that it is in.
func (c *simCluster) leader(t time.Time) time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	for again := true; again; {
		again = false
		for _, s := range c.stalls {
			if s.has(t) {
				t, again = s.to, true
			}
		}
	}
	return t
}

// simVersion is one state of a key.
type simVersion struct {
	at   time.Time
	ends time.Time // zero: never
	record
}

func newSimStore(n *simNet, c *simCluster, maxAge time.Duration) *simStore {
	return &simStore{net: n, cluster: c, maxAge: maxAge, wrote: func(string, record) {}, log: make(map[string][]simVersion)}
}

// ageLocked brings the log up to now: what had a time to live has ended, if a leader
// was there to say so, and its marker a minute after.
func (s *simStore) ageLocked() {
	for {
		key, end := "", time.Now()
		for k := range s.log {
			if v := s.latestLocked(k); !v.ends.IsZero() {
				if at := s.cluster.leader(v.ends); !at.After(end) {
					key, end = k, at
				}
			}
		}
		if key == "" {
			return
		}
		next := simVersion{at: end}
		if s.latestLocked(key).exists {
			s.last++
			next.revision, next.ends = s.last, end.Add(markerTTL)
		}
		s.addLocked(key, next)
	}
}

func (s *simStore) addLocked(key string, v simVersion) {
	before := s.latestLocked(key)
	s.log[key] = append(s.log[key], v)
	s.lasts = append(s.lasts, simVersion{at: v.at, record: record{revision: s.last}})
	if v.exists || before.exists {
		s.wrote(key, v.record)
	}
}

func (s *simStore) latestLocked(key string) simVersion {
	if l := s.log[key]; len(l) > 0 {
		return l[len(l)-1]
	}
	return simVersion{}
}

// truth is what is committed now.
func (s *simStore) truth(key string) record {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ageLocked()
	return s.latestLocked(key).record
}

// asOf is what was committed at t.
func (s *simStore) asOf(key string, t time.Time) record {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ageLocked()
	for _, v := range slices.Backward(s.log[key]) {
		if !v.at.After(t) {
			return v.record
		}
	}
	return record{}
}

// missing reports whether key was not there at some time since from.
func (s *simStore) missing(key string, from time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ageLocked()
	for _, v := range slices.Backward(s.log[key]) {
		if !v.exists {
			return true
		}
		if v.at.Before(from) {
			return false
		}
	}
	return true
}

// gap is the end of the latest time before to, longer than d, without a write to key.
func (s *simStore) gap(key string, d time.Duration, to time.Time) (end time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var last time.Time
	for _, v := range s.log[key] {
		if !v.exists || v.at.After(to) {
			continue
		}
		if !last.IsZero() && v.at.Sub(last) > d {
			end = v.at
		}
		last = v.at
	}
	return end
}

// lastAsOf is the latest revision of the bucket as of t.
func (s *simStore) lastAsOf(t time.Time) uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ageLocked()
	for _, v := range slices.Backward(s.lasts) {
		if !v.at.After(t) {
			return v.revision
		}
	}
	return 0
}

func (s *simStore) keysOf() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Sorted(maps.Keys(s.log))
}

// wipedAt is when the bucket was lost for the last time.
func (s *simStore) wipedAt() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.wiped
}

// wipe loses the bucket.
func (s *simStore) wipe() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ageLocked()
	s.exists, s.last, s.wiped = false, 0, time.Now()
	for key := range s.log {
		s.addLocked(key, simVersion{at: time.Now()})
	}
}

// commit is what the leader does with a write.
func (s *simStore) commit(key string, rec record, rev uint64, ttl time.Duration) (uint64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.exists {
		return 0, errUnknown
	}
	s.ageLocked()
	if s.latestLocked(key).revision != rev {
		return 0, errLost
	}
	v := simVersion{at: time.Now(), record: rec}
	s.last++
	v.revision = s.last
	if s.maxAge > 0 {
		ttl = s.maxAge
	}
	if ttl > 0 {
		v.ends = v.at.Add(ttl.Truncate(time.Second) + s.net.upTo(250*time.Millisecond))
	}
	s.addLocked(key, v)
	return s.last, nil
}

// simBucket is a node's access to a store: a kv.
type simBucket struct {
	*simStore
	port *simPort
}

type simView int

const (
	viewMajority simView = iota
	viewMinority
	viewNothing // the node is cut off
)

func (b simBucket) view() simView {
	b.net.mu.Lock()
	defer b.net.mu.Unlock()
	switch {
	case b.port.state != portLinked:
		return viewNothing
	case b.net.split && b.net.minority[b.port.id]:
		return viewMinority
	}
	return viewMajority
}

// call begins a call: it takes time, and may meet a fault of its own.
func (b simBucket) call(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithTimeout(ctx, kvTimeout)
	pause(ctx, simDelay+b.net.upTo(simDelay))
	return ctx, cancel
}

func (b simBucket) unlucky() bool {
	b.cluster.mu.Lock()
	rough := b.cluster.rough
	b.cluster.mu.Unlock()
	return b.net.chance(rough)
}

// hang waits for the caller to give up.
func hang(ctx context.Context) error {
	<-ctx.Done()
	return fmt.Errorf("%w: %w", errUnknown, ctx.Err())
}

func (b simBucket) fail(ctx context.Context) error {
	if b.port.Connected() {
		return hang(ctx)
	}
	return errUnknown
}

func (b simBucket) create(ctx context.Context) error {
	ctx, cancel := b.call(ctx)
	defer cancel()
	switch {
	case b.view() == viewNothing:
		return b.fail(ctx)
	case b.view() == viewMinority && b.net.chance(50): // answered from memory
		return nil
	case b.view() == viewMinority, b.cluster.leader(time.Now()).After(time.Now()):
		return hang(ctx)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.exists {
		b.exists, b.simStore.last = true, uint64(time.Now().UnixMicro()) //nolint:gosec // after 1970
	}
	return nil
}

func (b simBucket) put(ctx context.Context, key string, value []byte, rev uint64, ttl time.Duration) (uint64, error) {
	return b.write(ctx, key, record{value: value, exists: true}, rev, ttl)
}

func (b simBucket) remove(ctx context.Context, key string, rev uint64) error {
	_, err := b.write(ctx, key, record{}, rev, markerTTL)
	return err
}

// write commits at once, or when there is a leader, or never; and the writer may or
// may not be told.
func (b simBucket) write(ctx context.Context, key string, rec record, rev uint64, ttl time.Duration) (uint64, error) {
	ctx, cancel := b.call(ctx)
	defer cancel()
	switch b.view() {
	case viewNothing:
		return 0, b.fail(ctx)
	case viewMinority:
		if b.oldLeader() && b.asOf(key, b.splitAt()).revision != rev {
			return 0, errLost // by what it knew
		}
		return 0, hang(ctx)
	}
	wait := time.Until(b.cluster.leader(time.Now()))
	unlucky := b.unlucky()
	switch {
	case unlucky && b.net.chance(30): // error 10164
		return 0, errUnknown
	case unlucky && b.net.chance(50):
		wait += b.net.upTo(3 * time.Second)
	case wait > 0 && b.net.chance(50): // the proposal is gone with its leader
		return 0, hang(ctx)
	}
	if wait <= 0 {
		newRev, err := b.commit(key, rec, rev, ttl)
		if unlucky || b.view() == viewNothing { // the answer is lost
			return 0, hang(ctx)
		}
		return newRev, err
	}
	type result struct {
		rev uint64
		err error
	}
	done := make(chan result, 1)
	time.AfterFunc(wait, func() {
		newRev, err := b.commit(key, rec, rev, ttl)
		done <- result{newRev, err}
	})
	select {
	case r := <-done:
		return r.rev, r.err
	case <-ctx.Done():
		return 0, fmt.Errorf("%w: %w", errUnknown, ctx.Err())
	}
}

func (b simBucket) oldLeader() bool {
	b.cluster.mu.Lock()
	defer b.cluster.mu.Unlock()
	return time.Now().Before(b.cluster.oldLeads)
}

func (b simBucket) splitAt() time.Time {
	b.cluster.mu.Lock()
	defer b.cluster.mu.Unlock()
	return b.cluster.splitAt
}

// replica draws the time whose state a replica answers with, for this node.
func (b simBucket) replica(ctx context.Context) (time.Time, error) {
	t, err := b.anyReplica(ctx)
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.view() == viewMajority {
		t = later(t, b.wiped) // what is gone is gone on all
	}
	return t, err
}

func (b simBucket) anyReplica(ctx context.Context) (time.Time, error) {
	now := time.Now()
	b.cluster.mu.Lock()
	splitAt, healedAt := b.cluster.splitAt, b.cluster.healedAt
	b.cluster.mu.Unlock()
	split := splitAt.After(healedAt)
	switch v := b.view(); {
	case v == viewNothing:
		return now, b.fail(ctx)
	case v == viewMinority:
		return splitAt, nil
	case split && now.Sub(splitAt) < 24*time.Second && b.net.chance(40): // the replica that is cut off
		return now, hang(ctx)
	case !healedAt.IsZero() && !split && now.Sub(healedAt) < 6*time.Second && b.net.chance(30): // has not caught up
		return splitAt, nil
	case b.unlucky():
		return now, hang(ctx)
	case b.net.chance(20):
		return now.Add(-b.net.upTo(50 * time.Millisecond)), nil
	}
	return now, nil
}

func (b simBucket) get(ctx context.Context, key string) (record, error) {
	ctx, cancel := b.call(ctx)
	defer cancel()
	t, err := b.replica(ctx)
	if err != nil {
		return record{}, err
	}
	return b.asOf(key, t), nil
}

// leaderView is the time whose state the leader answers with, for this node.
func (b simBucket) leaderView(ctx context.Context) (time.Time, error) {
	now := time.Now()
	switch v := b.view(); {
	case v == viewNothing:
		return now, b.fail(ctx)
	case v == viewMinority && b.oldLeader():
		return b.splitAt(), nil
	case v == viewMinority && b.net.chance(50): // 10008
		return now, errUnknown
	case v == viewMinority, b.cluster.leader(now).After(now), b.unlucky():
		return now, hang(ctx)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.exists {
		return now, errUnknown
	}
	return now, nil
}

func (b simBucket) getLeader(ctx context.Context, key string) (record, error) {
	ctx, cancel := b.call(ctx)
	defer cancel()
	t, err := b.leaderView(ctx)
	if err != nil {
		return record{}, err
	}
	return b.asOf(key, t), nil
}

func (b simBucket) version(ctx context.Context) (version, error) {
	ctx, cancel := b.call(ctx)
	defer cancel()
	t, err := b.leaderView(ctx)
	if err != nil {
		return version{}, err
	}
	return version{last: b.lastAsOf(t), created: b.wipedAt().UnixNano()}, nil
}

func (b simBucket) getMany(ctx context.Context, keys []string, since uint64) (map[string]record, error) {
	ctx, cancel := b.call(ctx)
	defer cancel()
	t, err := b.replica(ctx)
	for err == nil && b.lastAsOf(t) < since {
		if !pause(ctx, retryWait) {
			return nil, errUnknown
		}
		t, err = b.replica(ctx)
	}
	if err != nil {
		return nil, err
	}
	found := make(map[string]record)
	for _, k := range keys {
		if rec := b.asOf(k, t); rec.revision > 0 {
			found[k] = rec
		}
	}
	return found, nil
}

func (b simBucket) keys(ctx context.Context) ([]string, error) {
	ctx, cancel := b.call(ctx)
	defer cancel()
	t, err := b.replica(ctx)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(b.keysOf(), func(k string) bool { return b.asOf(k, t).revision == 0 }), nil
}

var (
	_ kv            = simBucket{}
	_ bus.Transport = (*simPort)(nil)
)
