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

type simReceiver struct{}

func (simReceiver) Deliver(l *bus.Link, p []byte) { l.Consumed(len(p)) }
func (simReceiver) End(*bus.Link, error)          {}
