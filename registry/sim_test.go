package registry

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
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

// simConfig has short times where nothing depends on them: each second costs 3 nodes'
// doings.
var simConfig = Config{Grace: 8 * time.Second, ProbeTimeout: 4 * time.Second}.withDefaults()

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
//   - a phone is told 4404 only if the KV does not name its session any more, or its
//     node is dead or was silent for long enough
//   - every call ends within its bound
//   - in the end nothing is left of binaries that have gone, every phone is on a
//     session that is there, and claims and dials succeed on every node
//
// The schedules are played in two halves, one for each of two CPUs.
func TestSimulation(t *testing.T) { // alone: it takes both cores
	checks := flag.Lookup("rapid.checks")
	if checks.Value.String() == checks.DefValue {
		if err := checks.Value.Set("1000"); err != nil {
			t.Fatal(err)
		}
	}
	for _, half := range []string{"First", "Second"} {
		t.Run(half, func(t *testing.T) {
			t.Parallel()
			total := make(tally)
			rapid.Check(t, func(rt *rapid.T) {
				seed := rapid.Uint64().Draw(rt, "seed")
				steps := rapid.SliceOfN(rapid.Custom(drawStep), 1, 30).Draw(rt, "steps")
				if rapid.Bool().Draw(rt, "begun") { // half of them with somebody to lose
					steps = append([]step{{Do: "claim", Node: 1}, {After: 500 * time.Millisecond, Do: "dial", Node: 2}, {Do: "dial", Node: 1}}, steps...)
				}
				broken := ""
				synctest.Test(t, func(*testing.T) {
					w := newSimWorld(seed)
					w.run(seed, steps)
					total.add(w.outcomes)
					if len(w.broken) > 0 {
						broken = strings.Join(w.broken, "\n") + "\n" + w.history.String()
					}
				})
				if broken != "" {
					rt.Fatal(broken)
				}
			})
			total.want(t)
		})
	}
}

// tally counts how calls ended, and what phones were told. Owned by one goroutine.
type tally map[string]int

func (c tally) add(more map[string]int) {
	c["schedules"]++
	for what, n := range more {
		c[what] += n
	}
}

// want fails the test if something happened in almost no schedule: then there was
// nothing to check.
func (c tally) want(t *testing.T) {
	t.Helper()
	t.Logf("outcomes: %v", c)
	for what, least := range map[string]float64{
		"claim: ok": 1, "claim: " + ErrServerIDConflict.Error(): 0.1, "claim: " + ErrUndecided.Error(): 0.01,
		"dial: ok": 0.5, "dial: " + ErrNoServer.Error(): 0.1, "dial: " + ErrNotReady.Error(): 0.01,
		"end: " + bus.ErrReclaimed.Error(): 0.05, "end: " + bus.ErrGraceOver.Error(): 0.01, "end: " + bus.ErrNodeGone.Error(): 0.005,
	} {
		if got := float64(c[what]) / float64(c["schedules"]); got < least {
			t.Errorf("%q: %d times in %d schedules, want at least %v in each", what, c[what], c["schedules"], least)
		}
	}
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
		"split", "move", "held", "away", "election", "rough", "nats down", "wipe", "kill", "dial once ready",
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
		ID: rapid.IntRange(0, len(simIDs)-1).Draw(t, "id"), For: ms("for", rapid.SampledFrom([]int{35_000, 10_000, 10_000}).Draw(t, "longest")),
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
	dialled  int
	phones   []*simPhone            // that were attached and have not hung up
	commits  map[string][]simCommit // by key
	faults   int                    // under way
	calmAt   time.Time              // end of the latest
	stopping bool                   // all is over: what ends now ends with its node
	outcomes map[string]int         // of calls and of phones, while steps are played
	counted  bool
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

// simPhone is a phone, and the bus.Receiver of its link.
type simPhone struct {
	w        *simWorld
	id       string
	serverID string
	at       *simNode
	link     *bus.Link

	// Guarded by simWorld.mu.
	attached time.Time // zero: not yet
	over     bool      // it has hung up, or was told of its end
}

func (b *simBinary) ConnID() string    { return b.id }
func (b *simBinary) Send([]byte) error { return nil }
func (b *simBinary) Close()            {}
func (p *simPhone) ConnID() string     { return p.id }
func (p *simPhone) Send([]byte) error  { return nil }
func (p *simPhone) Close()             {}

func newSimWorld(seed uint64) *simWorld {
	w := &simWorld{start: time.Now(), net: newSimNet(seed), cluster: &simCluster{}, commits: make(map[string][]simCommit), outcomes: make(map[string]int)}
	w.calmAt = w.start
	w.nodesKV = newSimStore(w.net, w.cluster, simConfig.LeaseTTL)
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
	n.Registry = newOver(bus.NewOver(n.port, id, bus.Config{}, log), simConfig, log,
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
func (w *simWorld) run(seed uint64, steps []step) {
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
	w.calm(seed%8 == 0)
	w.mu.Lock()
	w.counted = true
	w.mu.Unlock()
	w.checkEnd()
	stop()
	watch.Wait()
	w.mu.Lock()
	w.stopping = true
	w.mu.Unlock()
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
		w.sleep(20 * simDelay)
	}
}

func (w *simWorld) sleep(d time.Duration) { time.Sleep(d) } //nolint:forbidigo // virtual time

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
		p.over = true
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

// A pong takes its time: other claims come meanwhile.
const pingLeast, pingMost = 50 * time.Millisecond, 500 * time.Millisecond

func (b *simBinary) ping(ctx context.Context) error {
	sent := time.Now()
	if !pause(ctx, pingLeast+b.w.net.upTo(pingMost-pingLeast)) {
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
func (w *simWorld) claim(n *simNode, serverID string) (*simBinary, error) {
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
	w.mu.Lock()
	defer w.mu.Unlock()
	w.noteLocked("%s claimed: %v", b.id, err)
	w.countLocked("claim", err)
	return b, err
}

// countLocked counts how a call ended, by the error of the registry.
func (w *simWorld) countLocked(call string, err error) {
	if w.counted {
		return
	}
	how := "ok"
	for _, e := range []error{ErrNoServer, ErrServerIDConflict, ErrUndecided, ErrNotReady, bus.ErrReclaimed, bus.ErrGraceOver, bus.ErrNodeGone} {
		if errors.Is(err, e) {
			how = e.Error()
		}
	}
	w.outcomes[call+": "+how]++
}

// dial is a phone that dials n.
func (w *simWorld) dial(n *simNode, serverID string) {
	called := time.Now()
	w.mu.Lock()
	w.dialled++
	p := &simPhone{w: w, id: fmt.Sprintf("p%d", w.dialled), serverID: serverID, at: n}
	w.mu.Unlock()
	p.link = n.Bus().NewLink(serverID, p.id, p)
	err := n.RegisterPhone(serverID, p, WithLink(p.link))
	session := p.link.Session()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.noteLocked("%s dialled %s on %s since %.3f: %v", p.id, serverID, n.port.id, called.Sub(w.start).Seconds(), err)
	w.countLocked("dial", err)
	if took := time.Since(called); took > decideTimeout+3*simDelay {
		w.breakLocked("dial took %s", took)
	}
	w.checkDecisionLocked(n, err)
	switch {
	case err == nil:
		p.attached = called
		w.phones = append(w.phones, p)
		w.checkAttachedLocked(n, serverID, session, called)
	case errors.Is(err, ErrNoServer):
		for _, b := range w.binaries {
			if b.serverID == serverID && (w.reachableLocked(n, b, called) || w.ownLocked(n, b, called)) {
				w.breakLocked("false 4404: dial of %s on %s since %.3f, held by %s on %s",
					serverID, n.port.id, called.Sub(w.start).Seconds(), b.id, b.at.port.id)
			}
		}
	}
}

// simReceiver is a phone whose end nobody asks about.
type simReceiver struct{}

func (simReceiver) Deliver(l *bus.Link, p []byte) { l.Consumed(1, len(bus.Frame(p))) }
func (simReceiver) End(*bus.Link, error)          {}

// Deliver implements bus.Receiver.
func (p *simPhone) Deliver(l *bus.Link, buf []byte) { l.Consumed(1, len(bus.Frame(buf))) }

// End implements bus.Receiver.
func (p *simPhone) End(l *bus.Link, err error) {
	p.w.holdKV.truth(bus.EncodeToken(p.serverID)) // brings it up to now
	session := l.Session()
	p.w.mu.Lock()
	defer p.w.mu.Unlock()
	if p.over || p.w.stopping {
		return
	}
	p.over = true
	p.w.noteLocked("%s is told: %v", p.id, err)
	p.w.countLocked("end", err)
	p.w.checkToldLocked(p, session, err)
}
