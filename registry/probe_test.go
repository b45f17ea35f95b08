package registry

import (
	"context"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// slowPing is a binary's ping whose pongs come when the test says so.
type slowPing struct {
	sent chan func() // one for each ping that is on its way: its pong

	mu    sync.Mutex
	pings int
}

func newSlowPing() *slowPing { return &slowPing{sent: make(chan func(), 16)} }

func (p *slowPing) ping(ctx context.Context) error {
	answered := make(chan struct{})
	p.mu.Lock()
	p.pings++
	p.mu.Unlock()
	p.sent <- func() { close(answered) }
	select {
	case <-answered:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (p *slowPing) count() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.pings
}

// claimBeside begins a claim that the incumbent's pong will decide.
func claimBeside(r *Registry) <-chan error {
	result := make(chan error, 1)
	go func() { result <- r.ClaimServer("id", newConn()) }()
	return result
}

// A pong proves nothing to a claim that came when its ping was on its way already:
// the binary may have died in between. That claim waits for the pong to the next.
func TestClaimDuringAPing_WaitsForTheNext(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		s.cfg.ProbeTimeout = 10 * time.Second
		ns := s.three()
		p := newSlowPing()
		ns[0].mustClaim("id", WithPing(p.ping))
		first := claimBeside(ns[1].Registry)
		firstPong := within(t, 5*time.Second, "first ping", p.sent)
		second := claimBeside(ns[2].Registry)
		secondPong := within(t, 5*time.Second, "second ping, for the second claim", p.sent)
		firstPong()
		wantErr(t, "the claim before the first ping", within(t, 5*time.Second, "decision", first), ErrServerIDConflict)
		wantQuiet(t, "the claim after it, before the second pong", second)
		secondPong()
		wantErr(t, "the claim after it", within(t, 5*time.Second, "decision", second), ErrServerIDConflict)
	})
}

// The binary dies between the two: its last pong must not refuse the second claim.
func TestBinaryDiesDuringAPing_ClaimSucceeds(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		ns := s.three()
		p := newSlowPing()
		ns[0].mustClaim("id", WithPing(p.ping))
		first := claimBeside(ns[1].Registry)
		lastPong := within(t, 5*time.Second, "first ping", p.sent)
		second := claimBeside(ns[2].Registry)
		within(t, 5*time.Second, "second ping, for the second claim", p.sent)
		lastPong()
		wantErr(t, "the claim before", within(t, 5*time.Second, "decision", first), ErrServerIDConflict)
		wantErr(t, "the claim after", within(t, 10*time.Second, "decision", second), nil)
	})
}

// The same to the instant: whoever comes while a ping is on its way shares the next,
// and nobody is refused before that has its pong.
func TestClaimsDuringAPing_ShareTheNext(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newSimWorld(1)
		for i := range w.nodes {
			w.startNode(i)
		}
		pause(t.Context(), time.Second)
		p := newSlowPing()
		if err := w.nodes[0].ClaimServer("id", newConn(), WithPing(p.ping)); err != nil {
			t.Fatal(err)
		}
		first := claimBeside(w.nodes[1].Registry)
		pause(t.Context(), probeEvery/3) // for what it asks the KV and the node
		firstPong := <-p.sent
		var late []<-chan error
		for _, n := range w.nodes {
			late = append(late, claimBeside(n.Registry))
		}
		pause(t.Context(), probeEvery/3)
		firstPong()
		wantErr(t, "the claim before the first ping", <-first, ErrServerIDConflict)
		synctest.Wait()
		for _, c := range late {
			wantQuiet(t, "a claim after it, before the second ping", c)
		}
		secondPong := <-p.sent
		synctest.Wait()
		for _, c := range late {
			wantQuiet(t, "a claim after it, before the second pong", c)
		}
		secondPong()
		for _, c := range late {
			wantErr(t, "a claim after it", <-c, ErrServerIDConflict)
		}
		if got := p.count(); got != 2 {
			t.Errorf("%d pings, want 2 for all", got)
		}
		for _, n := range w.all {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			n.Stop(ctx)
			cancel()
		}
	})
}

// A node that goes while its binary is being asked takes the question with it: the
// claim finds that out, and does not wait for an answer.
func TestHolderNodeDiesUnderAChallenge_ClaimSucceedsSoon(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		s.cfg.ProbeTimeout = 10 * time.Second
		ns := s.three()
		asked := make(chan struct{}, 8)
		ns[0].mustClaim("id", WithPing(func(ctx context.Context) error {
			asked <- struct{}{}
			<-ctx.Done()
			return ctx.Err()
		}))
		b, result := ns[1].newBinary("id"), make(chan error, 1)
		go func() { result <- b.claim() }()
		within(t, 5*time.Second, "the incumbent is asked", asked)
		ns[0].kill()
		wantErr(t, "the claim", within(t, 5*time.Second, "the claim is decided", result), nil)
		s.wantHolder(b)
	})
}
