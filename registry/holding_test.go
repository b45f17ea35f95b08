package registry

import (
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/pyrycode/pyrycode-relay/bus"
)

func TestRelease_BeginsGraceThatTheKVEnds(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		s.cfg.Grace = 4 * time.Second
		ns := s.three()
		b := ns[0].mustClaim("id")
		session := b.session()
		phones := []*testPhone{ns[0].mustDial("id"), ns[1].mustDial("id"), ns[2].mustDial("id")}
		if m := s.raw("id"); m.Header.Get("Nats-TTL") != "" {
			t.Errorf("TTL of a held entry: got %s, want none", m.Header.Get("Nats-TTL"))
		}
		start := time.Now()
		b.release()
		b.release()
		e, ok := s.entry("id")
		if !ok || e.State != stateGrace || e.Session != session || e.Node != ns[0].id {
			t.Fatalf("entry: got %+v (%v), want grace of %s", e, ok, session)
		}
		if got := s.raw("id").Header.Get("Nats-TTL"); got != "4s" {
			t.Errorf("TTL of a grace entry: got %q, want 4s", got)
		}
		phones = append(phones, ns[2].mustDial("id"), ns[0].mustDial("id"))
		for i, p := range phones {
			wantQuiet(t, fmt.Sprintf("phone %d in grace", i), p.in.ends)
		}
		for i, p := range phones {
			wantErr(t, fmt.Sprintf("phone %d", i), within(t, 8*time.Second, "end of grace", p.in.ends), bus.ErrGraceOver)
		}
		if d := time.Since(start); d < s.cfg.Grace || d > s.cfg.Grace+2*time.Second {
			t.Errorf("grace took %s, want %s", d, s.cfg.Grace)
		}
		eventually(t, 3*time.Second, "key gone", func() bool { _, ok := s.entry("id"); return !ok })
		if got := ns[0].GraceExpiries(); got != 1 {
			t.Errorf("grace expiries: got %d, want 1", got)
		}
		_, err := ns[1].dial("id")
		wantErr(t, "dial after grace", err, ErrNoServer)
	})
}

// The node dies in the grace that it began: a claim elsewhere still succeeds at once,
// and without one the grace ends all the same.
func TestGraceOutlivesItsNode(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		s.cfg.Grace = 4 * time.Second
		ns := s.three()
		returns, stays := ns[0].mustClaim("returns"), ns[0].mustClaim("stays away")
		returns.release()
		stays.release()
		ns[0].kill()
		start := time.Now()
		s.wantHolder(ns[1].mustClaim("returns"))
		if took := time.Since(start); took > time.Second {
			t.Errorf("claim in the grace of a dead node took %s", took)
		}
		if e, ok := s.entry("stays away"); !ok || e.State != stateGrace {
			t.Errorf("entry: got %+v (%v), want grace", e, ok)
		}
		eventually(t, s.cfg.Grace+3*time.Second, "end of the grace", func() bool { _, ok := s.entry("stays away"); return !ok })
		_, err := ns[2].dial("stays away")
		wantErr(t, "dial after the grace", err, ErrNoServer)
	})
}

func TestRelease_OfWhoDoesNotHold_DoesNothing(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		n := s.node()
		b := n.mustClaim("id")
		n.newBinary("id").release()
		n.newBinary("unknown").release()
		s.wantHolder(b)
		if _, ok := s.entry("unknown"); ok {
			t.Error("an entry of an id that nobody claimed")
		}
	})
}

// Phones from before the loss are told; those that came in the grace move, with
// what they have sent.
func TestReclaim_MovesPhonesThatCameInGrace(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		s.cfg.Grace = 20 * time.Second
		ns := s.three()
		for i, to := range ns[:2] {
			id := fmt.Sprint("id", i)
			first := ns[0].mustClaim(id)
			var before, inGrace []*testPhone
			for _, n := range ns {
				before = append(before, n.mustDial(id))
			}
			first.release()
			for j, n := range ns {
				p := n.mustDial(id)
				for k := range 5 {
					p.send(t, fmt.Sprint(j, ":", k))
				}
				inGrace = append(inGrace, p)
			}
			second := to.mustClaim(id)
			for j, p := range before {
				wantErr(t, fmt.Sprintf("phone %d from before", j), within(t, 3*time.Second, "its end", p.in.ends), bus.ErrReclaimed)
			}
			eventually(t, 5*time.Second, "waiting frames arrive", func() bool { return len(second.in.got()) >= 15 })
			for j, p := range inGrace {
				p.send(t, fmt.Sprint(j, ":", 5))
			}
			eventually(t, 5*time.Second, "later frames arrive", func() bool { return len(second.in.got()) >= 18 })
			for j := range inGrace {
				var got []string
				for _, f := range second.in.got() {
					if f[:2] == fmt.Sprint(j, ":") {
						got = append(got, f[2:])
					}
				}
				if want := []string{"0", "1", "2", "3", "4", "5"}; !slices.Equal(got, want) {
					t.Errorf("frames of phone %d: got %v, want %v", j, got, want)
				}
				wantQuiet(t, fmt.Sprintf("phone %d", j), inGrace[j].in.ends)
			}
			if got := first.in.got(); len(got) != 0 {
				t.Errorf("the old binary got %v", got)
			}
			s.wantHolder(second)
		}
	})
}

func TestSupersededTwice_EvictsAndTellsOnce(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		ns := s.three()
		b := ns[0].mustClaim("id")
		phones := []*testPhone{ns[0].mustDial("id"), ns[1].mustDial("id")}
		h := ns[0].localHolding("id")
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() { ns[0].supersede(h) })
			wg.Go(func() { ns[0].graceOver(h) })
		}
		wg.Wait()
		for _, p := range phones {
			_ = within(t, 2*time.Second, "end", p.in.ends)
		}
		if got := len(b.evicted); got > 1 {
			t.Errorf("evictions: got %d, want 1 at most", got)
		}
		if got := ns[0].GraceExpiries(); got != 0 {
			t.Errorf("grace expiries: got %d, want 0", got)
		}
		for _, p := range phones {
			wantQuiet(t, "a second end", p.in.ends)
		}
	})
}

// Whatever was written late, the sweep makes it a grace that ends.
func TestGraceWrittenAgain_HasATTL(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		s.cfg.Grace = 10 * time.Second
		n := s.node()
		b := n.mustClaim("id")
		h := n.localHolding("id")
		b.release()
		spoil := map[string]func(){
			"held again": func() { s.write("id", n.entryFor(h, stateHeld).encode()) },
			"not JSON":   func() { s.write("id", []byte("?")) },
			"deleted":    func() { s.removeID() },
		}
		for name, f := range spoil {
			f()
			n.check(t.Context(), h)
			e, ok := s.entry("id")
			if ttl := s.raw("id").Header.Get("Nats-TTL"); !ok || e.State != stateGrace || e.Session != h.session || ttl != "10s" {
				t.Errorf("%s: got %+v (%v) with TTL %q, want grace with 10s", name, e, ok, ttl)
			}
		}
	})
}

func TestGrace_IsNotWrittenOverAnotherClaim(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		ns := s.three()
		first := ns[0].mustClaim("id")
		p := ns[2].mustDial("id")
		theirs := entry{Node: ns[1].id, Session: bus.NewSessionID(), State: stateHeld}
		ns[0].doubt()
		eventually(t, 2*sweepEvery, "no sweep for a moment", ns[0].swept)
		s.write("id", theirs.encode())
		first.release()
		if e, ok := s.entry("id"); !ok || e != theirs {
			t.Errorf("entry: got %+v (%v), want %+v", e, ok, theirs)
		}
		wantErr(t, "its phone", within(t, 2*time.Second, "end", p.in.ends), bus.ErrReclaimed)
		wantQuiet(t, "eviction of a binary that has gone", first.evicted)
		if h := ns[0].localHolding("id"); h != nil {
			t.Errorf("holding: got state %d, want none", h.state)
		}
	})
}

func TestReleaseWhileNATSHoldsBytes_IsToldLater(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		s.cfg.Grace = 20 * time.Second
		n := s.node()
		b := n.mustClaim("id")
		session := b.session()
		n.proxy.Hold()
		start := time.Now()
		b.release()
		if d := time.Since(start); d > decideTimeout+slack {
			t.Errorf("release took %s, want %s at most", d, decideTimeout)
		}
		n.proxy.Resume()
		eventually(t, sweepEvery+3*time.Second, "grace in the KV", func() bool {
			e, ok := s.entry("id")
			return ok && e.State == stateGrace && e.Session == session && s.raw("id").Header.Get("Nats-TTL") == "20s"
		})
		n.mustClaim("id", WithoutProbe())
	})
}
