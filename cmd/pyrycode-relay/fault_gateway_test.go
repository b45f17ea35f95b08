package main

// A gateway dies, freezes, or loses its NATS.   (protocol.md: Life of a claim, 7)

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/pyrycode/pyrycode-relay/testenv"
)

// A killed gateway's binaries are back at their first dial, everybody else knows
// within 5 s, and the KV forgets it: its lease, then its claims, by way of grace.
func TestGatewayKilled_AllKnowAndTheKVForgets(t *testing.T) {
	t.Parallel()
	const movers = 20
	const grace = 2 * time.Second
	ctx := scenarioContext(t, time.Minute)
	p := startPlace(t, calmNATS.get(t), "--lease-ttl", shortLease.String(), "--grace", grace.String())
	victim, others := p.nodes[0], p.nodes[1:]

	type mover struct {
		serverID string
		binary   *testenv.Binary
		phone    *testenv.Phone // on another node
	}
	var moving [movers]mover
	for i := range moving {
		id := randomUUID()
		moving[i] = mover{id, dialBinary(ctx, t, victim, id), dialPhone(ctx, t, others[i%2], id)}
		meet(ctx, t, moving[i].phone, moving[i].binary, "before")
	}
	leftID, farID := randomUUID(), randomUUID()
	left := dialBinary(ctx, t, victim, leftID) // it never comes back
	phoneOfLeft, silentPhone := dialPhone(ctx, t, others[0], leftID), dialPhone(ctx, t, others[1], leftID)
	meet(ctx, t, phoneOfLeft, left, "before")
	far := dialBinary(ctx, t, others[0], farID)
	lostConnID := meet(ctx, t, dialPhone(ctx, t, victim, farID), far, "before")

	killed := time.Now()
	victim.kill(t)

	var redials sync.WaitGroup
	took := make([]time.Duration, movers)
	for i := range moving {
		redials.Go(func() {
			m := &moving[i]
			if _, err := m.binary.Closed(ctx); err != nil {
				t.Error(err)
				return
			}
			again, err := testenv.DialBinary(ctx, others[(i+1)%2].url, testenv.BinaryOptions{ServerID: m.serverID})
			if err != nil {
				t.Errorf("binary %d at its first dial: %v, want its server-id", i, err)
				return
			}
			m.binary, took[i] = again, time.Since(killed)
			t.Cleanup(again.Drop)
		})
	}
	redials.Wait()
	if t.Failed() {
		t.FailNow()
	}
	slowest := time.Duration(0)
	for _, d := range took {
		slowest = max(slowest, d)
	}
	t.Logf("%d binaries were back at their first dial, the last one after %v", movers, slowest.Round(time.Millisecond))
	if slowest > time.Second+slack {
		t.Errorf("the last binary was back after %v, want 1 s", slowest)
	}

	soon := within(ctx, t, killed, knownWithin+slack)
	wantEnd(soon, t, "the phone of a binary that is gone", phoneOfLeft, 4404, "binary's gateway is gone")
	wantEnd(soon, t, "its phone that never sent", silentPhone, 4404, "binary's gateway is gone")
	for i, m := range moving {
		if got, err := m.phone.Closed(soon); err != nil || got.Code != 4404 {
			t.Errorf("phone of binary %d, which moved: got %v (%v), want 4404", i, got, err)
		}
	}
	if e, err := far.NextEnvelope(soon); err != nil || e.ConnID != lostConnID || e.CloseCode != 1001 || e.Frame != nil {
		t.Errorf("the binary of a phone on the dead node: got %s (%v), want the close notice with 1001", describe(e), err)
	}
	t.Logf("all others knew after %v", sinceMS(killed))

	p.kv.await(within(ctx, t, killed, shortLease+lapseTime+sweepTime+slack), t, leftID, "grace by node-1")
	t.Logf("the claim of the binary that did not come back was in grace after %v", sinceMS(killed))
	p.kv.await(within(ctx, t, killed, shortLease+lapseTime+sweepTime+grace+lapseTime+slack), t, leftID, "nothing")
	t.Logf("and gone after %v", sinceMS(killed))
	wantEnd(ctx, t, "a phone that dials then", dialPhone(ctx, t, others[0], leftID), 4404, "no server with that id")
	for i, m := range moving {
		meet(ctx, t, dialPhone(ctx, t, others[i%2], m.serverID), m.binary, "after")
	}
}

// A frozen gateway is as good as dead once its lease has lapsed, and notices when it
// thaws.
func TestGatewayFrozen_ForLongerThanItsLease(t *testing.T) {
	t.Parallel()
	p := place{kv: lookInto(t, calmNATS.get(t).urls())}
	victim := startProcess(t, p.flags(0, "nats://"+calmNATS.get(t)[0].address, lapseFlags...)...)
	lapse(t, p, victim, fault{
		begin: func() { victim.signal(t, syscall.SIGSTOP) },
		heal:  func() { victim.signal(t, syscall.SIGCONT) },
	})
}

// The same for one that is merely cut off from NATS, as by a network that loses every
// packet. It says so, and those who are on it together do not notice.
func TestGatewayCutOffFromNATS_ForLongerThanItsLease(t *testing.T) {
	t.Parallel()
	p := place{kv: lookInto(t, calmNATS.get(t).urls())}
	way, err := testenv.NewProxy(calmNATS.get(t)[0].address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(way.Close)
	victim := startProcess(t, p.flags(0, "nats://"+way.Addr(), lapseFlags...)...)
	lapse(t, p, victim, fault{begin: way.Hold, heal: way.Resume, answers: true})
}

// fault is what makes a gateway's lease lapse.
type fault struct {
	begin, heal func()
	answers     bool // the gateway runs meanwhile
}

var lapseFlags = []string{"--lease-ttl", shortLease.String(), "--grace", "4s", "--ping-interval", "1s", "--pong-timeout", "5s"}

// lapse lets the lease of victim, the first of the three nodes of p, lapse.
func lapse(t *testing.T, p place, victim *node, f fault) {
	t.Helper()
	ctx := scenarioContext(t, 2*time.Minute)
	p.nodes[0] = victim
	for i := 1; i < 3; i++ {
		p.nodes[i] = startProcess(t, p.flags(i, "nats://"+calmNATS.get(t)[i].address, lapseFlags...)...)
	}
	second, third := p.nodes[1], p.nodes[2]
	movedID, stayedID, farID := randomUUID(), randomUUID(), randomUUID()
	old := dialBinary(ctx, t, victim, movedID)
	farPhone, nearPhone := dialPhone(ctx, t, second, movedID), dialPhone(ctx, t, victim, movedID)
	meet(ctx, t, farPhone, old, "before")
	meet(ctx, t, nearPhone, old, "before")
	stayed := converseAcross(ctx, t, victim, victim, stayedID)
	far := dialBinary(ctx, t, third, farID)
	strayPhone := dialPhone(ctx, t, victim, farID)
	strayConnID := meet(ctx, t, strayPhone, far, "before")

	// Whoever concludes from a lease must have seen a whole one.
	lasts(ctx, time.Now(), shortLease)
	begun := time.Now()
	f.begin()

	again, refusals := redial(ctx, t, second, movedID)
	t.Logf("the binary had its server-id elsewhere after %v and %d times 503", sinceMS(begun), refusals)
	lapsed := within(ctx, t, begun, shortLease+lapseTime+slack)
	if lapsed.Err() != nil {
		t.Errorf("that is more than the lease of %v, and %v to see its end", shortLease, lapseTime+slack)
	}
	if got, err := farPhone.Closed(lapsed); err != nil || got.Code != 4404 {
		t.Errorf("a phone of that binary elsewhere: got %v (%v), want 4404", got, err)
	}
	if e, err := far.NextEnvelope(lapsed); err != nil || e.ConnID != strayConnID || e.CloseCode != 1001 || e.Frame != nil {
		t.Errorf("the binary of a phone on the node: got %s (%v), want the close notice with 1001", describe(e), err)
	}
	t.Logf("all others knew after %v", sinceMS(begun))
	meet(ctx, t, dialPhone(ctx, t, third, movedID), again, "elsewhere")
	if f.answers {
		wantUnready(ctx, t, victim, "lease not renewed", "not connected to NATS") // whichever clock runs out first
		stayed.wantGoingOn(ctx, t, "without a lease")
	}
	p.kv.await(ctx, t, stayedID, "grace by node-1") // the others hold its binaries for lost
	lasts(ctx, begun, linkLimit+slack)              // and no time-out of its own is left

	// Phones whose dials the node finds when it is back get to the new holder or are
	// told to try again.
	early := make(chan *testenv.Phone)
	for range 4 {
		go func() { early <- dialUntilUpgraded(ctx, t, victim, movedID) }()
	}
	healed := time.Now()
	f.heal()
	for i := range 4 {
		phone := <-early
		if phone == nil {
			continue
		}
		if _, err := exchangeFrames(within(ctx, t, time.Now(), knownWithin), phone, again, fmt.Sprint("early ", i)); err != nil {
			t.Errorf("a phone that the node let in when it was back: %v, want it with the new holder", err)
		}
	}
	t.Logf("phones that dialled the node were with the new holder %v after the end", sinceMS(healed))

	swept := within(ctx, t, healed, natsBack+sweepTime+slack)
	wantEnd(swept, t, "the old binary", old, 1011, "heartbeat timeout")
	if got, err := nearPhone.Closed(swept); err != nil || got.Code != 4404 {
		t.Errorf("its phone on the same node: got %v (%v), want 4404", got, err)
	}
	if got, err := strayPhone.Closed(swept); err != nil || got.Code != 4404 && got.Code != 1011 {
		t.Errorf("a phone whose binary was told that it is gone: got %v (%v), want 4404 or 1011", got, err)
	}
	t.Logf("what was superseded was closed %v after the end", sinceMS(healed))
	p.kv.await(swept, t, stayedID, "held by node-1")
	t.Logf("what was not was in the KV again after %v", sinceMS(healed))

	back := within(ctx, t, healed, backWithin)
	eventually(back, t, "readiness", func() bool { return isReady(t, victim) })
	meet(back, t, dialPhone(back, t, third, movedID), again, "after")
	meet(back, t, dialPhone(back, t, victim, movedID), again, "after")
	stayed.wantWhole(ctx, t, "the pair on the node")
}

// natsBack is how long a node that was cut off takes to find its NATS again: an
// attempt to connect that began before, and the next.
const natsBack = 3 * time.Second

// dialUntilUpgraded dials every pollEvery while the answer is 503. It returns nil if it was
// anything else.
func dialUntilUpgraded(ctx context.Context, t *testing.T, n *node, serverID string) *testenv.Phone {
	for {
		phone, err := testenv.DialPhone(ctx, n.url, testenv.PhoneOptions{ServerID: serverID})
		if err == nil {
			t.Cleanup(phone.Drop)
			return phone
		}
		if refused := new(testenv.RefusedError); !errors.As(err, &refused) || refused.Status != 503 {
			t.Errorf("a phone that dials the node: %v, want an upgrade or 503", err)
			return nil
		}
		lasts(ctx, time.Now(), pollEvery)
	}
}

// A gateway that stops for longer than a pong may take, but not for long enough to
// be missed, loses nobody: their pongs are in its sockets.
func TestGatewayFrozen_ForLessThanItsLease_LosesNobody(t *testing.T) { // alone: its peers have less than a second for their pongs
	const freezes, frozen, roundTrip = 2, 4 * time.Second, time.Second
	ctx := scenarioContext(t, time.Minute)
	p := startPlace(t, calmNATS.get(t), "--ping-interval", roundTrip.String(), "--pong-timeout", (3 * roundTrip).String())
	victim, other := p.nodes[0], p.nodes[1]
	delayed, err := testenv.NewProxy(victim.url[len("ws://"):])
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(delayed.Close)
	victimFar := *victim
	victimFar.url = "ws://" + delayed.Addr()

	var idle []*testenv.Binary
	for range 20 {
		idle = append(idle, dialBinary(ctx, t, &victimFar, randomUUID()))
	}
	talking := map[string]*conversation{
		"both on the node":        converseAcross(ctx, t, victim, victim, randomUUID()),
		"the phone on the node":   converseAcross(ctx, t, victim, other, randomUUID()),
		"the binary on the node":  converseAcross(ctx, t, other, victim, randomUUID()),
		"both on it and far away": converseAcross(ctx, t, &victimFar, &victimFar, randomUUID()),
	}
	delayed.SetDelay(roundTrip / 2) // some pong is always on its way now
	for range freezes {
		start := time.Now()
		victim.signal(t, syscall.SIGSTOP)
		lasts(ctx, start, frozen)
		victim.signal(t, syscall.SIGCONT)
		for who, c := range talking {
			c.wantGoingOn(ctx, t, who+", after the freeze")
		}
	}
	for who, c := range talking {
		c.wantWhole(ctx, t, who)
	}
	for i, b := range idle {
		select {
		case <-b.Done():
			info, _ := b.Closed(ctx)
			t.Errorf("idle binary %d was %v, want it connected", i, info)
		default:
		}
	}
}
