package registry

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/pyrycode/pyrycode-relay/bus"
)

// simSettle is how long after the end of all faults a registry may need to put
// things right: a renewal, one sweep, and the calls that they make.
const simSettle = leaseRetry + kvTimeout + sweepEvery + time.Second

// TestSimulation runs three nodes in virtual time over a NATS and a KV that fail as
// the real ones were measured to. Whatever happens:
//
//   - a binary whose claim succeeded was named by the KV during the call
//   - ErrServerIDConflict comes after a pong to a ping sent after the claim began
//   - nobody takes the place of a living binary that answers pings, unless its node
//     could not be heard, or has lost its lease
//   - ErrNoServer is not said of a binary that the KV names and that the phone's
//     node could reach
//   - a phone is attached to the session that the KV names
//   - a connected binary is in the KV, or is closed, simSettle after the last fault
//   - every call ends within its bound
//   - in the end nothing is left of binaries that have gone
func TestSimulation(t *testing.T) {
	t.Parallel()
	checks := flag.Lookup("rapid.checks")
	if checks.Value.String() == checks.DefValue {
		if err := checks.Value.Set("2000"); err != nil {
			t.Fatal(err)
		}
	}
	rapid.Check(t, func(rt *rapid.T) {
		seed := rapid.Uint64().Draw(rt, "seed")
		steps := rapid.SliceOfN(rapid.Custom(drawStep), 1, 30).Draw(rt, "steps")
		broken := ""
		synctest.Test(t, func(*testing.T) {
			w := newSimWorld(seed)
			w.run(steps)
			if len(w.broken) > 0 {
				broken = strings.Join(w.broken, "\n") + "\n" + w.history.String()
			}
		})
		if broken != "" {
			rt.Fatal(broken)
		}
	})
}

// step is one thing that happens, some time after the one before.
type step struct {
	After time.Duration
	Do    string
	Node  int // index of a node
	ID    int // index of a server-id
	For   time.Duration
	A, B  bool
}

var (
	simIDs  = []string{"one", "two.*"}
	simDeed = []string{
		"claim", "claim", "claim", "dial", "dial", "dial", "release", "mute", "hang up",
		"split", "move", "held", "away", "election", "rough", "nats down", "wipe", "kill",
	}
)

func drawStep(t *rapid.T) step {
	ms := func(name string, most int) time.Duration {
		return time.Duration(rapid.IntRange(0, most).Draw(t, name)) * time.Millisecond
	}
	after := ms("after", 3000)
	if rapid.IntRange(0, 3).Draw(t, "at once") == 0 {
		after /= 500
	}
	return step{
		After: after, Do: rapid.SampledFrom(simDeed).Draw(t, "do"), Node: rapid.IntRange(0, 2).Draw(t, "node"),
		ID: rapid.IntRange(0, len(simIDs)-1).Draw(t, "id"), For: ms("for", 35_000),
		A: rapid.Bool().Draw(t, "a"), B: rapid.Bool().Draw(t, "b"),
	}
}

// simWorld is the cluster, and what is known about it from outside.
type simWorld struct {
	start           time.Time
	net             *simNet
	cluster         *simCluster
	nodesKV, holdKV *simStore

	mu       sync.Mutex
	nodes    [3]*simNode // the living ones
	started  int
	down     bool // all of NATS
	busy     int  // tasks under way
	all      []*simNode
	binaries []*simBinary
	phones   []*simPhone
	commits  map[string][]simCommit // by key
	faults   int                    // under way
	calmAt   time.Time              // end of the latest
	broken   []string
	history  strings.Builder
}

type simCommit struct {
	at time.Time
	e  entry
	ok bool
}

type simNode struct {
	*Registry
	port *simPort

	// Guarded by simWorld.mu.
	dead bool
	cuts []interval // without a path to all of the others, or to the KV; to is zero while it lasts
	less []interval // of these, on the smaller side of a split
}

// simBinary is one connection of a binary.
type simBinary struct {
	id       string
	serverID string
	at       *simNode
	called   time.Time
	session  bus.SessionID

	// Guarded by simWorld.mu.
	w       *simWorld
	mute    bool
	muted   time.Time   // when that changed last
	pongs   []time.Time // when the pings were sent
	claimed time.Time   // zero: not yet
	gone    time.Time   // released or evicted; zero: connected
}

type simPhone struct {
	id       string
	serverID string
	at       *simNode
}

func (b *simBinary) ConnID() string    { return b.id }
func (b *simBinary) Send([]byte) error { return nil }
func (b *simBinary) Close()            {}
func (p *simPhone) ConnID() string     { return p.id }
func (p *simPhone) Send([]byte) error  { return nil }
func (p *simPhone) Close()             {}

func newSimWorld(seed uint64) *simWorld {
	w := &simWorld{start: time.Now(), net: newSimNet(seed), cluster: &simCluster{}, commits: make(map[string][]simCommit)}
	w.calmAt = w.start
	w.nodesKV = newSimStore(w.net, w.cluster, Config{}.withDefaults().LeaseTTL)
	w.holdKV = newSimStore(w.net, w.cluster, 0)
	w.holdKV.wrote = func(key string, rec record) {
		e, ok := entryOf(rec)
		w.mu.Lock()
		defer w.mu.Unlock()
		w.commits[key] = append(w.commits[key], simCommit{time.Now(), e, ok})
		w.noteLocked("KV %s: %s", key, short(e, ok))
	}
	return w
}

func short(e entry, ok bool) string {
	if !ok {
		return "nothing"
	}
	return fmt.Sprintf("%s by %.4x on %s", e.State, e.Session[:2], e.Node)
}

func (w *simWorld) noteLocked(format string, v ...any) {
	fmt.Fprintf(&w.history, "%9.3f ", time.Since(w.start).Seconds())
	fmt.Fprintf(&w.history, format+"\n", v...)
}

func (w *simWorld) note(format string, v ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.noteLocked(format, v...)
}

// breakLocked notes a broken promise.
func (w *simWorld) breakLocked(format string, v ...any) {
	w.broken = append(w.broken, fmt.Sprintf("%.3f ", time.Since(w.start).Seconds())+fmt.Sprintf(format, v...))
}

// startNode starts a node in slot i.
func (w *simWorld) startNode(i int) {
	w.mu.Lock()
	w.started++
	id, down := bus.NodeID(fmt.Sprintf("n%d-%d", i, w.started)), w.down
	w.mu.Unlock()
	n := &simNode{port: w.net.port(id)}
	if down {
		n.port.setState(portAway)
		n.cuts = append(n.cuts, interval{from: time.Now()})
	}
	log := slog.New(slog.DiscardHandler)
	n.Registry = newOver(bus.NewOver(n.port, id, bus.Config{}, log), Config{}.withDefaults(), log,
		simBucket{w.nodesKV, n.port}, simBucket{w.holdKV, n.port})
	w.mu.Lock()
	defer w.mu.Unlock()
	w.nodes[i] = n
	w.all = append(w.all, n)
	if err := n.Start(); err != nil {
		w.breakLocked("start: %v", err)
	}
}

// run plays the steps, lets all faults end, and looks at what is left.
func (w *simWorld) run(steps []step) {
	for i := range w.nodes {
		w.startNode(i)
	}
	w.sleep(time.Second)
	watching, stop := context.WithCancel(context.Background())
	var watch sync.WaitGroup
	watch.Go(func() {
		for pause(watching, time.Second) {
			w.checkRegistered()
		}
	})
	for _, s := range steps {
		w.sleep(s.After)
		w.do(s)
	}
	w.await()
	w.sleep(simSettle)
	w.checkRegistered()
	w.sleep(2*Config{}.withDefaults().LeaseTTL + 2*sweepEvery + Config{}.withDefaults().Grace)
	w.checkEnd()
	stop()
	watch.Wait()
	for _, n := range w.all {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		n.Stop(ctx)
		cancel()
	}
}

// spawn runs f beside the steps.
func (w *simWorld) spawn(f func()) {
	w.mu.Lock()
	w.busy++
	w.mu.Unlock()
	go func() {
		f()
		w.mu.Lock()
		w.busy--
		w.mu.Unlock()
	}()
}

// await returns when no task is under way.
func (w *simWorld) await() {
	for {
		w.mu.Lock()
		busy := w.busy
		w.mu.Unlock()
		if busy == 0 {
			return
		}
		w.sleep(simDelay)
	}
}

func (w *simWorld) sleep(d time.Duration) { time.Sleep(d) } //nolint:forbidigo // virtual time

// fault has begin happen now, and end after d.
func (w *simWorld) fault(s step, d time.Duration, nodes []*simNode, smaller bool, begin, end func()) {
	w.mu.Lock()
	w.noteLocked("%s node %d for %s %v %v", s.Do, s.Node, d, s.A, s.B)
	w.faults++
	now := time.Now()
	for _, n := range nodes {
		n.cuts = append(n.cuts, interval{from: now})
		if smaller {
			n.less = append(n.less, interval{from: now})
		}
	}
	w.mu.Unlock()
	begin()
	w.spawn(func() {
		w.sleep(d)
		end()
		w.mu.Lock()
		defer w.mu.Unlock()
		w.noteLocked("end of %s node %d", s.Do, s.Node)
		w.faults--
		w.calmAt = time.Now()
		for _, n := range nodes {
			n.cuts = closed(n.cuts, now)
			n.less = closed(n.less, now)
		}
	})
}

// closed ends the interval of list that began at from.
func closed(list []interval, from time.Time) []interval {
	for i := range list {
		if list[i].from.Equal(from) && list[i].to.IsZero() {
			list[i].to = time.Now()
			break
		}
	}
	return list
}

func (w *simWorld) do(s step) {
	w.mu.Lock()
	n := w.nodes[s.Node]
	everybody := slices.Clone(w.nodes[:])
	w.mu.Unlock()
	serverID := simIDs[s.ID]
	switch s.Do {
	case "claim":
		w.spawn(func() { w.claim(n, serverID) })
	case "dial":
		w.spawn(func() { w.dial(n, serverID) })
	case "release":
		if b := w.connected(serverID, s.A); b != nil {
			w.leave(b, "release")
		}
	case "mute":
		if b := w.connected(serverID, s.A); b != nil {
			w.mu.Lock()
			b.mute, b.muted = !b.mute, time.Now()
			w.noteLocked("mute %s: %v", b.id, b.mute)
			w.mu.Unlock()
		}
	case "hang up":
		if p := w.takePhone(); p != nil {
			w.spawn(func() { p.at.UnregisterPhone(p.serverID, p.id) })
		}
	case "split":
		w.split(s, n)
	case "move":
		w.move(s, n)
	case "held": // noticed after two pings, at most
		w.fault(s, s.For, []*simNode{n}, false,
			func() {
				n.port.setState(portHeld)
				w.spawn(func() {
					w.sleep(min(s.For, 6*time.Second))
					n.port.setStateIf(portHeld, portAway)
				})
			},
			func() { n.port.setState(portLinked) })
	case "away":
		w.fault(s, s.For/8, []*simNode{n}, false,
			func() { n.port.setState(portAway) }, func() { n.port.setState(portLinked) })
	case "election":
		w.fault(s, s.For/4, nil, false, func() { w.stall(s.For / 4) }, func() {})
	case "rough":
		w.fault(s, s.For, nil, false,
			func() { w.setRough(20) }, func() { w.setRough(0) })
	case "nats down":
		w.fault(s, s.For, everybody, false,
			func() {
				w.stall(s.For)
				w.setDown(true)
			},
			func() {
				if s.A { // it had its store in memory
					w.nodesKV.wipe()
					w.holdKV.wipe()
				}
				w.setDown(false)
				for _, n := range everybody { // not all at once
					w.fault(step{Do: "late", Node: s.Node}, w.net.upTo(3*time.Second), []*simNode{n}, false,
						func() { n.port.setState(portAway) }, func() { n.port.setState(portLinked) })
					w.spawn(func() { // and those who lost their connections meanwhile are there at once
						w.sleep(w.net.upTo(3 * time.Second))
						w.dial(n, serverID)
						w.claim(n, serverID)
					})
				}
			})
	case "wipe":
		w.fault(s, 0, nil, false, func() {
			if s.A || s.B {
				w.holdKV.wipe()
			}
			if !s.A || !s.B {
				w.nodesKV.wipe()
			}
		}, func() {})
	case "kill":
		w.kill(s, n)
	}
}

func (p *simPort) setStateIf(is, to portState) {
	p.net.mu.Lock()
	defer p.net.mu.Unlock()
	if p.state == is {
		p.state = to
	}
}

// setDown cuts all nodes off, those that start meanwhile too, or lets them back.
func (w *simWorld) setDown(down bool) {
	w.mu.Lock()
	w.down = down
	nodes := slices.Clone(w.all)
	w.mu.Unlock()
	state := portLinked
	if down {
		state = portAway
	}
	for _, n := range nodes {
		n.port.setState(state)
	}
}

func (w *simWorld) stall(d time.Duration) {
	w.cluster.mu.Lock()
	defer w.cluster.mu.Unlock()
	w.cluster.stalls = append(w.cluster.stalls, interval{time.Now(), time.Now().Add(d)})
}

func (w *simWorld) setRough(percent int) {
	w.cluster.mu.Lock()
	defer w.cluster.mu.Unlock()
	w.cluster.rough = percent
}

// split puts n's server on a side of its own. With A, the leader is there too.
func (w *simWorld) split(s step, n *simNode) {
	w.net.mu.Lock()
	already := w.net.split
	w.net.mu.Unlock()
	if already {
		return
	}
	w.fault(s, s.For, []*simNode{n}, true,
		func() {
			w.cluster.mu.Lock()
			w.cluster.splitAt = time.Now()
			if s.A {
				w.cluster.oldLeads = time.Now().Add(12500*time.Millisecond + w.net.upTo(20*time.Second))
			}
			w.cluster.mu.Unlock()
			if s.A {
				w.stall(min(s.For, 4*time.Second+w.net.upTo(5*time.Second)))
			}
			w.net.mu.Lock()
			w.net.split, w.net.closed = true, s.B
			w.net.minority = map[bus.NodeID]bool{n.port.id: true}
			w.net.changedLocked()
			w.net.mu.Unlock()
		},
		func() {
			w.cluster.mu.Lock()
			w.cluster.healedAt, w.cluster.oldLeads = time.Now(), time.Time{}
			w.cluster.mu.Unlock()
			w.net.mu.Lock()
			w.net.split = false
			w.net.changedLocked()
			w.net.mu.Unlock()
			n.port.disturb()
		})
}

// move has n change to a server of the smaller side, which knows less than n does,
// until the split heals.
func (w *simWorld) move(s step, n *simNode) {
	w.net.mu.Lock()
	split := w.net.split && !w.net.minority[n.port.id]
	w.net.mu.Unlock()
	if !split {
		return
	}
	w.fault(s, s.For, []*simNode{n}, true,
		func() {
			w.net.mu.Lock()
			w.net.minority[n.port.id] = true
			w.net.changedLocked()
			w.net.mu.Unlock()
			n.port.disturb()
		},
		func() {
			w.net.mu.Lock()
			delete(w.net.minority, n.port.id)
			w.net.changedLocked()
			w.net.mu.Unlock()
			n.port.disturb()
		})
}

func (p *simPort) disturb() {
	p.net.mu.Lock()
	tell := p.disturbed
	p.net.mu.Unlock()
	for _, f := range tell {
		f()
	}
}

// kill ends n as SIGKILL would, and starts another in its place.
func (w *simWorld) kill(s step, n *simNode) {
	n.port.setState(portDead)
	w.mu.Lock()
	n.dead = true
	w.noteLocked("kill %s", n.port.id)
	for _, b := range w.binaries {
		if b.at == n && b.gone.IsZero() {
			b.gone = time.Now()
		}
	}
	w.mu.Unlock()
	w.sleep(s.For / 100)
	w.startNode(s.Node)
}

// connected returns a binary of serverID that is; the newest, or the oldest.
func (w *simWorld) connected(serverID string, newest bool) (found *simBinary) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, b := range w.binaries {
		if b.serverID == serverID && !b.claimed.IsZero() && b.gone.IsZero() && !b.at.dead {
			found = b
			if !newest {
				break
			}
		}
	}
	return found
}

// takePhone takes the phone that has been attached for longest off the list.
func (w *simWorld) takePhone() (p *simPhone) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.phones) > 0 {
		p, w.phones = w.phones[0], w.phones[1:]
	}
	return p
}

// leave ends b's connection, for whatever reason.
func (w *simWorld) leave(b *simBinary, why string) {
	w.mu.Lock()
	first := b.gone.IsZero()
	if first {
		b.gone = time.Now()
		w.noteLocked("%s %s", why, b.id)
	}
	w.mu.Unlock()
	if first {
		w.spawn(func() { b.at.ReleaseServer(b.serverID, b) })
	}
}

// evicted is told when b's node takes it for displaced.
func (w *simWorld) evicted(b *simBinary) {
	w.holdKV.truth(b.serverID) // brings it up to now
	w.mu.Lock()
	if c := w.commits[bus.EncodeToken(b.serverID)]; len(c) > 0 && c[len(c)-1].e.Session == b.session && b.gone.IsZero() {
		w.breakLocked("%s evicted, and the KV names it", b.id)
	}
	w.mu.Unlock()
	w.leave(b, "evicted")
}

func (b *simBinary) ping(ctx context.Context) error {
	sent := time.Now()
	if !pause(ctx, simDelay) {
		return ctx.Err()
	}
	b.w.mu.Lock()
	mute := b.mute || !b.gone.IsZero()
	if !mute {
		b.pongs = append(b.pongs, sent)
	}
	b.w.mu.Unlock()
	if mute {
		<-ctx.Done()
		return ctx.Err()
	}
	return nil
}

// claim is a binary that dials n: once without a probe, then parked.
func (w *simWorld) claim(n *simNode, serverID string) {
	w.mu.Lock()
	b := &simBinary{id: fmt.Sprintf("b%d", len(w.binaries)), serverID: serverID, at: n, w: w}
	w.binaries = append(w.binaries, b)
	w.noteLocked("%s claims %s on %s", b.id, serverID, n.port.id)
	w.mu.Unlock()
	opts := []Option{WithPing(b.ping), OnEvict(func(error) { w.evicted(b) })}
	err := w.claimOnce(b, decideTimeout, append(opts, WithoutProbe())...)
	if errors.Is(err, ErrHeld) {
		err = w.claimOnce(b, max(parkTimeout, n.ProbeTimeout()+kvTimeout), opts...)
	}
	w.note("%s claimed: %v", b.id, err)
}

func (w *simWorld) claimOnce(b *simBinary, bound time.Duration, opts ...Option) error {
	b.called = time.Now()
	err := b.at.ClaimServer(b.serverID, b, opts...)
	h := b.at.localHolding(b.serverID)
	w.mu.Lock()
	defer w.mu.Unlock()
	if took := time.Since(b.called); took > bound+simDelay {
		w.breakLocked("%s: claim took %s, bound %s", b.id, took, bound)
	}
	switch {
	case err == nil && b.gone.IsZero():
		b.claimed = time.Now()
		if h == nil || h.conn != b {
			w.breakLocked("%s: claim succeeded, and the node does not hold it", b.id)
			return err
		}
		b.session = h.session
		w.checkTakeoverLocked(b)
		if !w.namedLocked(b.serverID, b.session, b.called, time.Now()) {
			w.breakLocked("%s: claim succeeded, and the KV did not name it", b.id)
		}
	case errors.Is(err, ErrServerIDConflict):
		if !w.pongSinceLocked(b) {
			w.breakLocked("%s: false 4409: no pong since the claim began", b.id)
		}
	}
	return err
}

// checkDecisionLocked: a node that cannot have renewed its lease for too long says
// nothing about who is there.
func (w *simWorld) checkDecisionLocked(n *simNode, err error) {
	if !errors.Is(err, ErrNoServer) {
		return // a conflict has its pong
	}
	n.port.net.mu.Lock()
	off := n.port.off
	n.port.net.mu.Unlock()
	if !off.IsZero() && time.Since(off) > n.cfg.freshFor()+simDelay {
		w.breakLocked("%s, cut off for %s, says: %v", n.port.id, time.Since(off), err)
	}
}

// checkTakeoverLocked looks at whom b has displaced.
func (w *simWorld) checkTakeoverLocked(b *simBinary) {
	var before simCommit
	var at time.Time
	for _, c := range w.commits[bus.EncodeToken(b.serverID)] {
		if c.ok && c.e.Session == b.session {
			at = c.at
			break
		}
		before = c
	}
	if !before.ok || before.e.State != stateHeld {
		return
	}
	for _, old := range w.binaries {
		if old.session != before.e.Session || old.mute || old.muted.After(b.called) || old.at.dead || !old.gone.IsZero() && old.gone.Before(at) {
			continue
		}
		leaseGone := !w.nodesKV.truth(string(old.at.port.id)).exists && b.at.unbrokenFor() >= b.at.cfg.LeaseTTL
		if b.at.port.deafTo(old.at.port.id, b.called) < 2 && !leaseGone {
			w.breakLocked("%s took %s from %s, which is alive, on %s", b.id, b.serverID, old.id, old.at.port.id)
		}
	}
}

func (w *simWorld) pongSinceLocked(b *simBinary) bool {
	for _, other := range w.binaries {
		if other == b || other.serverID != b.serverID {
			continue
		}
		for _, sent := range other.pongs {
			if !sent.Before(b.called) {
				return true
			}
		}
	}
	return false
}

// namedLocked reports whether the KV named session at some time in the interval.
func (w *simWorld) namedLocked(serverID string, session bus.SessionID, from, to time.Time) bool {
	named := false
	for _, c := range w.commits[bus.EncodeToken(serverID)] {
		if c.at.After(to) {
			break
		}
		named = c.ok && c.e.Session == session || named && c.at.After(from) && c.at.Before(to)
	}
	return named
}

// heldThroughoutLocked reports whether the KV named session all the time from from
// until now.
func (w *simWorld) heldThroughoutLocked(serverID string, session bus.SessionID, from time.Time) bool {
	held := false
	for _, c := range w.commits[bus.EncodeToken(serverID)] {
		is := c.ok && c.e.Session == session
		if !c.at.After(from) {
			held = is
		} else if !is {
			return false
		}
	}
	return held
}

// dial is a phone that dials n.
func (w *simWorld) dial(n *simNode, serverID string) {
	called := time.Now()
	p := &simPhone{id: fmt.Sprintf("p-%p", &called), serverID: serverID, at: n}
	link := n.Bus().NewLink(serverID, p.id, simReceiver{})
	err := n.RegisterPhone(serverID, p, WithLink(link))
	w.mu.Lock()
	defer w.mu.Unlock()
	w.noteLocked("dial %s on %s since %.3f: %v", serverID, n.port.id, called.Sub(w.start).Seconds(), err)
	if took := time.Since(called); took > decideTimeout+simDelay {
		w.breakLocked("dial took %s", took)
	}
	w.checkDecisionLocked(n, err)
	switch {
	case err == nil:
		w.phones = append(w.phones, p)
		w.checkAttachedLocked(n, serverID, link.Session(), called)
	case errors.Is(err, ErrNoServer):
		for _, b := range w.binaries {
			if b.serverID == serverID && w.reachableLocked(n, b, called) {
				w.breakLocked("false 4404: dial of %s on %s since %.3f, held by %s on %s",
					serverID, n.port.id, called.Sub(w.start).Seconds(), b.id, b.at.port.id)
			}
		}
	}
}

// reachableLocked reports whether n could have found b all the time since from.
func (w *simWorld) reachableLocked(n *simNode, b *simBinary, from time.Time) bool {
	if b.claimed.IsZero() || b.claimed.After(from) || !b.gone.IsZero() || b.at.dead || n.dead ||
		!w.heldThroughoutLocked(b.serverID, b.session, from) {
		return false
	}
	const silence = deadAfter - 2*retryWaitMax // about what proves a node dead
	if longest(n.less, from) > 0 {
		return false // it may have asked the old leader of the smaller side
	}
	return n == b.at || longest(append(append([]interval(nil), n.cuts...), b.at.cuts...), from) < silence
}

// longest is the longest of the intervals since from, as far as they overlap with
// it; intervals that touch count as one.
func longest(list []interval, from time.Time) (most time.Duration) {
	var sum time.Duration
	for _, i := range list {
		to := i.to
		if to.IsZero() {
			to = time.Now()
		}
		if begin := later(i.from, from); to.After(begin) {
			sum += to.Sub(begin)
		}
	}
	return sum
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// checkAttachedLocked: a phone whose node could see it is bound to the session that
// the KV names, or named a moment before the call.
func (w *simWorld) checkAttachedLocked(n *simNode, serverID string, session bus.SessionID, called time.Time) {
	before := called.Add(-100 * time.Millisecond)
	if w.faults > 0 || before.Sub(w.calmAt) < 6*time.Second { // a replica may lag for that long
		return
	}
	if !w.namedLocked(serverID, session, before, time.Now()) {
		w.breakLocked("phone on %s attached to session %.4x of %s, which the KV does not name", n.port.id, session[:2], serverID)
	}
}

type simReceiver struct{}

func (simReceiver) Deliver(l *bus.Link, p []byte) { l.Consumed(len(p)) }
func (simReceiver) End(*bus.Link, error)          {}

// checkRegistered: a binary that is connected is in the KV, if there has been no
// fault for long enough, unless it has just come or has just been displaced.
func (w *simWorld) checkRegistered() {
	for _, id := range simIDs {
		w.holdKV.truth(bus.EncodeToken(id)) // brings it up to now
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	since := time.Now().Add(-simSettle)
	if w.faults > 0 || w.calmAt.After(since) {
		return
	}
	for _, b := range w.binaries {
		if b.claimed.IsZero() || b.claimed.After(since) || !b.gone.IsZero() || b.at.dead {
			continue
		}
		if !w.namedLocked(b.serverID, b.session, since, time.Now()) {
			w.breakLocked("%s is connected to %s, and the KV has not named it for %s", b.id, b.at.port.id, simSettle)
			b.gone = time.Now() // told once
		}
	}
}

// checkEnd: after a long calm, the KV names whoever is connected and nobody else,
// every node finds them, and nobody can take their place.
func (w *simWorld) checkEnd() {
	for _, id := range simIDs {
		e, held := entryOf(w.holdKV.truth(bus.EncodeToken(id)))
		holder := w.connected(id, true)
		w.mu.Lock()
		if holder != nil {
			holder.mute = false
		}
		switch {
		case holder == nil && held:
			w.breakLocked("%s: %s is left, and nobody is connected", id, short(e, held))
		case holder != nil && (!held || e.State != stateHeld || e.Session != holder.session):
			w.breakLocked("%s: %s is connected, and the KV has %s", id, holder.id, short(e, held))
		}
		w.mu.Unlock()
		for _, n := range w.nodes {
			if holder == nil {
				continue
			}
			link := n.Bus().NewLink(id, fmt.Sprintf("last-%p", n), simReceiver{})
			if err := n.RegisterPhone(id, &simPhone{id: link.ConnID()}, WithLink(link)); err != nil || link.Session() != holder.session {
				w.mu.Lock()
				w.breakLocked("%s: dial on %s in the end: %v", id, n.port.id, err)
				w.mu.Unlock()
			}
			if err := n.ClaimServer(id, &simPhone{id: "rival"}); !errors.Is(err, ErrServerIDConflict) {
				w.mu.Lock()
				w.breakLocked("%s: rival claim on %s in the end: %v", id, n.port.id, err)
				w.mu.Unlock()
			}
		}
	}
}
