package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pyrycode/pyrycode-relay/testenv"
)

// The NATS cluster splits for longer than a lease, and closes nothing: one server is
// alone, with the node that is beside it; the other two have the rest. If it was the
// leader, it goes on answering reads with what it knew.
func TestNATSSplit_ForLongerThanALease(t *testing.T) { // alone: three NATS servers under the race detector elect leaders
	for name, leaderAlone := range map[string]bool{"the leader alone": true, "another one alone": false} {
		t.Run(name, func(t *testing.T) { splitNATS(t, leaderAlone) })
	}
}

// splitGrace is the grace of the nodes in that.
const splitGrace = 4 * time.Second

func splitNATS(t *testing.T, leaderAlone bool) {
	ctx := scenarioContext(t, 3*time.Minute)
	trio, err := testenv.StartCluster(testenv.ClusterOptions{Name: "split", Proxied: true, Detector: detector})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(trio.Close)
	var direct []string // a proxy would cut the node off as well
	for _, s := range trio.Servers {
		direct = append(direct, s.DirectURL())
	}
	p := place{kv: lookInto(t, strings.Join(direct, ","))}
	for i := range p.nodes {
		p.nodes[i] = startProcess(t, p.flags(i, direct[i], "--lease-ttl", shortLease.String(), "--grace", splitGrace.String())...)
	}
	alone := 0
	for leader := p.kv.leader(ctx, t); (trio.Servers[alone].Name() == leader) != leaderAlone; {
		alone++
	}
	few, second, third := p.nodes[alone], p.nodes[(alone+1)%3], p.nodes[(alone+2)%3]
	aloneNode := fmt.Sprintf("node-%d", alone+1)
	majority := kvView{js: lookInto(t, direct[(alone+1)%3]+","+direct[(alone+2)%3]).js, prefix: p.kv.prefix}

	movedID, stayedID, thereID := randomUUID(), randomUUID(), randomUUID()
	old := dialBinary(ctx, t, few, movedID)
	nearPhone, farPhone := dialPhone(ctx, t, few, movedID), dialPhone(ctx, t, second, movedID)
	meet(ctx, t, nearPhone, old, "before")
	meet(ctx, t, farPhone, old, "before")
	stayed := converseAcross(ctx, t, few, few, stayedID)
	there := converseAcross(ctx, t, second, third, thereID)
	hereID, overThereID := randomUUID(), randomUUID()
	here, overThere := dialBinary(ctx, t, few, hereID), dialBinary(ctx, t, second, overThereID)
	go echo(ctx, here)
	go echo(ctx, overThere)
	lasts(ctx, time.Now(), shortLease) // whoever concludes from a lease must have seen a whole one

	// Phones dial binaries that they can reach, all the time, on both sides.
	told := make(map[*node]*tally)
	var dialling sync.WaitGroup
	untilBack, stop := context.WithCancel(ctx)
	defer stop()
	for _, d := range []struct {
		at       *node
		serverID string
		binary   *testenv.Binary
	}{{few, hereID, here}, {third, overThereID, overThere}, {second, overThereID, overThere}} {
		of := new(tally)
		told[d.at] = of
		dialling.Go(func() {
			for p.find(untilBack, t, of, d.at, d.serverID, d.binary) {
				lasts(untilBack, time.Now(), 5*talkEvery)
			}
		})
	}

	split := time.Now()
	trio.Isolate(alone)
	again := dialBinaryAgain(ctx, t, third, movedID)
	t.Logf("the binary had its server-id on the other side after %v", sinceMS(split))
	if got, err := farPhone.Closed(within(ctx, t, split, electionTime+lapseTime+slack)); err != nil || got.Code != 4404 {
		t.Errorf("its phone on the other side: got %v (%v), want 4404", got, err)
	}
	phone := dialUntilUpgraded(ctx, t, second, movedID) // whose own lease may be back a little later
	if phone == nil {
		t.FailNow()
	}
	meet(ctx, t, phone, again, "on the other side")
	lasts(ctx, split, shortLease+linkLimit)
	wantUnready(ctx, t, few, "lease not renewed")
	stayed.wantGoingOn(ctx, t, "on the smaller side")
	there.wantGoingOn(ctx, t, "on the larger side")
	// Reaped, and its grace is over: a node whose own lease has been whole again for a
	// TTL does it, at its second sweep if it is not the first of them.
	forgotten := electionTime + shortLease + 2*sweepTime + splitGrace + lapseTime + slack
	majority.await(within(ctx, t, split, forgotten), t, hereID, "nothing")

	healed := time.Now()
	trio.Heal(alone)
	back := within(ctx, t, healed, backWithin)
	eventually(back, t, "readiness", func() bool { return isReady(t, few) })
	// Who was alone has stood for election all the while, and makes the others elect
	// again: until then the KV does not answer.
	eventually(within(ctx, t, healed, electionTime+slack), t, "whole KV", func() bool { return majority.whole(ctx) })
	ready := time.Now()
	back = within(ctx, t, ready, backWithin)
	t.Logf("the node alone was ready %v after the end", sinceMS(healed))
	swept := within(ctx, t, ready, sweepTime+slack)
	wantEnd(swept, t, "the old binary", old, 1011, "heartbeat timeout")
	if got, err := nearPhone.Closed(swept); err != nil || got.Code != 4404 {
		t.Errorf("its phone: got %v (%v), want 4404", got, err)
	}
	t.Logf("what was superseded was closed %v after the end", sinceMS(healed))
	for _, id := range []string{stayedID, hereID} {
		majority.await(swept, t, id, "held by "+aloneNode)
	}
	go echo(ctx, again)
	for i, n := range p.nodes {
		if after := new(tally); !p.find(back, t, after, n, movedID, again) {
			t.Errorf("phones that dial node-%d for the binary that moved: %v, want one that meets it", i+1, after.all())
		}
	}
	stop()
	dialling.Wait()
	for i, n := range p.nodes {
		t.Logf("phones that dialled node-%d: %v", i+1, told[n].all())
		told[n].want(t, "phone: met", "phone: 503", "phone: 1011 relay link lost", "phone: no time was left")
		if told[n].all()["phone: met"] == 0 {
			t.Errorf("no phone that dialled node-%d met its binary", i+1)
		}
	}
	smokeBetween(t, p.nodes[:]...)
	stayed.wantWhole(ctx, t, "the pair on the smaller side")
	there.wantWhole(ctx, t, "the pair on the larger side")
}

// dialBinaryAgain dials as real binaries do until one has its server-id: they back off
// when their dial is refused, and nothing else may become of it here.
func dialBinaryAgain(ctx context.Context, t *testing.T, n *node, serverID string) *testenv.Binary {
	t.Helper()
	for {
		b, err := testenv.DialBinary(ctx, n.url, testenv.BinaryOptions{ServerID: serverID})
		if err == nil {
			t.Cleanup(b.Drop)
			return b
		}
		if refused := new(testenv.RefusedError); !errors.As(err, &refused) || refused.Status != 503 && refused.Status != 429 {
			t.Fatalf("the binary dials again: %v, want 101, 503 or 429", err)
		}
		lasts(ctx, time.Now(), slack/4)
	}
}
