package registry

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/pyrycode/pyrycode-relay/bus"
	"github.com/pyrycode/pyrycode-relay/testenv"
)

var historySeed = flag.Uint64("history.seed", 0, "seed of TestHistories; 0: a new one")

const (
	historyRounds = 1000 // at least; as many more as fit into the faults
	roundsAtOnce  = 100
	callsOfClient = 5 // in a round, which has a client on each node
	pauseBefore   = 3 * time.Second
	pauseBetween  = 800 * time.Millisecond

	historyLease = 8 * time.Second // short, so that a node may lose it
	historyGrace = time.Second
	historyProbe = time.Second
	// historySettle is how long after the last fault everything may take to be as it
	// should be: a lease ends, a sweep sees that, a grace ends.
	historySettle = historyLease + 2*sweepEvery + historyGrace + graceSlack + decideTimeout
)

// TestHistories runs three nodes on three NATS servers. In each of many rounds at
// once, clients claim, release and dial one server-id through all nodes, while nodes
// are killed and replaced, or cut off, and NATS hands over its leaderships or loses a
// server. Each round's history must be legal: see historymodel_test.go.
func TestHistories(t *testing.T) { // alone: it takes both cores
	run := newHistoryRun(t)
	var over atomic.Bool
	var players sync.WaitGroup
	for range roundsAtOnce {
		players.Go(func() {
			for n := run.started.Add(1); n <= historyRounds || !over.Load(); n = run.started.Add(1) {
				run.play(n)
			}
		})
	}
	run.faultAll()
	over.Store(true)
	t.Logf("faults %v", run.now())
	players.Wait()
	t.Logf("rounds %v", run.now())
	eventually(t, historySettle, "the KV and what the nodes hold are the same", run.agrees)
	t.Logf("settled %v", run.now())
	eachOf(run.all(), roundsAtOnce, (*round).dialEverywhere)
	t.Logf("dialled %v", run.now())
	run.judge()
}

// historyRun is a run: its cluster, and what was recorded.
type historyRun struct {
	*scene
	seed    uint64
	nats    *testenv.Cluster
	start   time.Time
	started atomic.Uint64 // rounds

	mu     sync.Mutex
	nodes  [3]*historyNode // on each server the latest
	faults int
	rounds map[string]*round // by server-id
	tally  map[string]int    // of calls that told nothing, and later of rows
}

// historyNode is a node and what was done to it.
type historyNode struct {
	*node
	place
	dead atomic.Bool
}

// join starts a node on a server, as scene.startNode does, whose KV records.
func (run *historyRun) join(server int) *historyNode {
	t := run.t
	t.Helper()
	proxy, err := testenv.NewProxy(strings.TrimPrefix(run.w.urls[server], "nats://"))
	if err != nil {
		t.Fatal(err)
	}
	id := bus.NewNodeID(fmt.Sprintf("n%d", server))
	conn, err := bus.Dial(bus.ConnConfig{URL: "nats://" + proxy.Addr()}, id, logger)
	if err != nil {
		t.Fatal(err)
	}
	n := &historyNode{node: &node{t: t, id: id, conn: conn, proxy: proxy}, place: place{name: string(id), gone: never}}
	n.Registry = New(bus.New(conn, id, bus.Config{}, logger), run.cfg, logger)
	n.presence = recordingKV{kv: n.presence, run: run, at: &n.place}
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		n.Stop(ctx)
		conn.Close()
		proxy.Close()
	})
	return n
}

// recordingKV is a presence bucket whose writes are recorded: what a claim wrote before
// it failed, and what a node writes by itself.
type recordingKV struct {
	kv
	run *historyRun
	at  *place
}

// write is one to the key of a round.
type write struct {
	span
	at  *place
	e   entry
	err error
}

func (k recordingKV) put(ctx context.Context, key string, value []byte, rev uint64, ttl time.Duration) (uint64, error) {
	w := write{span: span{from: k.run.now()}, at: k.at}
	newRev, err := k.kv.put(ctx, key, value, rev, ttl)
	w.to, w.err = k.run.now(), err
	w.e, _ = entryOf(record{value: value, exists: true})
	k.run.mu.Lock()
	r := k.run.rounds[key]
	k.run.mu.Unlock()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.writes = append(r.writes, w)
	return newRev, err
}

func newHistoryRun(t *testing.T) *historyRun {
	t.Helper()
	nats, err := testenv.StartCluster(testenv.ClusterOptions{Name: "history"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nats.Close)
	run := &historyRun{seed: *historySeed, nats: nats, start: time.Now(), rounds: make(map[string]*round), tally: make(map[string]int)}
	if run.seed == 0 {
		run.seed = rand.Uint64()
	}
	t.Logf("seed %d", run.seed)
	run.scene = newScene(t, &world{name: "R3", urls: nats.URLs()})
	run.cfg.LeaseTTL, run.cfg.Grace, run.cfg.ProbeTimeout = historyLease, historyGrace, historyProbe
	run.cfg.Memory = false // a server that comes back with nothing forgets what it voted for
	for i := range run.nodes {
		run.nodes[i] = run.join(i)
	}
	for _, n := range run.nodes {
		n.waitReady()
	}
	return run
}

func (run *historyRun) all() []*round { return slices.Collect(maps.Values(run.rounds)) }

func (run *historyRun) now() time.Duration { return time.Since(run.start) }

func (run *historyRun) nodeOn(server int) *historyNode {
	run.mu.Lock()
	defer run.mu.Unlock()
	return run.nodes[server]
}

func (run *historyRun) count(what string) {
	run.mu.Lock()
	defer run.mu.Unlock()
	run.tally[what]++
}

// faultAll makes one fault after the other. Kills come first: the lease of a killed
// node takes its time.
func (run *historyRun) faultAll() {
	rng := rand.New(rand.NewPCG(run.seed, 0))
	shuffled := func(list ...func(server int)) []func(int) {
		rng.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
		return list
	}
	first := shuffled(run.kill, run.kill, run.kill, run.hold(2*time.Second), run.cut, run.stepDown)
	then := shuffled(run.hold(3*time.Second), run.hold(historyLease*7/8), run.cut, run.refuse(deadAfter+time.Second),
		run.stepDown, run.restart, run.restart)
	for _, f := range append(first, then...) {
		pause(run.t.Context(), time.Duration(rng.Int64N(int64(time.Second))))
		f(rng.IntN(len(run.nodes)))
	}
}

// fault records one, from its begin until all nodes hear each other and decide.
// cutOff is the node that cannot be heard meanwhile, if there is one.
func (run *historyRun) fault(cutOff *historyNode, f func()) {
	run.t.Helper()
	s := span{from: run.now()}
	f()
	eventually(run.t, 20*time.Second, "all nodes are ready and hear each other", func() bool {
		for _, a := range run.nodes {
			for _, b := range run.nodes {
				if a.Ready() != nil || a.Bus().Hello(run.t.Context(), b.id) != nil {
					return false
				}
			}
		}
		return true
	})
	s.to = run.now()
	run.mu.Lock()
	defer run.mu.Unlock()
	run.faults++
	if cutOff != nil {
		cutOff.faults = append(cutOff.faults, s)
	}
}

// kill kills a node. A new one takes its place.
func (run *historyRun) kill(server int) {
	n := run.nodes[server]
	run.fault(nil, func() {
		killed := span{run.now(), never}
		n.dead.Store(true)
		n.kill()
		n.gone, n.faults = run.now(), append(n.faults, killed)
		next := run.join(server)
		next.waitReady()
		run.mu.Lock()
		run.nodes[server] = next
		run.mu.Unlock()
	})
}

// hold keeps back all bytes between a node and NATS.
func (run *historyRun) hold(d time.Duration) func(int) {
	return func(server int) {
		n := run.nodes[server]
		run.fault(n, func() {
			n.proxy.Hold()
			pause(run.t.Context(), d)
			n.proxy.Resume()
		})
	}
}

// cut resets a node's connection to NATS.
func (run *historyRun) cut(server int) {
	n := run.nodes[server]
	run.fault(n, n.proxy.Cut)
}

// refuse cuts a node's connection to NATS and allows no new one for d.
func (run *historyRun) refuse(d time.Duration) func(int) {
	return func(server int) {
		n := run.nodes[server]
		run.fault(n, func() {
			n.proxy.Refuse()
			n.proxy.Cut()
			pause(run.t.Context(), d)
			n.proxy.Accept()
		})
	}
}

// restart stops a NATS server and starts it again.
func (run *historyRun) restart(server int) {
	run.fault(run.nodes[server], func() {
		run.nats.Stop(server)
		pause(run.t.Context(), time.Second)
		if err := run.nats.Restart(server); err != nil {
			run.t.Fatal(err)
		}
		run.waitNATS()
	})
}

// stepDown makes the leaders of both buckets hand over.
func (run *historyRun) stepDown(int) {
	run.fault(nil, func() {
		for _, bucket := range []string{"_nodes", "_presence"} {
			eventually(run.t, 20*time.Second, "a leader that steps down", func() bool { // some requests are never answered when leaders change
				_, err := run.nc.Request("$JS.API.STREAM.LEADER.STEPDOWN.KV_"+run.cfg.KVPrefix+bucket, nil, 5*time.Second)
				return err == nil
			})
		}
		run.waitNATS()
	})
}

func (run *historyRun) waitNATS() {
	run.t.Helper()
	ctx, cancel := context.WithTimeout(run.t.Context(), 20*time.Second)
	defer cancel()
	if err := run.nats.WaitReady(ctx); err != nil {
		run.t.Fatal(err)
	}
}

// round is what happens to one server-id.
type round struct {
	run *historyRun

	mu      sync.Mutex
	history history
	writes  []write
	found   map[*operation]bus.SessionID // what dials were attached to
}

func (run *historyRun) play(number uint64) {
	r := &round{
		run: run, found: make(map[*operation]bus.SessionID),
		history: history{serverID: fmt.Sprintf("round-%d", number), grace: historyGrace, lease: historyLease},
	}
	run.mu.Lock()
	run.rounds[bus.EncodeToken(r.history.serverID)] = r
	run.mu.Unlock()
	rng := rand.New(rand.NewPCG(run.seed, number))
	pause(run.t.Context(), time.Duration(rng.Int64N(int64(pauseBefore))))
	between := pauseBetween
	if rng.IntN(2) == 0 {
		between /= 100
	}
	var playing sync.WaitGroup
	for i := range run.nodes {
		c := &client{round: r, number: i, server: i, rng: rand.New(rand.NewPCG(run.seed, number<<8|uint64(i+1)))}
		playing.Go(func() {
			for range callsOfClient {
				c.call()
				pause(run.t.Context(), time.Duration(c.rng.Int64N(int64(between))))
			}
		})
	}
	playing.Wait()
}

// client is one or the other: a binary, and phones.
type client struct {
	*round
	number int
	server int // of the node that it calls
	rng    *rand.Rand
	mine   *claimed // nil: none
}

// claimed is the connection of a binary that holds the server-id, as far as it knows.
type claimed struct {
	*binary
	tenure      *tenure
	node        *historyNode
	muted, lost atomic.Bool
}

// call does one thing. If the node is not ready, the next call goes to another one.
func (c *client) call() {
	n := c.run.nodeOn(c.server)
	if c.mine != nil && (c.mine.lost.Load() || c.mine.node.dead.Load()) {
		c.mine = nil
	}
	var err error
	switch pick := c.rng.IntN(10); {
	case pick < 4:
		err = c.dial(n, false)
	case c.mine == nil:
		err = c.claim(n)
	case pick < 8:
		c.release()
	case !c.mine.muted.Load(): // it is mute since the first time
		c.mine.tenure.muted = c.run.now()
		c.mine.muted.Store(true)
	}
	if errors.Is(err, ErrNotReady) {
		c.server = (c.server + 1) % len(c.run.nodes)
	}
}

func (c *client) claim(n *historyNode) error {
	b := &claimed{binary: n.newBinary(c.history.serverID), node: n}
	b.tenure = &tenure{name: b.ConnID(), at: &n.place, muted: never}
	opts := []Option{WithVersion(b.tenure.name), WithPing(func(ctx context.Context) error { return c.ping(ctx, b) }), OnEvict(func(error) { c.evicted(b) })}
	if c.rng.IntN(8) == 0 {
		opts = append(opts, WithoutProbe())
	}
	o := c.begin(n, claims)
	o.of = b.tenure
	err := b.claim(opts...)
	o.to = c.run.now()
	switch {
	case errors.Is(err, ErrNotReady):
		c.run.count("claim: not ready")
		return err
	case n.dead.Load():
		o.got = unknown
	case err == nil:
		o.got, c.mine = done, b
	case errors.Is(err, ErrServerIDConflict):
		o.got = conflict
	case errors.Is(err, ErrHeld):
		o.got = busy
	default:
		o.got = unknown
	}
	if o.got != done && o.got != conflict {
		c.run.count("claim: " + string(o.got))
	}
	c.record(o)
	return nil
}

// begin begins to record a call.
func (c *client) begin(n *historyNode, d deed) *operation {
	return &operation{span: span{from: c.run.now()}, client: c.number, at: &n.place, do: d}
}

func (c *client) ping(ctx context.Context, b *claimed) error {
	from := c.run.now()
	if b.muted.Load() {
		return hang(ctx)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.history.pongs = append(c.history.pongs, span{from, c.run.now()})
	return nil
}

func (c *client) evicted(b *claimed) {
	b.lost.Store(true)
	o := c.begin(b.node, evicts)
	o.to, o.of, o.got = o.from, b.tenure, done
	c.record(o)
}

func (c *client) release() {
	o := c.begin(c.mine.node, releases)
	o.of, o.got = c.mine.tenure, done
	c.mine.release()
	o.to = c.run.now()
	if c.mine.node.dead.Load() {
		o.to = never // it died meanwhile, and may have told the KV before
	}
	c.record(o)
	c.mine = nil
}

func (c *client) dial(n *historyNode, settled bool) error {
	o := c.begin(n, dials)
	o.settled = settled
	p, err := n.dial(c.history.serverID)
	found := p.link.Session()
	o.to = c.run.now()
	p.hangUp()
	switch {
	case n.dead.Load():
		c.run.count("dial: unknown")
	case err == nil && found != (bus.SessionID{}):
		o.got = attached
		c.mu.Lock()
		c.found[o] = found
		c.mu.Unlock()
		c.record(o)
	case errors.Is(err, ErrNoServer):
		o.got = noServer
		c.record(o)
	case errors.Is(err, ErrNotReady):
		c.run.count("dial: not ready")
		return err
	default:
		c.run.count("dial: unknown")
	}
	return nil
}

func (r *round) record(o *operation) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.history.ops = append(r.history.ops, o)
}

// dialEverywhere dials on every node, when all is settled.
func (r *round) dialEverywhere() {
	for i, n := range r.run.nodes {
		c := &client{round: r, number: len(r.run.nodes) + i}
		if err := c.dial(n, true); err != nil {
			r.run.t.Errorf("dial %s on %s, all settled: %v", r.history.serverID, n.name, err)
		}
	}
}

// agrees reports whether each entry of the KV names what its node holds, and each
// node holds nothing else.
func (run *historyRun) agrees() bool {
	alive := make(map[bus.NodeID]*historyNode)
	for _, n := range run.nodes {
		alive[n.id] = n
	}
	named := make(map[string]bus.SessionID)
	agree := true
	kv := run.nodes[0].presence
	now, versionErr := kv.version(run.t.Context())
	keys, keysErr := kv.keys(run.t.Context())
	found, err := kv.getMany(run.t.Context(), keys, now.last)
	err = errors.Join(err, versionErr, keysErr)
	for key, rec := range found {
		if !rec.exists {
			continue
		}
		e, ok := entryOf(rec)
		n := alive[e.Node]
		agree = agree && ok && n != nil && n.holdingOf(e.Session) != nil
		named[key] = e.Session
	}
	for _, n := range run.nodes {
		n.mu.Lock()
		for _, h := range n.current {
			agree = agree && named[h.key()] == h.session
		}
		n.mu.Unlock()
	}
	return err == nil && agree
}

// complete adds to the history what was written: what it means is known now.
func (r *round) complete() {
	h := &r.history
	claimOf := make(map[string]*operation)
	for _, o := range h.ops {
		if o.do == claims {
			claimOf[o.of.name] = o
		}
	}
	whose := make(map[bus.SessionID]*tenure)
	for _, w := range r.writes {
		claim := claimOf[w.e.Version]
		t := claim.of
		whose[w.e.Session] = t
		o := &operation{span: w.span, client: claim.client, at: w.at, of: t, got: done}
		if w.err != nil {
			o.got = unknown
		}
		var refused *jetstream.APIError
		switch own := w.at == t.at; {
		case errors.Is(w.err, errLost), errors.As(w.err, &refused): // error 10164 too: what is unknown is the write before
		case own && w.e.State == stateHeld && w.from < claim.to:
			t.wrote = true
		case own && w.e.State == stateHeld:
			o.do = registers
			h.ops = append(h.ops, o)
		case !own && w.e.State == stateGrace:
			o.do = reaps
			h.ops = append(h.ops, o)
		}
	}
	for o, session := range r.found {
		o.of = whose[session]
	}
}

// judge fails the test for each history that is not legal, and if the faults did not
// meet the calls in all the ways that the model knows and that a run should have.
func (run *historyRun) judge() {
	t := run.t
	t.Helper()
	var wrong []*violation
	ops := 0
	eachOf(run.all(), len(run.nodes), func(r *round) {
		r.complete()
		rows, why := r.history.judge()
		run.mu.Lock()
		defer run.mu.Unlock()
		ops += len(r.history.ops)
		if why != nil {
			wrong = append(wrong, why)
		}
		for _, by := range rows {
			run.tally[string(by)]++
		}
	})
	t.Logf("%d rounds, %d operations, %d faults, %.0f s", len(run.rounds), ops, run.faults, run.now().Seconds())
	if len(run.rounds) < historyRounds {
		t.Errorf("%d rounds, want at least %d", len(run.rounds), historyRounds)
	}
	for _, what := range slices.Sorted(maps.Keys(run.tally)) {
		t.Logf("%6d %s", run.tally[what], what)
	}
	for _, v := range wrong[:min(3, len(wrong))] {
		t.Errorf("seed %d, %s", run.seed, v.report())
	}
	if len(wrong) > 0 {
		t.Errorf("%d of %d histories are not legal", len(wrong), len(run.rounds))
	}
	for _, by := range []row{
		claimFree, claimInGrace, claimTakeover, conflictHeld, releaseHeld, evictPast,
		attachedHeld, attachedInGrace, noneFree, noneGraceOver, noneSilent,
	} {
		if run.tally[string(by)] == 0 {
			t.Errorf("no round had %q, want some: the faults did not meet the calls", by)
		}
	}
}
