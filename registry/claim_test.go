package registry

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/pyrycode/pyrycode-relay/bus"
)

func TestFirstClaimWins(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		ns := s.three()
		first := ns[0].mustClaim("id")
		s.wantHolder(first)
		for i, n := range ns {
			before := first.pings.Load()
			_, err := n.claim("id", WithoutProbe())
			wantErr(t, fmt.Sprintf("claim without probe on node %d", i), err, ErrHeld)
			if got := first.pings.Load(); got != before {
				t.Errorf("claim without probe on node %d: %d pings, want none", i, got-before)
			}
			_, err = n.claim("id")
			wantErr(t, fmt.Sprintf("claim on node %d", i), err, ErrServerIDConflict)
			if got := first.pings.Load(); got != before+1 {
				t.Errorf("claim on node %d: %d pings, want 1", i, got-before)
			}
		}
		s.wantHolder(first)
		wantQuiet(t, "first binary evicted", first.evicted)
	})
}

func TestIncumbentWithoutPong_IsTakenOver(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		ns := s.three()
		for i, other := range ns[:2] {
			id := fmt.Sprint("id", i)
			first := ns[0].mustClaim(id)
			p := ns[2].mustDial(id)
			first.dead.Store(true)
			second := other.mustClaim(id)
			s.wantHolder(second)
			wantErr(t, "incumbent evicted", within(t, 2*time.Second, "eviction", first.evicted), ErrDisplaced)
			wantErr(t, "its phone", within(t, 2*time.Second, "end of the phone's link", p.in.ends), bus.ErrReclaimed)
			first.release() // as the evicted connection does when it ends
			s.wantHolder(second)
			wantQuiet(t, "a second eviction", first.evicted)
			ns[2].mustDial(id)
			if got := len(ns[2].PhonesFor(id)); got != 2 {
				t.Errorf("phones of %s: got %d, want the one that ended, not yet unregistered, and the new one", id, got)
			}
		}
	})
}

func TestClaimInGrace_SucceedsAtOnceAnywhere(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		s.cfg.Grace = 20 * time.Second
		ns := s.three()
		b := ns[0].mustClaim("id")
		for i, n := range []*node{ns[0], ns[1], ns[2], ns[0]} {
			b.release()
			start := time.Now()
			b = n.mustClaim("id", WithoutProbe())
			if d := time.Since(start); d > 2*slack {
				t.Errorf("reclaim %d took %s, want at once", i, d)
			}
			s.wantHolder(b)
			if m := s.raw("id"); m.Header.Get("Nats-TTL") != "" {
				t.Errorf("reclaim %d: held entry has TTL %s, want none", i, m.Header.Get("Nats-TTL"))
			}
		}
		eventually(t, 2*time.Second, "only the last node holds it", func() bool {
			return ns[1].localHolding("id") == nil && ns[2].localHolding("id") == nil
		})
	})
}

func TestClaimAfterGrace(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		s.cfg.Grace = time.Second
		ns := s.three()
		ns[0].mustClaim("id").release()
		eventually(t, 5*time.Second, "grace over", func() bool { _, ok := s.entry("id"); return !ok })
		s.wantHolder(ns[1].mustClaim("id", WithoutProbe()))
	})
}

// The claim's answer is lost, and then it finds its own entry.
func TestWriteTimedOutButCommitted_IsItsOwn(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		n := s.node()
		n.proxy.SetDelay(300 * time.Millisecond) // the answer is in the proxy when the observer sees the write
		var once sync.Once
		sub, err := s.nc.Subscribe("$KV."+s.cfg.KVPrefix+"_presence.id", func(*nats.Msg) {
			once.Do(func() {
				n.proxy.Hold()
				time.AfterFunc(kvTimeout+200*time.Millisecond, n.proxy.Resume)
			})
		})
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = sub.Unsubscribe() }()
		if err := s.nc.Flush(); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		b := n.mustClaim("id")
		if d := time.Since(start); d < kvTimeout {
			t.Fatalf("claim took %s: the fault did not happen", d)
		}
		s.wantHolder(b)
		if m := s.raw("id"); n.localHolding("id").revision != m.Sequence {
			t.Errorf("revision: got %d, want the KV's %d", n.localHolding("id").revision, m.Sequence)
		}
	})
}

func TestHolderNodeDead_ClaimTakesLessThanASecond(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		n := s.node()
		s.write("never", entry{Node: "gone-00000000", Session: bus.NewSessionID(), State: stateHeld}.encode())
		other := s.node()
		other.mustClaim("killed")
		other.kill()
		for _, id := range []string{"never", "killed"} {
			start := time.Now()
			b := n.mustClaim(id, WithoutProbe())
			if d := time.Since(start); d < deadCheckWait || d > time.Second {
				t.Errorf("claim %s took %s, want between %s and 1 s", id, d, deadCheckWait)
			}
			s.wantHolder(b)
		}
	})
}

// After a node's death everybody finds an entry in its way: whoever looks first saves a write.
func TestClaim_LooksFirstAfterOneThatHadBetter(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		n := s.node()
		n.cancel() // its own sweeps; its lease is fresh for as long as this takes
		n.tasks.Wait()
		kv := &countingKV{kv: n.presence}
		n.presence = kv
		for i := range 3 {
			s.write(fmt.Sprint("id", i), entry{Node: "gone-00000000", Session: bus.NewSessionID(), State: stateHeld}.encode())
		}
		for _, c := range []struct {
			id     string
			writes int32
		}{{"new0", 1}, {"id0", 2}, {"id1", 1}, {"id2", 1}, {"new1", 1}, {"new2", 1}, {"new3", 1}} {
			eventually(t, 10*time.Second, "an entry that the replicas have", func() bool {
				rec, err := kv.get(t.Context(), bus.EncodeToken(c.id))
				return err == nil && rec.exists == strings.HasPrefix(c.id, "id")
			})
			before, start := kv.writes.Load(), time.Now()
			b := n.mustClaim(c.id, WithoutProbe())
			if got := kv.writes.Load() - before; got != c.writes && time.Since(start) < kvTimeout { // no call was tried again
				t.Errorf("claim %s: %d writes, want %d", c.id, got, c.writes)
			}
			s.wantHolder(b)
		}
		if n.lookFirst.Load() {
			t.Error("looks first although nothing was in the way of the latest claim")
		}
	})
}

// instantKV takes every write at once.
type instantKV struct {
	kv
	revision atomic.Uint64
}

func (c *instantKV) put(context.Context, string, []byte, uint64, time.Duration) (uint64, error) {
	return c.revision.Add(1), nil
}

// Thousands of claims are answered at once on one processor: whoever else can run has a
// turn all the same.
func TestClaims_ACrowdYields(t *testing.T) {
	n := newScene(t, alone).node()
	n.cancel() // its own sweeps; its lease is fresh for as long as this takes
	n.tasks.Wait()
	n.presence = &instantKV{kv: n.presence}
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	const many = 2000
	var claimed atomic.Int64
	var all sync.WaitGroup
	begin := make(chan struct{})
	for i := range many {
		b := n.newBinary(fmt.Sprint("id", i))
		all.Go(func() {
			<-begin
			wantErr(t, b.serverID, b.claim(), nil)
			claimed.Add(1)
		})
	}
	runtime.Gosched() // all wait
	close(begin)
	most := int64(0)
	for before := int64(0); before < many; {
		runtime.Gosched()
		now := claimed.Load()
		before, most = now, max(most, now-before)
	}
	all.Wait()
	if most > 100 {
		t.Errorf("%d claims went on between two turns of somebody else, want a few", most)
	}
}

func TestOwnLeftoverEntry_IsClaimedOver(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		ns := s.three()
		s.write("id", entry{Node: ns[0].id, Session: bus.NewSessionID(), State: stateHeld}.encode())
		s.wantHolder(ns[0].mustClaim("id", WithoutProbe()))
		s.write("id2", entry{Node: ns[0].id, Session: bus.NewSessionID(), State: stateHeld}.encode())
		s.wantHolder(ns[1].mustClaim("id2"))
	})
}

// A claim whose entry is in the KV is the holder's, although it does not know yet.
func TestClaimUnderWay_IsNotALeftover(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		n := s.node()
		b := n.newBinary("id")
		h := &holding{serverID: "id", session: bus.NewSessionID(), conn: b, opts: optionsFor(b, []Option{WithPing(b.ping)}), links: make(map[*bus.Link]bool)}
		n.Registry.mu.Lock()
		n.sessions[h.session] = h
		n.Registry.mu.Unlock()
		s.write("id", n.entryFor(h, stateHeld).encode())
		_, err := n.claim("id", WithoutProbe())
		wantErr(t, "claim without probe", err, ErrHeld)
		_, err = n.claim("id")
		wantErr(t, "claim", err, ErrServerIDConflict)
	})
}

func TestNATSHoldsBytes_ClaimIsUndecidedAndItsEntryRemoved(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		ns := s.three()
		ns[0].proxy.Hold()
		start := time.Now()
		_, err := ns[0].claim("id", WithoutProbe())
		if d := time.Since(start); d > decideTimeout+slack {
			t.Errorf("claim took %s, want %s", d, decideTimeout)
		}
		wantErr(t, "claim", err, ErrUndecided)
		if got := ns[0].localHolding("id"); got != nil {
			t.Errorf("holding: got %+v, want none", got)
		}
		ns[0].proxy.Resume()
		eventually(t, 5*time.Second, "the late write", func() bool { return s.raw("id") != nil })
		eventually(t, sweepEvery+3*time.Second, "orphan removed", func() bool { _, ok := s.entry("id"); return !ok })
		s.wantHolder(ns[1].mustClaim("id", WithoutProbe()))
	})
}

// The orphan's entry is somebody else's by the time it is looked at.
func TestOrphanRemoval_LeavesOthersAlone(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		ns := s.three()
		b := ns[1].mustClaim("id")
		for range 20 {
			orphaned := bus.NewSessionID()
			ns[0].addOrphan(orphaned, "id")
			ns[0].removeOrphan(t.Context(), orphaned, orphan{serverID: "id"})
		}
		s.wantHolder(b)
	})
}

func TestHolderNodeFrozen_ClaimIsUndecided(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		ns := s.three()
		b := ns[1].mustClaim("id")
		ns[1].proxy.Hold()
		start := time.Now()
		_, err := ns[0].claim("id", WithoutProbe())
		wantErr(t, "claim", err, ErrUndecided)
		if d := time.Since(start); d > decideTimeout+slack {
			t.Errorf("claim took %s, want %s at most", d, decideTimeout)
		}
		ns[1].proxy.Resume()
		s.wantHolder(b)
		wantQuiet(t, "eviction", b.evicted)
	})
}

func TestEntryThatNoRelayWrote_IsClaimedOver(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		n := s.node()
		for i, value := range []string{
			"", "not JSON", "{}", "[]", "null", `{"node":5}`, `{"node":"x"}`,
			`{"node":"a b","session":"00112233445566778899aabbccddeeff","state":"held"}`,
			`{"node":">","session":"00112233445566778899aabbccddeeff","state":"held"}`,
			`{"node":"x","session":"00112233445566778899aabbccddeeff","state":"?"}`,
			`{"node":"x","session":"short","state":"held"}`,
		} {
			id := fmt.Sprint("id", i)
			s.write(id, []byte(value))
			if _, err := n.dial(id); !errors.Is(err, ErrNoServer) {
				t.Errorf("dial over %q: got %v, want %v", value, err, ErrNoServer)
			}
			start := time.Now()
			b, err := n.claim(id, WithoutProbe())
			if err != nil {
				t.Errorf("claim over %q: %v", value, err)
				continue
			}
			if d := time.Since(start); d > time.Second {
				t.Errorf("claim over %q took %s", value, d)
			}
			s.wantHolder(b)
		}
	})
}

func TestContextEnds_ClaimIsUndecided(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		n := s.node()
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		_, err := n.claim("id", WithContext(ctx))
		wantErr(t, "claim", err, ErrUndecided)
	})
}

func TestManyClaimsAtOnce_OneWins(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		ns := s.three()
		for round := range 50 {
			id := fmt.Sprint("id", round)
			claimAtOnce(t, s, ns, id, 30)
		}
	})
}

func claimAtOnce(t *testing.T, s *scene, ns [3]*node, id string, claims int) {
	t.Helper()
	var (
		winner atomic.Pointer[binary]
		wins   atomic.Int64
		wg     sync.WaitGroup
		start  = make(chan struct{})
	)
	for i := range claims {
		wg.Go(func() {
			<-start
			var opts []Option
			if i%2 == 0 {
				opts = append(opts, WithoutProbe())
			}
			b, err := ns[i%3].claim(id, opts...)
			switch {
			case err == nil:
				winner.Store(b)
				wins.Add(1)
			case errors.Is(err, ErrServerIDConflict), errors.Is(err, ErrHeld), errors.Is(err, ErrUndecided):
			default:
				t.Errorf("%s: claim %d: %v", id, i, err)
			}
		})
	}
	close(start)
	wg.Wait()
	if wins.Load() != 1 {
		t.Fatalf("%s: %d winners, want 1", id, wins.Load())
	}
	s.wantHolder(winner.Load())
	wantQuiet(t, "the winner evicted", winner.Load().evicted)
}

// Somebody displaced the claim between its write and its return.
func TestDisplacedBeforeInstalled_IsNotHeld(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		n := s.node()
		b := n.newBinary("id")
		h := &holding{serverID: "id", session: bus.NewSessionID(), conn: b, opts: optionsFor(b, nil), links: make(map[*bus.Link]bool)}
		n.Registry.mu.Lock()
		n.sessions[h.session] = h
		n.Registry.mu.Unlock()
		s.write("id", entry{Node: n.id, Session: bus.NewSessionID(), State: stateGrace}.encode())
		n.check(t.Context(), h)
		err := n.claimed(h, entry{}, 1)
		wantErr(t, "claimed", err, ErrUndecided)
		if got := n.localHolding("id"); got != nil {
			t.Errorf("holding: got state %d, want none", got.state)
		}
	})
}

// A release and a claim race for the same entry, on one node and on two.
func TestReleaseAgainstClaim_EndsWithTheClaim(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		ns := s.three()
		for round := range 40 {
			id := fmt.Sprint("id", round)
			first := ns[0].mustClaim(id)
			var second *binary
			var err error
			var wg sync.WaitGroup
			wg.Go(first.release)
			wg.Go(func() { second, err = ns[round%2].claim(id) })
			wg.Wait()
			if errors.Is(err, ErrServerIDConflict) { // it came before the release
				second = ns[round%2].mustClaim(id)
			} else if err != nil {
				t.Fatal(err)
			}
			s.wantHolder(second)
			eventually(t, 2*time.Second, "one holder", func() bool {
				h := ns[0].localHolding(id)
				return h == nil || h.conn == second
			})
			s.wantHolder(second)
			wantQuiet(t, "claimant evicted", second.evicted)
		}
	})
}

// Binaries that fight for a server-id write nothing to the KV unless one of them gets
// it, and many that come at once share the pings that the incumbent has to answer.
func TestFight_KVWritesAndPingsAreBounded(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		ns := s.three()
		b := ns[0].mustClaim("id")
		writes := func() uint64 {
			v, err := ns[0].presence.version(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			return v.last
		}
		const rivals = 60
		start, before := time.Now(), writes()
		var wg sync.WaitGroup
		for i := range rivals {
			wg.Go(func() {
				_, err := ns[i%3].claim("id")
				wantErr(t, "rival", err, ErrServerIDConflict)
			})
		}
		wg.Wait()
		if got := writes() - before; got != 0 {
			t.Errorf("%d rivals caused %d writes, want none", rivals, got)
		}
		if got, most := b.pings.Load(), int64(time.Since(start)/probeEvery)+2; got > most {
			t.Errorf("%d rivals caused %d pings in %s, want at most %d", rivals, got, time.Since(start), most)
		}
		before = writes()
		for i := range 6 { // one flaps from node to node
			b.release()
			b = ns[(i+1)%3].mustClaim("id")
		}
		eventually(t, 5*time.Second, "entry of the last one", func() bool { e, ok := s.entry("id"); return ok && e.Session == b.session() })
		if got := writes() - before; got > 6*6 {
			// Release, that once more, claim, proof; and a proof may meet the next claim, and be done twice.
			t.Errorf("6 reclaims caused %d writes, want 4 each, and at most 6", got)
		}
	})
}

// The KV has lost an entry, and the sweep has not written it again yet: the node that
// holds the binary knows of it all the same.
func TestEntryDeleted_ClaimOnTheHoldersNodeAsksTheBinary(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		n := s.node()
		first := n.mustClaim("id")
		s.removeID()
		_, err := n.claim("id", WithoutProbe())
		wantErr(t, "claim without probe", err, ErrHeld)
		_, err = n.claim("id")
		wantErr(t, "claim", err, ErrServerIDConflict)
		if got := first.pings.Load(); got != 1 {
			t.Errorf("pings: got %d, want 1", got)
		}
		wantQuiet(t, "eviction of a binary that answers", first.evicted)
		first.dead.Store(true)
		second := n.mustClaim("id")
		s.wantHolder(second)
		wantErr(t, "incumbent without a pong", within(t, 2*time.Second, "eviction", first.evicted), ErrDisplaced)
		second.release()
		s.removeID()
		s.wantHolder(n.mustClaim("id", WithoutProbe())) // who is in grace has nothing to say
	})
}

// Only GONE says that there was no pong: whatever else a node answers proves nothing.
func TestHolderAnswersSomethingElse_ClaimIsUndecided(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		n := s.node()
		const strange = "strange-00000000"
		echo, err := s.nc.Subscribe("pyrycode.relay.v1."+strange+".>", func(m *nats.Msg) { _ = m.Respond(m.Data) }) // HELLO is right
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = echo.Unsubscribe() }()
		if err := s.nc.Flush(); err != nil {
			t.Fatal(err)
		}
		theirs := entry{Node: strange, Session: bus.NewSessionID(), State: stateHeld}
		s.write("id", theirs.encode())
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err = n.claim("id", WithContext(ctx))
		wantErr(t, "claim", err, ErrUndecided)
		if e, ok := s.entry("id"); !ok || e != theirs {
			t.Errorf("entry: got %+v (%v), want %+v", e, ok, theirs)
		}
	})
}

// A claim that hears late that it was written finds a later one of this node.
func TestInstalledLate_DoesNotDisplaceALaterSession(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		n := s.node()
		late := n.newBinary("id")
		h := &holding{serverID: "id", session: bus.NewSessionID(), conn: late, opts: optionsFor(late, nil), links: make(map[*bus.Link]bool)}
		n.Registry.mu.Lock()
		n.sessions[h.session] = h
		n.Registry.mu.Unlock()
		b := n.mustClaim("id")
		wantErr(t, "claimed", n.claimed(h, entry{}, n.localHolding("id").revision-1), ErrUndecided)
		s.wantHolder(b)
		wantQuiet(t, "eviction", b.evicted)
		if !h.unsure {
			t.Error("nobody looks for what it may have written")
		}
	})
}
