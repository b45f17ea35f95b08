package registry

import (
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/pyrycode/pyrycode-relay/bus"
)

func TestUnknownID_IsErrNoServer(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		for i, n := range s.three() {
			_, err := n.dial("id")
			wantErr(t, fmt.Sprintf("dial on node %d", i), err, ErrNoServer)
			if got := n.PhonesFor("id"); len(got) != 0 {
				t.Errorf("phones on node %d: got %d, want none", i, len(got))
			}
		}
	})
}

func TestPhones_AttachFromAnyNode(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		ns := s.three()
		b := ns[0].mustClaim("id")
		for i, n := range ns {
			p := n.mustDial("id")
			p.send(t, fmt.Sprint("from ", i))
			eventually(t, 2*time.Second, "the phone's frame", func() bool { return len(b.in.got()) == i+1 })
			if got := n.PhonesFor("id"); len(got) != 1 || got[0] != Conn(p) {
				t.Errorf("phones on node %d: got %v, want %v", i, got, p)
			}
			if got := n.PhonesFor("other"); len(got) != 0 {
				t.Errorf("phones of another id: got %v, want none", got)
			}
			p.hangUp()
			p.hangUp()
			if got := n.PhonesFor("id"); len(got) != 0 {
				t.Errorf("phones on node %d after the end: got %v, want none", i, got)
			}
			wantErr(t, "binary is told", within(t, 2*time.Second, "end of the link", b.in.ends), bus.CodeError(goingAway))
		}
	})
}

// From the instant that a claim returned, nobody is told that there is no server.
func TestClaimedNow_EveryNodeFindsIt(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		ns := s.three()
		for i := range 200 {
			id := fmt.Sprint("id", i)
			ns[i%3].mustClaim(id)
			var wg sync.WaitGroup
			for j, n := range ns {
				wg.Go(func() {
					if _, err := n.dial(id); err != nil {
						t.Errorf("%s held by node %d, dial on node %d: %v", id, i%3, j, err)
					}
				})
			}
			wg.Wait()
		}
	})
}

func TestPhoneCap_CountsTheCluster(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		s.cfg.Grace = 3 * time.Second
		ns := s.three()
		b := ns[0].mustClaim("id")
		var phones []*testPhone
		for i := range 16 {
			phones = append(phones, ns[i%3].mustDial("id"))
		}
		for i, n := range ns {
			_, err := n.dial("id")
			wantErr(t, fmt.Sprintf("17th phone on node %d", i), err, ErrTooManyPhones)
		}
		ns[2].mustClaim("another")
		ns[1].mustDial("another") // has room of its own
		for i, n := range ns {
			phones[i].hangUp()
			eventually(t, 2*time.Second, "room for another phone", func() bool { _, err := n.dial("id"); return err == nil })
			_, err := n.dial("id")
			wantErr(t, fmt.Sprintf("17th phone on node %d", i), err, ErrTooManyPhones)
		}
		// No server wins over too many phones.
		b.release()
		_, err := ns[1].dial("id")
		wantErr(t, "17th phone in grace", err, ErrTooManyPhones)
		eventually(t, 8*time.Second, "grace over", func() bool { _, ok := s.entry("id"); return !ok })
		for i, n := range ns {
			_, err := n.dial("id")
			wantErr(t, fmt.Sprintf("phone after the grace on node %d", i), err, ErrNoServer)
		}
	})
}

// A replica still names a session that has been superseded.
func TestStaleHint_LeadsToTheNewHolder(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		ns := s.three()
		b := ns[2].mustClaim("id")
		now := s.raw("id").Data
		ns[1].proxy.SetDelay(300 * time.Millisecond) // its refusal takes a while
		opened := make(chan struct{}, 16)
		sub, err := s.nc.Subscribe("pyrycode.relay.v1."+string(ns[1].id)+".server.id", func(*nats.Msg) { opened <- struct{}{} })
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = sub.Unsubscribe() }()
		if err := s.nc.Flush(); err != nil {
			t.Fatal(err)
		}
		ns[2].proxy.Hold() // or its sweep might see the other session, and give way to it
		s.write("id", entry{Node: ns[1].id, Session: bus.NewSessionID(), State: stateHeld}.encode())
		result := make(chan error, 1)
		go func() { _, err := ns[0].dial("id"); result <- err }()
		within(t, 2*time.Second, "the old holder is asked", opened)
		s.write("id", now)
		ns[2].proxy.Resume()
		wantErr(t, "dial", within(t, 5*time.Second, "dial returns", result), nil)
		s.wantHolder(b)
	})
}

// The KV names a session that its node does not know.
func TestHolderSaysNo_IsErrNoServer(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		ns := s.three()
		s.write("id", entry{Node: ns[1].id, Session: bus.NewSessionID(), State: stateHeld}.encode())
		for i, n := range ns {
			start := time.Now()
			_, err := n.dial("id")
			wantErr(t, fmt.Sprintf("dial on node %d", i), err, ErrNoServer)
			if d := time.Since(start); d > 2*slack {
				t.Errorf("dial on node %d took %s", i, d)
			}
		}
	})
}

func TestHolderNodeFrozen_DialIsUndecided(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		ns := s.three()
		ns[1].mustClaim("id")
		ns[1].proxy.Hold()
		wantUndecidedDial(t, ns[0])
		ns[1].proxy.Resume()
		ns[0].mustDial("id")
	})
}

func TestNATSHoldsBytes_DialIsUndecided(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		ns := s.three()
		ns[1].mustClaim("id")
		ns[0].proxy.Hold()
		wantUndecidedDial(t, ns[0])
		ns[0].proxy.Resume()
		eventually(t, 5*time.Second, "the phone gets through", func() bool { _, err := ns[0].dial("id"); return err == nil })
	})
}

func wantUndecidedDial(t *testing.T, n *node) {
	t.Helper()
	start := time.Now()
	_, err := n.dial("id")
	wantErr(t, "dial", err, ErrUndecided)
	if d := time.Since(start); d > decideTimeout+slack {
		t.Errorf("dial took %s, want %s", d, decideTimeout)
	}
	if got := n.PhonesFor("id"); len(got) != 0 {
		t.Errorf("phones: got %d, want none", len(got))
	}
}

func TestHolderNodeDead_DialWaitsForProof(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		ns := s.three()
		ns[1].mustClaim("id")
		ns[1].kill()
		eventually(t, 2*time.Second, "nobody responds", func() bool {
			return errors.Is(ns[0].Bus().Hello(t.Context(), ns[1].id), bus.ErrNoResponders)
		})
		start := time.Now()
		_, err := ns[0].dial("id")
		wantErr(t, "dial", err, ErrNoServer)
		if d := time.Since(start); d < deadAfter || d > decideTimeout {
			t.Errorf("dial took %s, want %s and a little", d, deadAfter)
		}
	})
}

// A node without responders, and a KV that does not answer, prove nothing.
func TestSilenceThenNoLookUp_IsUndecided(t *testing.T) {
	calmWorld(t, func(w *simWorld) {
		_, _ = w.claim(w.nodes[1], "one")
		w.kill(step{Node: 1}, w.nodes[1])
		time.AfterFunc(3*time.Second, func() { w.stall(5 * time.Second) })
		wantErr(t, "dial", dialOne(w.nodes[0]), ErrUndecided)
	})
}

// dialOne is a phone of server-id one that dials n.
func dialOne(n *simNode) error {
	link := n.Bus().NewLink("one", fmt.Sprint("phone-", conns.Add(1)), simReceiver{})
	return n.RegisterPhone("one", &simPhone{id: link.ConnID()}, WithLink(link))
}

// A living node that changes its NATS server costs a phone a wait, not a 4404.
func TestHolderSilentForAWhile_DialWaitsForIt(t *testing.T) {
	for _, tt := range []struct {
		away time.Duration
		want error
	}{{3 * time.Second, nil}, {3900 * time.Millisecond, nil}, {20 * time.Second, ErrNoServer}} {
		t.Run(tt.away.String(), func(t *testing.T) {
			calmWorld(t, func(w *simWorld) {
				_, _ = w.claim(w.nodes[1], "one")
				for range 5 {
					w.nodes[1].port.setState(portAway)
					time.AfterFunc(tt.away, func() { w.nodes[1].port.setState(portLinked) })
					start := time.Now()
					wantErr(t, "dial", dialOne(w.nodes[0]), tt.want)
					took := time.Since(start)
					if tt.want != nil && took < deadAfter || took > deadAfter+2*retryWait {
						t.Errorf("dial took %s, want about %s", took, min(tt.away, deadAfter))
					}
					w.sleep(tt.away + w.net.upTo(sweepEvery))
				}
			})
		})
	}
}

// On the smaller side of a split everybody is silent, and nobody is dead: whether it is
// the leader of before that is there or not.
func TestNodeOnTheSmallerSide_TakesNobodyForDead(t *testing.T) {
	for _, leader := range []bool{false, true} {
		t.Run(fmt.Sprint("leader of before: ", leader), func(t *testing.T) {
			calmWorld(t, func(w *simWorld) {
				_, _ = w.claim(w.nodes[0], "one")
				ends := linkedPhone(t, w.nodes[1], "one")
				// The larger side has a leader, and the lease renewed, within 12 s.
				w.split(step{Node: 1, For: 13 * time.Second, A: leader, B: true}, w.nodes[1])
				wantErr(t, "dial", dialOne(w.nodes[1]), ErrUndecided)
				w.sleep(3 * time.Second)
				wantQuiet(t, "end of the phone", ends)
				w.sleep(10 * time.Second)
				// The larger side was right: it could not reach this one for too long.
				wantErr(t, "the phone", within(t, time.Second, "its end", ends), bus.ErrLinkLost)
				wantErr(t, "dial after the split", dialOne(w.nodes[1]), nil)
			})
		})
	}
}

// linkedPhone attaches a phone on n. Its ends come over the channel.
func linkedPhone(t *testing.T, n *simNode, serverID string) (ends chan error) {
	t.Helper()
	in := newInbox()
	link := n.Bus().NewLink(serverID, fmt.Sprint("phone-", conns.Add(1)), in)
	if err := n.RegisterPhone(serverID, &simPhone{id: link.ConnID()}, WithLink(link)); err != nil {
		t.Fatal(err)
	}
	return in.ends
}

// While its holder changes its NATS server, nobody responds for a moment.
func TestHolderComesBack_DialWaitsForIt(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		ns := s.three()
		ns[1].mustClaim("id")
		ns[1].proxy.Refuse()
		ns[1].proxy.Cut()
		eventually(t, 2*time.Second, "nobody responds", func() bool {
			return errors.Is(ns[0].Bus().Hello(t.Context(), ns[1].id), bus.ErrNoResponders)
		})
		time.AfterFunc(1500*time.Millisecond, ns[1].proxy.Accept)
		ns[0].mustDial("id")
	})
}

func TestNodeNotReady_DecidesNothing(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		ns := s.three()
		ns[1].mustClaim("id")
		ns[0].Drain()
		_, err := ns[0].dial("id")
		wantErr(t, "dial", err, ErrNotReady)
		_, err = ns[0].dial("unknown")
		wantErr(t, "dial unknown", err, ErrNotReady)
		_, err = ns[0].claim("free")
		wantErr(t, "claim", err, ErrNotReady)
	})
}

func TestPhoneGoneMeanwhile_IsErrClosed(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		ns := s.three()
		s.write("id", entry{Node: "gone-00000000", Session: bus.NewSessionID(), State: stateHeld}.encode())
		p := &testPhone{fakeConn: newConn(), at: ns[0], serverID: "id", in: newInbox()}
		p.link = ns[0].Bus().NewLink("id", p.id, p.in)
		result := make(chan error, 1)
		go func() { result <- ns[0].RegisterPhone("id", p, WithLink(p.link)) }()
		eventually(t, 2*time.Second, "the phone is known", func() bool { return len(ns[0].PhonesFor("id")) == 1 })
		p.hangUp()
		wantErr(t, "register", within(t, 2*time.Second, "register returns", result), ErrClosed)
		if got := len(ns[0].PhonesFor("id")); got != 0 {
			t.Errorf("phones: got %d, want none", got)
		}
	})
}

// A node that was away for less than its lease is not told of what others took
// meanwhile: it asks the leader until it has swept, which it does at once.
func TestNodeComesBackWithinItsLease_PhonesFindTheNewSession(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		ns := s.three()
		first := ns[0].mustClaim("id")
		eventually(t, sweepEvery, "no sweep under way", ns[0].swept)
		ns[0].proxy.Refuse()
		ns[0].proxy.Cut()
		second := ns[1].mustClaim("id", WithoutProbe())
		ns[0].proxy.Accept()
		eventually(t, 2*time.Second, "back", func() bool { return ns[0].Ready() == nil })
		p := ns[0].mustDial("id")
		if got, want := p.link.Session(), second.session(); got != want {
			t.Errorf("phone: got session %s, want %s", got, want)
		}
		wantErr(t, "incumbent", within(t, sweepEvery-time.Second, "eviction", first.evicted), ErrDisplaced)
		s.wantHolder(second)
	})
}

// No sweep that began before the disturbance says what happened in it.
func TestDisturbedDuringASweep_TablesStayAHint(t *testing.T) {
	calmWorld(t, func(w *simWorld) {
		n := w.nodes[0]
		if !n.swept() {
			t.Fatal("not swept in a calm")
		}
		n.sweepSoon()
		// It knows what it is about within two calls of the KV of at most two simDelays each,
		// makes five, of one at least, and the next one comes sweepPause later.
		w.sleep(4*simDelay + simDelay/2)
		n.port.disturb()
		w.sleep(6 * simDelay)
		if n.swept() {
			t.Error("swept by a sweep that began before")
		}
		w.sleep(time.Second)
		if !n.swept() {
			t.Error("not swept a second later")
		}
	})
}

// A sweep that is asked for while the node is not ready begins soon after it is, and not
// with the next tick.
func TestDisturbedWhileNotReady_SweepsSoonAfter(t *testing.T) {
	calmWorld(t, func(w *simWorld) {
		n := w.nodes[0]
		for range 3 { // a tick may fall into one of these
			n.port.setState(portAway)
			n.doubt()
			w.sleep(sweepPause / 2)
			n.port.net.mu.Lock()
			n.port.state = portLinked // nobody asks for another one
			n.port.net.mu.Unlock()
			w.sleep(leaseRetry + 3*sweepPause) // the longest pauses of a sweep that the fault met
			if !n.swept() {
				t.Error("no sweep although the node is ready again")
			}
			w.sleep(time.Second)
		}
	})
}

// A node that has drained sends phones to look again: what it held is in its grace.
func TestStoppedNode_DoesNotSayThatNobodyHolds(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		n := s.node()
		n.mustClaim("id").release()
		n.Stop(t.Context())
		if _, _, err := n.Open(n.Bus().NewLink("id", "conn", newInbox())); !errors.Is(err, bus.ErrNodeGone) {
			t.Errorf("Open: %v, want ErrNodeGone", err)
		}
	})
}
