package main

// NATS goes, in part or as a whole, or forgets.

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/pyrycode/pyrycode-relay/testenv"
)

// Without any NATS, whoever is on one gateway with its binary goes on, whoever is
// not is told, and nothing new is decided. After it, everything is as before, with no
// restart; also if NATS has forgotten all it knew.
func TestNATSOutage_AllServersKilled(t *testing.T) {
	t.Parallel()
	ctx := scenarioContext(t, 3*time.Minute)
	trio := ownTrio(t)
	p := startPlace(t, trio, "--lease-ttl", shortLease.String())
	first, second, third := p.nodes[0], p.nodes[1], p.nodes[2]
	nearID, idleID := randomUUID(), randomUUID()
	near := converseAcross(ctx, t, first, first, nearID)
	far := converseAcross(ctx, t, second, third, randomUUID())
	idle := dialBinary(ctx, t, first, idleID)
	idlePhone := dialPhone(ctx, t, second, idleID)
	meet(ctx, t, idlePhone, idle, "before")
	lasts(ctx, time.Now(), slack) // idle is who waits for no acknowledgement either

	killed := time.Now()
	trio.kill()
	for _, n := range p.nodes {
		// It may find one that is killed a moment later.
		eventually(within(ctx, t, killed, slack), t, "503", func() bool { return !isReady(t, n) })
		wantUnready(ctx, t, n, "NATS")
	}
	wantEnd(within(ctx, t, killed, linkLimit+slack), t, "a phone whose binary is elsewhere", far.phone, 1011, "relay link lost")
	t.Logf("it was closed after %v", sinceMS(killed))
	lasts(ctx, killed, shortLease+linkLimit)
	for _, n := range p.nodes {
		wantUnready(ctx, t, n, "NATS")
	}
	near.wantGoingOn(ctx, t, "without NATS")

	restart := func(what string) {
		t.Helper()
		restarted := time.Now()
		for _, s := range trio {
			s.restart(t)
		}
		for _, s := range trio {
			waitForOK(t, s.health) // elections are NATS' own
		}
		t.Logf("%s: NATS was back after %v", what, sinceMS(restarted))
		back := within(ctx, t, time.Now(), backWithin)
		for _, n := range p.nodes {
			eventually(back, t, "readiness", func() bool { return isReady(t, n) })
		}
		t.Logf("%s: all nodes were ready after %v", what, sinceMS(restarted))
		p.kv.await(back, t, nearID, "held by node-1")
		p.kv.await(back, t, idleID, "held by node-1")
		t.Logf("%s: their binaries were in the KV after %v", what, sinceMS(restarted))
		// An end that waited for nothing hears of the other one's end now.
		eventually(back, t, "close notice", func() bool { return far.notice.Load() != 0 })
		if got := far.notice.Load(); got != 1011 {
			t.Errorf("%s: the binary of the phone that was closed got a close notice with %d, want 1011", what, got)
		}
		meet(back, t, idlePhone, idle, what)
		meet(back, t, dialPhone(back, t, third, idleID), idle, what)
		if back.Err() != nil {
			t.Errorf("%s: not everything worked within %v", what, backWithin)
		}
		p.smoke(ctx, t, what)
	}
	restart("with its store")

	trio.kill()
	for _, s := range trio {
		if err := os.RemoveAll(s.store); err != nil {
			t.Fatal(err)
		}
	}
	restart("without its store")
	near.wantWhole(ctx, t, "the pair on one gateway")
}

// Buckets that an operator deletes are back, with all who are connected, within a
// sweep, and nobody notices.
func TestBucketsDeletedByHand(t *testing.T) {
	t.Parallel()
	const binaries = 50
	ctx := scenarioContext(t, time.Minute)
	p := startPlace(t, calmNATS.get(t))
	var ids []string
	for i := range binaries {
		ids = append(ids, randomUUID())
		dialBinary(ctx, t, p.nodes[i%3], ids[i])
	}
	talking := map[string]*conversation{
		"the pair on one node":  converseAcross(ctx, t, p.nodes[0], p.nodes[0], randomUUID()),
		"the pair on two nodes": converseAcross(ctx, t, p.nodes[1], p.nodes[2], randomUUID()),
	}
	for _, name := range []string{"_presence", "_nodes"} {
		eventually(ctx, t, "bucket deleted", func() bool { // NATS may leave a request without an answer
			ctx, cancel := context.WithTimeout(ctx, answerWithin)
			defer cancel()
			err := p.kv.js.DeleteKeyValue(ctx, p.kv.prefix+name)
			return err == nil || errors.Is(err, jetstream.ErrBucketNotFound)
		})
	}
	deleted := time.Now()
	eventually(within(ctx, t, deleted, backWithin), t, "bucket", func() bool { return p.kv.whole(ctx) })
	answers := time.Now()
	swept := within(ctx, t, answers, sweepTime+slack)
	eventually(swept, t, "entries of everybody", func() bool { // at once: each takes two answers of NATS
		var asks sync.WaitGroup
		var there atomic.Int32
		for i, id := range ids {
			asks.Go(func() {
				if p.kv.presence(swept, id) == fmt.Sprintf("held by node-%d", i%3+1) {
					there.Add(1)
				}
			})
		}
		asks.Wait()
		return there.Load() == binaries
	})
	t.Logf("the KV answered %v after the buckets were deleted, and had everybody %v after that", answers.Sub(deleted).Round(time.Millisecond), sinceMS(answers))
	for _, n := range p.nodes {
		eventually(swept, t, "readiness", func() bool { return isReady(t, n) })
	}
	for who, c := range talking {
		c.wantWhole(ctx, t, who)
	}
}

// NATS servers die one by one, each back before the next: sessions go on, claims are
// decided rightly or not at all.
func TestNATSServersKilled_OneByOne(t *testing.T) {
	t.Parallel()
	ctx := scenarioContext(t, 3*time.Minute)
	trio := ownTrio(t)
	p := startPlace(t, trio)
	near := converseAcross(ctx, t, p.nodes[0], p.nodes[0], randomUUID())
	far := converseAcross(ctx, t, p.nodes[1], p.nodes[2], randomUUID())
	for _, s := range trio {
		what := s.name + " killed"
		if p.kv.leader(ctx, t) == s.name {
			what += ", the leader"
		}
		killed := time.Now()
		s.kill()
		p.claimUntilDecided(ctx, t, killed, what)
		s.restart(t)
		waitForOK(t, s.health) // caught up: two that lack the same entry would be one too many
		far.wantGoingOn(ctx, t, what)
	}
	near.wantWhole(ctx, t, "the pair on one node")
	far.wantWhole(ctx, t, "the pair on two nodes")
}

// The leader of the claims stops in the middle of its work, and closes nothing. The
// others elect a new one, which takes up to 9 s, and the old one returns.
func TestNATSLeaderFrozen(t *testing.T) {
	t.Parallel()
	ctx := scenarioContext(t, 3*time.Minute)
	trio := ownTrio(t)
	p := startPlace(t, trio)
	near := converseAcross(ctx, t, p.nodes[0], p.nodes[0], randomUUID())
	name := p.kv.leader(ctx, t)
	leader := trio[slices.IndexFunc(trio[:], func(s *natsProcess) bool { return s.name == name })]

	frozen := time.Now()
	leader.signal(t, syscall.SIGSTOP)
	p.claimUntilDecided(ctx, t, frozen, "the leader frozen")
	lasts(ctx, frozen, linkLimit+slack)
	thawed := time.Now()
	leader.signal(t, syscall.SIGCONT)
	p.claimUntilDecided(ctx, t, thawed, "the old leader back")
	waitForOK(t, leader.health)
	for _, n := range p.nodes {
		eventually(within(ctx, t, thawed, backWithin), t, "readiness", func() bool { return isReady(t, n) })
	}
	smokeBetween(t, p.nodes[:]...)
	near.wantWhole(ctx, t, "the pair on one node")
}

// Two of three NATS servers are gone. The third one takes every message, and its
// buckets can be read, but nothing can be written: the nodes notice by their leases,
// although they are connected, and whoever does not need the KV goes on.
func TestNATSWithoutMajority_NothingCanBeWritten(t *testing.T) {
	t.Parallel()
	ctx := scenarioContext(t, 3*time.Minute)
	trio := ownTrio(t)
	p := place{kv: lookInto(t, trio.urls())}
	for i := range p.nodes {
		p.nodes[i] = startProcess(t, p.flags(i, "nats://"+trio[2].address, "--lease-ttl", shortLease.String())...)
	}
	near := converseAcross(ctx, t, p.nodes[0], p.nodes[0], randomUUID())
	far := converseAcross(ctx, t, p.nodes[1], p.nodes[2], randomUUID())
	idleID := randomUUID()
	idle := dialBinary(ctx, t, p.nodes[0], idleID)

	killed := time.Now()
	trio[0].kill()
	trio[1].kill()
	noticed := within(ctx, t, killed, shortLease*3/4+slack)
	for _, n := range p.nodes {
		eventually(noticed, t, "503", func() bool { return !isReady(t, n) })
	}
	t.Logf("all nodes had noticed after %v", sinceMS(killed))
	lasts(ctx, killed, shortLease+linkLimit)
	for _, n := range p.nodes {
		wantUnready(ctx, t, n, "lease not renewed") // and not that the connection is lost
	}
	near.wantGoingOn(ctx, t, "without a majority")
	far.wantGoingOn(ctx, t, "without a majority")

	trio[0].restart(t)
	trio[1].restart(t)
	for _, s := range trio {
		waitForOK(t, s.health) // elections are NATS' own
	}
	restarted := time.Now()
	back := within(ctx, t, restarted, backWithin)
	for _, n := range p.nodes {
		eventually(back, t, "readiness", func() bool { return isReady(t, n) })
	}
	p.kv.await(back, t, idleID, "held by node-1")
	meet(back, t, dialPhone(back, t, p.nodes[2], idleID), idle, "after")
	if back.Err() != nil {
		t.Errorf("not everything worked within %v", backWithin)
	}
	t.Logf("everything worked %v after NATS did", sinceMS(restarted))
	p.smoke(ctx, t, "after")
	near.wantWhole(ctx, t, "the pair on one node")
	far.wantWhole(ctx, t, "the pair on two nodes")
}

// smoke has everybody meet who has never been there, which takes its own time: only the
// leader of the claims knows who is absent, and NATS says that it is well without one.
func (p place) smoke(ctx context.Context, t *testing.T, what string) {
	t.Helper()
	start := time.Now()
	eventually(within(ctx, t, start, electionTime+slack), t, "whole KV", func() bool { return p.kv.whole(ctx) })
	t.Logf("%s: the KV was whole %v later", what, sinceMS(start))
	smokeBetween(t, p.nodes[:]...)
}

// claimUntilDecided has six binaries claim until each has its server-id and a phone
// elsewhere has met it, as soon as NATS can have a leader again. Three try one node
// again and again, three go round. All that they may be told before is 503, in time, 429
// by a node that they ask too often, and 1011: what the KV does not answer is not decided, least of all by 4409 or 4404.
func (p place) claimUntilDecided(ctx context.Context, t *testing.T, since time.Time, what string) {
	t.Helper()
	ctx = within(ctx, t, since, electionTime+answerWithin)
	var told tally
	var claims sync.WaitGroup
	for i := range 6 {
		claims.Go(func() {
			serverID := randomUUID()
			for at := i; ; at += i / 3 {
				binary := p.claim(ctx, t, &told, p.nodes[at%3], serverID)
				if ctx.Err() != nil {
					t.Errorf("%s: a claim was not decided: %v", what, context.Cause(ctx))
					return
				}
				if binary == nil {
					lasts(ctx, time.Now(), slack/4)
					continue
				}
				if p.find(ctx, t, &told, p.nodes[(at+1)%3], serverID, binary) {
					return
				}
			}
		})
	}
	claims.Wait()
	if took := sinceMS(since); !t.Failed() {
		t.Logf("%s: claims were decided on all nodes after %v; %v", what, took, told.all())
	}
	told.want(t, "binary: 101", "binary: 503", "binary: 429", "binary: 1011 claim undecided", "phone: met", "phone: 503", "phone: 1011 relay link lost")
}

// claim dials once. It returns nil if the binary was refused.
func (p place) claim(ctx context.Context, t *testing.T, told *tally, n *node, serverID string) *testenv.Binary {
	start := time.Now()
	binary, err := testenv.DialBinary(ctx, n.url, testenv.BinaryOptions{ServerID: serverID})
	if took := time.Since(start); took > answerWithin+slack {
		t.Errorf("an upgrade was answered after %v, want %v at most", took, answerWithin)
	}
	if err != nil {
		told.add("binary: " + refusalText(ctx, err))
		return nil
	}
	told.add("binary: 101")
	t.Cleanup(binary.Drop)
	go echo(ctx, binary)
	return binary
}

// find has phones dial until one has met binary, and hangs up. It returns false if that was closed.
func (p place) find(ctx context.Context, t *testing.T, told *tally, n *node, serverID string, binary *testenv.Binary) bool {
	for ctx.Err() == nil {
		select {
		case <-binary.Done():
			info, _ := binary.Closed(ctx)
			told.add(fmt.Sprintf("binary: %d %s", info.Code, info.Reason))
			return false
		default:
		}
		phone, err := testenv.DialPhone(ctx, n.url, testenv.PhoneOptions{ServerID: serverID})
		if err != nil {
			told.add("phone: " + refusalText(ctx, err))
			lasts(ctx, time.Now(), talkEvery)
			continue
		}
		t.Cleanup(phone.Drop)
		err = phone.Send(ctx, []byte(`"`+markFrame+`"`))
		if err == nil {
			_, err = phone.Next(ctx)
		}
		if err == nil {
			told.add("phone: met")
			phone.Drop()
			return true
		}
		if info, err := phone.Closed(ctx); err == nil {
			told.add(fmt.Sprintf("phone: %d %s", info.Code, info.Reason))
		}
	}
	return false
}
