package registry

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/pyrycode/pyrycode-relay/bus"
)

func (s *scene) lease(n *node) *jetstream.RawStreamMsg {
	s.t.Helper()
	m := s.rawKey("_nodes", string(n.id))
	if m == nil || ended(m) {
		return nil
	}
	return m
}

func TestLease_IsKeptAndGivenBack(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		s.cfg.LeaseTTL = 3 * time.Second
		n := s.node()
		m := s.lease(n)
		var e nodeEntry
		if m == nil || json.Unmarshal(m.Data, &e) != nil {
			t.Fatalf("lease: got %+v, want a node's entry", m)
		}
		want := nodeEntry{Version: "v0", Protocol: n.Bus().Versions(), Region: "here", State: nodeReady, Settings: settings{Grace: "2s", LeaseTTL: "3s", MaxPhones: 16}}
		if e != want {
			t.Errorf("lease: got %+v, want %+v", e, want)
		}
		eventually(t, 2*s.cfg.LeaseTTL, "renewed", func() bool { l := s.lease(n); return l != nil && l.Sequence > m.Sequence+2 })
		n.Drain()
		if err := n.Ready(); err == nil || !strings.Contains(err.Error(), "draining") {
			t.Errorf("ready while draining: got %v", err)
		}
		eventually(t, time.Second+slack, "others see that it drains", func() bool {
			l := s.lease(n)
			return l != nil && json.Unmarshal(l.Data, &e) == nil && e.State == nodeDraining
		})
		n.Stop(t.Context())
		if m := s.lease(n); m != nil {
			t.Errorf("lease after Stop: got %s, want none", m.Data)
		}
	})
}

func TestLeaseNotRenewed_NodeStopsDecidingAndKeepsWhatItHolds(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		s.cfg.LeaseTTL = 3 * time.Second
		n := s.node()
		b := n.mustClaim("id")
		p := n.mustDial("id")
		n.proxy.Hold()
		start := time.Now()
		eventually(t, s.cfg.LeaseTTL+slack, "not ready", func() bool { return n.Ready() != nil })
		if d := time.Since(start); d > s.cfg.freshFor()+slack/2 { // the lease itself ends later
			t.Errorf("not ready after %s, want %s at most", d, s.cfg.freshFor())
		}
		if err := n.Ready(); !strings.Contains(err.Error(), "lease not renewed") {
			t.Errorf("ready: got %v, want that the lease is not renewed", err)
		}
		wantErr(t, "ready", n.Ready(), ErrNotReady)
		_, err := n.claim("other")
		wantErr(t, "claim", err, ErrNotReady)
		_, err = n.dial("id")
		wantErr(t, "dial", err, ErrNotReady)
		p.send(t, "still here") // both ends are on this node
		eventually(t, time.Second, "frame", func() bool { return len(b.in.got()) == 1 })
		n.proxy.Resume()
		eventually(t, 15*time.Second, "ready again", func() bool { return n.Ready() == nil })
		wantQuiet(t, "eviction", b.evicted)
		wantQuiet(t, "end of the phone", p.in.ends)
		s.wantHolder(b)
	})
}

func TestNotReady_Reasons(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		n := s.node()
		log := n.log
		fresh := New(bus.New(n.conn, "fresh-00000000", bus.Config{}, log), s.cfg, log)
		if err := fresh.Ready(); err == nil || !strings.Contains(err.Error(), "no lease yet") {
			t.Errorf("before the first lease: got %v", err)
		}
		n.proxy.Refuse()
		n.proxy.Cut()
		eventually(t, 2*time.Second, "not connected", func() bool {
			err := n.Ready()
			return err != nil && strings.Contains(err.Error(), "not connected")
		})
		n.proxy.Accept()
		n.waitReady()
	})
}

// Connected means registered, whatever an operator deletes.
func TestBucketDeleted_IsMadeAgainAndEntriesReturn(t *testing.T) {
	for _, which := range [][]string{{"_nodes"}, {"_presence"}, {"_nodes", "_presence"}} {
		t.Run(strings.Join(which, "+"), func(t *testing.T) {
			onBoth(t, func(t *testing.T, s *scene) {
				s.cfg.LeaseTTL = 10 * time.Second
				ns := s.three()
				b := ns[0].mustClaim("id")
				p := ns[1].mustDial("id")
				for _, bucket := range which {
					s.deleteBucket(s.cfg.KVPrefix + bucket)
				}
				eventually(t, s.cfg.renewEvery()+sweepEvery+2*time.Second, "all there again", func() bool {
					if e, ok := s.entry("id"); !ok || e.Session != b.session() {
						return false
					}
					for _, n := range ns {
						if n.Ready() != nil || s.lease(n) == nil {
							return false
						}
					}
					return true
				})
				s.wantHolder(b)
				wantQuiet(t, "eviction", b.evicted)
				wantQuiet(t, "end of the phone", p.in.ends)
				p.send(t, "still here")
				eventually(t, 2*time.Second, "frame", func() bool { return len(b.in.got()) == 1 })
				_, err := ns[2].claim("id")
				wantErr(t, "claim elsewhere", err, ErrServerIDConflict)
				ns[2].mustClaim("new")
			})
		})
	}
}

func TestPresenceBucketDeleted_ANodeThatHoldsNothingMakesItAgain(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		n := s.node()
		s.deleteBucket(s.cfg.KVPrefix + "_presence")
		eventually(t, 2*sweepEvery, "a claim succeeds", func() bool { _, err := n.claim("id", WithoutProbe()); return err == nil })
	})
}

func TestLeaseDeleted_IsWrittenAgain(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		s.cfg.LeaseTTL = 3 * time.Second
		n := s.node()
		kv, err := s.js.KeyValue(t.Context(), s.cfg.KVPrefix+"_nodes")
		if err != nil {
			t.Fatal(err)
		}
		unbroken := func() time.Time {
			n.lease.mu.Lock()
			defer n.lease.mu.Unlock()
			return n.lease.unbroken
		}
		before := unbroken()
		if err := kv.Delete(t.Context(), string(n.id)); err != nil {
			t.Fatal(err)
		}
		eventually(t, s.cfg.LeaseTTL, "lease there again", func() bool { return s.lease(n) != nil })
		if err := n.Ready(); err != nil {
			t.Errorf("ready: %v", err)
		}
		eventually(t, time.Second+slack, "the lease counts as broken", func() bool { return unbroken().After(before) })
	})
}

// A node is frozen longer than its lease: others take what it held, and it
// notices when it thaws.
func TestFrozenNode_LosesWhatItHolds(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		s.cfg.LeaseTTL = 3 * time.Second
		ns := s.three()
		first := ns[1].mustClaim("id")
		p := ns[1].mustDial("id")
		far := ns[2].mustDial("id")
		eventually(t, 2*s.cfg.LeaseTTL, "a lease unbroken for a whole TTL", func() bool { return ns[0].unbrokenFor() > s.cfg.LeaseTTL })
		ns[1].proxy.Hold()
		start := time.Now()
		var second *binary
		eventually(t, 15*time.Second, "the claim elsewhere", func() bool {
			b, err := ns[0].claim("id", WithoutProbe())
			second = b
			return err == nil
		})
		if d := time.Since(start); d < s.cfg.LeaseTTL-s.cfg.renewEvery()-time.Second {
			t.Errorf("taken after %s, before the lease of %s ended", d, s.cfg.LeaseTTL)
		}
		wantErr(t, "phone elsewhere", within(t, 10*time.Second, "its end", far.in.ends), bus.ErrNodeGone)
		s.wantHolder(second)
		wantQuiet(t, "eviction while frozen", first.evicted)
		ns[1].proxy.Resume()
		wantErr(t, "incumbent", within(t, 15*time.Second, "eviction", first.evicted), ErrDisplaced)
		wantErr(t, "its phone", within(t, 2*time.Second, "end", p.in.ends), bus.ErrReclaimed)
		s.wantHolder(second)
	})
}

func TestDeadNode_ItsEntriesBecomeGraceAndVanish(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		s.cfg.LeaseTTL = 3 * time.Second
		ns := s.three()
		held := ns[0].mustClaim("alive")
		for i := range 20 {
			ns[1].mustClaim(fmt.Sprint("id", i))
		}
		p := ns[2].mustDial("id0")
		ns[1].kill()
		start := time.Now()
		wantErr(t, "phone of the dead node", within(t, 8*time.Second, "its end", p.in.ends), bus.ErrNodeGone)
		if d := time.Since(start); d > 5*time.Second+slack {
			t.Errorf("phone was told after %s, want 5 s", d)
		}
		for i := range 20 {
			id := fmt.Sprint("id", i)
			eventually(t, 20*time.Second, "grace", func() bool {
				e, ok := s.entry(id)
				return !ok || e.State == stateGrace && s.raw(id).Header.Get("Nats-TTL") != ""
			})
			eventually(t, 10*time.Second, "vanished", func() bool { _, ok := s.entry(id); return !ok })
		}
		s.wantHolder(held)
	})
}

// What dead nodes hold is looked for in pages, and a scan goes on where one left off.
func TestReap_GoesOnWhereItLeftOff(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		s.cfg.LeaseTTL = 5 * time.Second
		n := s.node()
		held := n.mustClaim("alive")
		eventually(t, 2*s.cfg.LeaseTTL, "a lease unbroken for a whole TTL", func() bool { return n.unbrokenFor() > s.cfg.LeaseTTL })
		const entries = 2*pageSize + 1
		for i := range entries {
			s.write(fmt.Sprint("id", i), entry{Node: "gone-00000000", Session: bus.NewSessionID(), State: stateHeld}.encode())
		}
		now, err := n.presence.version(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		// As if the time of a sweep had been over after the first reads.
		ctx, sc, alive := t.Context(), new(scan), map[bus.NodeID]nodeEntry{n.id: {}}
		if sc.keys, err = n.presence.keys(ctx); err != nil {
			t.Fatal(err)
		}
		sc.keys = sc.keys[pageSize:]
		rest := slices.Clone(sc.keys)
		over, cancel := context.WithCancel(ctx)
		cancel()
		if n.reap(over, sc, alive, now.last) || len(sc.keys) != len(rest) {
			t.Errorf("reap without time: done, or %d keys to go, want %d", len(sc.keys), len(rest))
		}
		eventually(t, 10*time.Second, "the rest", func() bool { return n.reap(ctx, sc, alive, now.last) && len(sc.keys) == 0 })
		for _, key := range rest {
			id, err := bus.DecodeToken(key)
			if e, ok := s.entry(id); err != nil || ok && id != "alive" && e.State != stateGrace {
				t.Fatalf("%s: got %+v, %v", key, e, err)
			}
		}
		sc.keys, sc.left = rest[:1], true
		if n.reap(ctx, sc, alive, now.last) {
			t.Error("reap: done, although a node died after some keys had been looked at")
		}
		s.wantHolder(held)
	})
}

// A living node whose lease an operator deletes is not dead.
func TestLeaseDeletedByHand_EntriesAreNotReaped(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		s.cfg.LeaseTTL = 5 * time.Second
		ns := s.three()
		b := ns[1].mustClaim("id")
		eventually(t, 2*s.cfg.LeaseTTL, "a lease unbroken for a whole TTL", func() bool { return ns[0].unbrokenFor() > s.cfg.LeaseTTL })
		kv, err := s.js.KeyValue(t.Context(), s.cfg.KVPrefix+"_nodes")
		if err != nil {
			t.Fatal(err)
		}
		before := s.lease(ns[1]).Sequence // deleted right after a renewal
		eventually(t, s.cfg.LeaseTTL, "renewal", func() bool { return s.lease(ns[1]).Sequence > before })
		if err := kv.Delete(t.Context(), string(ns[1].id)); err != nil {
			t.Fatal(err)
		}
		if ns[0].reap(t.Context(), new(scan), nil, 0) {
			t.Error("reap: done, want that it looks again")
		}
		s.wantHolder(b)
	})
}

// A bucket keeps the TTL that it was made with. A node that has another one would go by
// a lease that the others have let go.
func TestBucketOfAnotherLeaseTTL_NodeIsNotReady(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		first := s.node()
		s.cfg.LeaseTTL = 6 * time.Second
		second := s.startNode()
		eventually(t, 10*time.Second, "the reason", func() bool { return says(second.Ready(), "20s", "6s", "--lease-ttl") })
		_, err := second.claim("id")
		wantErr(t, "claim", err, ErrNotReady)
		if s.lease(second) != nil {
			t.Error("a lease in a bucket that does not fit")
		}
		wantErr(t, "the node whose bucket it is", first.Ready(), nil)
		first.Stop(t.Context())
		s.deleteBucket(s.cfg.KVPrefix + "_nodes")
		second.waitReady()
	})
}

func TestBucketReplacedByOneOfAnotherTTL_NodeStopsDeciding(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		n := s.node()
		b := n.mustClaim("id")
		name := s.cfg.KVPrefix + "_presence"
		eventually(t, 20*time.Second, "replaced", func() bool { // before the node makes it again
			s.deleteBucket(name)
			ctx, cancel := context.WithTimeout(t.Context(), kvTimeout)
			defer cancel()
			_, err := s.js.CreateKeyValue(ctx, jetstream.KeyValueConfig{Bucket: name, TTL: time.Hour, LimitMarkerTTL: markerTTL})
			return err == nil
		})
		eventually(t, sweepEvery+5*time.Second, "the reason", func() bool { return says(n.Ready(), name, "1h0m0s", "0s") })
		s.deleteBucket(name)
		n.waitReady()
		eventually(t, sweepEvery+5*time.Second, "entry there again", func() bool { _, ok := s.entry("id"); return ok })
		s.wantHolder(b)
		wantQuiet(t, "eviction", b.evicted)
	})
}

// says reports whether err has all of these words.
func says(err error, words ...string) bool {
	return err != nil && !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(err.Error(), w) })
}

// calmWorld runs f over three nodes in virtual time, whose leases have been unbroken
// for long enough to conclude something.
func calmWorld(t *testing.T, f func(w *simWorld)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := newSimWorld(1)
		for i := range w.nodes {
			w.startNode(i)
		}
		w.sleep(2 * w.nodes[0].cfg.LeaseTTL)
		f(w)
		w.sleep(10 * time.Second) // whatever is under way ends
		for _, n := range w.all {
			n.Stop(t.Context())
		}
	})
}

// The node whose turn it is to clear up never has a lease for long enough.
func TestFirstNodeRestartsAllTheTime_AnotherClearsUp(t *testing.T) {
	calmWorld(t, func(w *simWorld) {
		_, _ = w.claim(w.nodes[1], "one")
		w.kill(step{Node: 1}, w.nodes[1])
		died, bound := time.Now(), w.nodes[0].cfg.LeaseTTL+3*sweepEvery
		for time.Since(died) < bound {
			w.sleep(bound / 4)
			w.kill(step{Node: 0}, w.nodes[0])
		}
		if e, ok := entryOf(w.holdKV.truth("one")); ok && e.State != stateGrace {
			t.Errorf("%s after the node's end: got %s, want grace or nothing", time.Since(died), short(e, ok))
		}
	})
}

// Phones learn within 5 s that the node of their binary was killed, whenever that was,
// and whether another one is frozen or not; if the KV has no leader then, when it has one.
func TestNodeKilled_PhonesElsewhereKnow(t *testing.T) {
	for _, tt := range []struct {
		name   string
		frozen bool // another node that has links, too
		stall  time.Duration
		most   time.Duration
	}{
		{"all is well", false, 0, 5 * time.Second},
		{"another one is frozen", true, 0, 5 * time.Second},
		{"the KV has no leader", false, 9 * time.Second, 13 * time.Second},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for i := range time.Duration(8) {
				calmWorld(t, func(w *simWorld) {
					_, _ = w.claim(w.nodes[0], "one")
					_, _ = w.claim(w.nodes[2], "two")
					ends := linkedPhone(t, w.nodes[1], "one")
					linkedPhone(t, w.nodes[1], "two")
					w.sleep(5*time.Second + i*watchEvery/8)
					if tt.frozen {
						w.nodes[2].port.setState(portHeld)
						w.sleep(watchEvery + i*suspectEvery)
					}
					start := time.Now()
					w.stall(tt.stall)
					w.kill(step{Node: 0}, w.nodes[0])
					wantErr(t, "the phone", within(t, time.Minute, "its end", ends), bus.ErrNodeGone)
					if took := time.Since(start); took < max(deadAfter, tt.stall) || took > tt.most {
						t.Errorf("told after %s, want at most %s", took, tt.most)
					}
				})
			}
		})
	}
}

// Claims share a question to a node that begins after all of them came, and no other.
func TestAskNode_OneQuestionForACrowd(t *testing.T) {
	t.Parallel()
	r := &Registry{nextAsking: make(map[bus.NodeID]*asking), nowAsking: make(map[bus.NodeID]*asking)}
	first, before, mine := r.joinAsking("n")
	if !mine || before != nil {
		t.Fatal("nobody has asked, and yet the question is not the caller's")
	}
	if a, _, mine := r.joinAsking("n"); mine || a != first {
		t.Error("a second question although the first one has not begun")
	}
	if _, _, mine := r.joinAsking("other"); !mine {
		t.Error("another node's question is taken for this one's")
	}
	delete(r.nextAsking, "n") // it begins
	r.nowAsking["n"] = first
	second, before, mine := r.joinAsking("n")
	if !mine || second == first || before != first {
		t.Error("a claim shares a question that began before it came")
	}
	if a, _, mine := r.joinAsking("n"); mine || a != second {
		t.Error("two claims that wait for the same question to begin do not share it")
	}
}

// The one who asks has no time left: the others are not told that nothing is known for
// that reason, and nothing stays behind.
func TestAskNode_TheOneWhoAsksGivesUp(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		n := s.node()
		gone, cancel := context.WithCancel(t.Context())
		cancel()
		if got := n.askNode(gone, "nobody-00000000"); got != nodeUnknown {
			t.Errorf("asked without time: %v, want nodeUnknown", got)
		}
		var wg sync.WaitGroup
		for i := range 20 {
			wg.Go(func() {
				ctx := t.Context()
				if i == 0 {
					ctx = gone
				}
				if got := n.askNode(ctx, "nobody-00000000"); got != nodeDead && ctx != gone {
					t.Errorf("a node that was never there: %v, want nodeDead", got)
				}
			})
		}
		wg.Wait()
		n.mu.Lock()
		defer n.mu.Unlock()
		if len(n.nextAsking)+len(n.nowAsking) > 0 {
			t.Errorf("questions are left: %d to begin, %d under way", len(n.nextAsking), len(n.nowAsking))
		}
	})
}
