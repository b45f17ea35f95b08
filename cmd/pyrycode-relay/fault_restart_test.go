package main

// Every gateway is restarted, again and again, under clients that redial as the real
// ones do.

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/pyrycode/pyrycode-relay/testenv"
)

func TestRollingRestarts_FiveRounds(t *testing.T) {
	t.Parallel()
	const rounds, binaries, phonesEach = 5, 8, 2
	ctx := scenarioContext(t, 3*time.Minute)
	trio := calmNATS.get(t)
	p, f := place{kv: lookInto(t, trio.urls())}, new(fleet)
	start := func(i int) {
		p.nodes[i] = startProcess(t, p.flags(i, trio.urls(), "--insecure-listen", f.addresses[i])...)
	}
	for i, port := range freePorts(t, len(p.nodes)) {
		f.addresses[i] = fmt.Sprintf("127.0.0.1:%d", port)
		start(i)
	}
	var clients sync.WaitGroup
	living, end := context.WithCancel(ctx)
	defer clients.Wait()
	defer end()
	serverIDs := make([]string, binaries)
	for i := range serverIDs {
		serverIDs[i] = randomUUID()
		clients.Go(func() { f.keepBinary(living, serverIDs[i], i) })
	}
	eventually(ctx, t, "claim of every binary", func() bool { return f.told.all()["binary dials a living node: 101"] == binaries })
	var phones []*restlessPhone
	for i, serverID := range serverIDs {
		for j := range phonesEach {
			phone := &restlessPhone{serverID: serverID}
			phones = append(phones, phone)
			clients.Go(func() { f.keepPhone(living, phone, i+j+1) })
		}
	}
	allTalk := func(after time.Time, when string) {
		t.Helper()
		for _, phone := range phones {
			eventually(within(ctx, t, after, backWithin), t, "session of every phone "+when, func() bool { return phone.talked.Load() > after.UnixNano() })
		}
	}
	allTalk(time.Now(), "at first")

	var slowest time.Duration
	for round := range rounds {
		for i, old := range p.nodes { // those that the round began with
			signalled := time.Now()
			f.restarts[i].Add(1)
			old.signal(t, syscall.SIGTERM)
			if status := old.exit(t, 10*time.Second); !status.Exited() || status.ExitStatus() != 0 {
				t.Errorf("round %d, node %d: exit %d, signal %v; want 0", round, i+1, status.ExitStatus(), status.Signal())
			}
			start(i)
			f.restarts[i].Add(1)
			allTalk(time.Now(), fmt.Sprintf("in round %d, node %d", round, i+1))
			slowest = max(slowest, time.Since(signalled))
		}
	}
	t.Logf("%d restarts, each with everybody's session back after %v at most", rounds*len(p.nodes), slowest.Round(time.Millisecond))
	t.Logf("clients were told: %v", f.told.all())
	f.told.want(t,
		"binary dials a living node: 101", "binary closed: 1001 shutting down",
		"phone dials a living node: 101", "phone closed: 1001 shutting down", "phone closed: 4404 binary reclaimed server-id",
		"phone closed: 4404 binary's gateway is gone", "phone closed: 4404 binary is away",
	)
}

// fleet is clients behind a load balancer that finds a living node: one that refuses
// because it is leaving is not counted, and the next one is dialled at once.
type fleet struct {
	addresses [3]string       // host:port
	restarts  [3]atomic.Int64 // odd from the signal until the node is ready again
	told      tally
}

// dial calls try with one address after the other until it succeeds. It returns false
// if ctx ended first.
func (f *fleet) dial(ctx context.Context, who string, at int, try func(address string) error) bool {
	for ; ctx.Err() == nil; at++ {
		i := at % len(f.addresses)
		before := f.restarts[i].Load()
		err := try("ws://" + f.addresses[i])
		living := before%2 == 0 && f.restarts[i].Load() == before
		switch {
		case err == nil && living:
			f.told.add(who + " dials a living node: 101")
		case err != nil && living && ctx.Err() == nil:
			f.told.add(who + " dials a living node: " + refusalText(ctx, err))
		}
		if err == nil {
			return true
		}
	}
	return false
}

// keepBinary is a daemon: it redials at once, and answers.   (clients.md: Daemon)
func (f *fleet) keepBinary(ctx context.Context, serverID string, at int) {
	for ; ctx.Err() == nil; at++ {
		var binary *testenv.Binary
		if !f.dial(ctx, "binary", at, func(address string) (err error) {
			binary, err = testenv.DialBinary(ctx, address, testenv.BinaryOptions{ServerID: serverID})
			return err
		}) {
			return
		}
		echo(ctx, binary)
		f.toldEnd(ctx, "binary", binary.Peer)
	}
}

// restlessPhone talks whenever it can.
type restlessPhone struct {
	serverID string
	talked   atomic.Int64 // when the last exchange began that was completed, in Unix nanoseconds
}

// keepPhone is a phone app whose sessions lasted for a minute: it redials after a
// second, ±20 %.                                             (clients.md: Phones)
func (f *fleet) keepPhone(ctx context.Context, p *restlessPhone, at int) {
	for ; ctx.Err() == nil; at++ {
		var phone *testenv.Phone
		if !f.dial(ctx, "phone", at, func(address string) (err error) {
			phone, err = testenv.DialPhone(ctx, address, testenv.PhoneOptions{ServerID: p.serverID})
			return err
		}) {
			return
		}
		if err := p.talk(ctx, phone); err != nil {
			f.told.add("phone: " + err.Error())
		}
		f.toldEnd(ctx, "phone", phone.Peer)
		lasts(ctx, time.Now(), 800*time.Millisecond+rand.N(400*time.Millisecond))
	}
}

// talk exchanges numbered frames until the connection ends. It returns an error if one
// was not the next.
func (p *restlessPhone) talk(ctx context.Context, phone *testenv.Phone) error {
	tick := time.NewTicker(5 * talkEvery)
	defer tick.Stop()
	for n := 0; ; n++ {
		start := time.Now()
		want := string(numberedFrame(nil, up, 0, n))
		if err := phone.Send(ctx, []byte(want)); err != nil {
			return nil
		}
		got, err := phone.Next(ctx)
		if err != nil {
			return nil
		}
		if string(got) != want {
			return errors.New("a gap")
		}
		p.talked.Store(start.UnixNano())
		select {
		case <-tick.C:
		case <-phone.Done():
			return nil
		case <-ctx.Done():
			return nil
		}
	}
}

// toldEnd counts how a connection ended, unless the client ended it itself.
func (f *fleet) toldEnd(ctx context.Context, who string, peer *testenv.Peer) {
	info, err := peer.Closed(ctx)
	peer.Drop()
	if err == nil && ctx.Err() == nil {
		f.told.add(fmt.Sprintf("%s closed: %d %s", who, info.Code, info.Reason))
	}
}
