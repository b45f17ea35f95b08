package main

// NATS servers restart one after another, and no link notices.
//                                              (architecture.md: Links)

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/pyrycode/pyrycode-relay/testenv"
)

// restartEvery is how often one of three NATS servers goes, in turn.
const restartEvery = 10 * time.Second

// sessionPace is that of each of two hundred sessions: two cores have room left.
const sessionPace = 300 * time.Millisecond

// For a minute each NATS server in turn goes, in every way that there is, and comes
// back, with two hundred sessions across nodes in the middle of traffic. All live, and
// nothing of them is missing. Once a server has gone, three nodes are on two others:
// what is killed next has both ends of some sessions.
func TestNATSServersRestartedEveryTenSeconds_TwoHundredSessionsLive(t *testing.T) {
	t.Parallel()
	ctx := scenarioContext(t, 4*time.Minute)
	trio := ownTrio(t)
	p := startPlace(t, trio)
	sessions := p.talkAcross(ctx, t, 200)

	begun := time.Now()
	for round, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM, syscall.SIGUSR2, syscall.SIGKILL, syscall.SIGKILL, syscall.SIGKILL} {
		lasts(ctx, begun, time.Duration(round)*restartEvery)
		s := trio[round%len(trio)]
		at := sinceMS(begun)
		s.end(t, sig)
		gone := sinceMS(begun)
		s.restart(t)
		waitForOK(t, s.health)
		t.Logf("%s: %v after %v, gone after %v, caught up after %v; %d sessions live, at most %v between two answers so far",
			s.name, sig, at, gone, sinceMS(begun), sessions.alive(), sessions.longest())
	}
	lasts(ctx, begun, 6*restartEvery)
	for i, n := range p.nodes {
		cut := strings.Count(n.log.String(), "event=nats_disconnected")
		t.Logf("node %d lost its NATS server %d times", i+1, cut)
		if cut == 0 {
			t.Errorf("node %d never lost its NATS server, want the faults to reach it", i+1)
		}
	}
	sessions.wantWhole(ctx, t)
}

// end has the server go by sig, SIGUSR2 being lame duck, and waits for its end.
func (s *natsProcess) end(t *testing.T, sig os.Signal) {
	t.Helper()
	s.signal(t, sig)
	_ = s.command.Wait() // fails after a SIGKILL
	s.command = nil
}

// conversations are many sessions at once.
type conversations []*conversation

// talkAcross begins count conversations, each between two nodes, over all pairs.
func (p place) talkAcross(ctx context.Context, t *testing.T, count int) conversations {
	t.Helper()
	var all conversations
	for i := range count {
		serverID := randomUUID()
		binary := dialBinary(ctx, t, p.nodes[(i+1+i/3%2)%3], serverID)
		all = append(all, beginToConverse(ctx, t, dialPhone(ctx, t, p.nodes[i%3], serverID), binary, sessionPace))
	}
	all.wantGoingOn(ctx, t, "at first")
	return all
}

func (all conversations) alive() (n int) {
	for _, c := range all {
		if !c.over() {
			n++
		}
	}
	return n
}

// longest is the longest time between two answers in any conversation.
func (all conversations) longest() time.Duration {
	longest := int64(0)
	for _, c := range all {
		longest = max(longest, c.longest.Load())
	}
	return time.Duration(longest).Round(time.Millisecond)
}

// wantGoingOn waits until what is sent from now on is answered, where it can be.
func (all conversations) wantGoingOn(ctx context.Context, t *testing.T, when string) {
	t.Helper()
	enough := make(map[*conversation]int64)
	for _, c := range all {
		enough[c] = c.sent.Load() + 2
	}
	all.await(ctx, t, "answer "+when, func(c *conversation) bool { return c.answered.Load() >= enough[c] })
}

// await waits until each conversation has reached a state or is over.
func (all conversations) await(ctx context.Context, t *testing.T, what string, reached func(*conversation) bool) {
	t.Helper()
	for i, c := range all {
		eventually(ctx, t, fmt.Sprintf("%s in session %d", what, i), func() bool { return c.over() || reached(c) })
	}
}

// wantWhole ends the conversations and checks that nothing of any is missing.
func (all conversations) wantWhole(ctx context.Context, t *testing.T) {
	t.Helper()
	all.wantGoingOn(ctx, t, "at the end")
	for _, c := range all {
		c.hangUp()
	}
	all.await(ctx, t, "last answer", func(c *conversation) bool { return c.answered.Load() == c.sent.Load() })

	frames := int64(0)
	for i, c := range all {
		if c.over() {
			t.Errorf("session %d: %v, want every frame in order", i, c.err)
		}
		frames += c.answered.Load()
	}
	t.Logf("%d of %d sessions are whole: %d frames each way, at most %v between two answers", all.alive(), len(all), frames, all.longest())
}

const (
	closers     = 12 // binaries
	closeEvery  = 100 * time.Millisecond
	burstFrames = 200
)

// Binaries close phones right behind a burst of frames, and phones hang up right
// behind one, while NATS servers die: the code comes after every frame.
func TestClose_NeverOvertakesFrames_WhileNATSFails(t *testing.T) {
	t.Parallel()
	const down = 2 * time.Second
	ctx := scenarioContext(t, 2*time.Minute)
	trio := ownTrio(t)
	p := startPlace(t, trio)
	var faults atomic.Int64
	var bursts [2]atomic.Int64
	var told tally
	var all []*closer
	var rounds sync.WaitGroup
	over := make(chan struct{})
	for i := range closers {
		c := &closer{phones: p.nodes[i%3], serverID: randomUUID(), faults: &faults, bursts: &bursts, told: &told}
		c.binary = dialBinary(ctx, t, p.nodes[(i+1+i/3%2)%3], c.serverID)
		all = append(all, c)
		rounds.Go(func() {
			if err := c.run(ctx, over); err != nil {
				t.Errorf("binary %d: %v", i, err)
			}
		})
	}
	for round, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM, syscall.SIGKILL, syscall.SIGKILL} {
		s := trio[round%len(trio)]
		eventually(ctx, t, "bursts are under way", func() bool { return bursts[byBinary].Load() > 0 && bursts[byPhone].Load() > 0 })
		killed := time.Now()
		faults.Add(1)
		s.end(t, sig)
		lasts(ctx, killed, down)
		s.restart(t)
		waitForOK(t, s.health)
	}
	close(over)
	rounds.Wait()

	var closes, met [2]int
	for _, c := range all {
		for i := range closes {
			closes[i] += c.closes[i]
			met[i] += c.met[i]
		}
	}
	t.Logf("%d phones were closed by their binaries, %d with a fault in the middle; %d hung up, %d with a fault in the middle; phones that dialled: %v",
		closes[byBinary], met[byBinary], closes[byPhone], met[byPhone], told.all())
	if met[byBinary] == 0 || met[byPhone] == 0 {
		t.Error("no fault met a burst")
	}
	told.want(t, "attached", "503", "1011 relay link lost")
}

// closer is a binary whose phones come one after another, and are closed by it and
// by themselves in turn.
type closer struct {
	// Static after construction.
	phones   *node
	binary   *testenv.Binary
	serverID string
	faults   *atomic.Int64    // that have begun
	bursts   *[2]atomic.Int64 // under way, by who closes
	told     *tally           // phones that dial

	// Owned by run.
	dials  int
	closes [2]int // by who closed
	met    [2]int // of these, those that a fault fell into
}

const (
	byBinary = iota
	byPhone
)

func (c *closer) run(ctx context.Context, over <-chan struct{}) error {
	tick := time.NewTicker(closeEvery)
	defer tick.Stop()
	for n := 0; ; n++ {
		phone, connID, err := c.attach(ctx, tick, over)
		if phone == nil || err != nil {
			return err
		}
		before, how, code := c.faults.Load(), n%2, 4000+n%900
		c.bursts[how].Add(1)
		if how == byBinary {
			err = c.closePhone(ctx, phone, connID, code)
		} else {
			err = c.hangUp(ctx, phone, connID, code)
		}
		c.bursts[how].Add(-1)
		phone.Drop()
		if err != nil {
			return fmt.Errorf("phone %d: %w", n, err)
		}
		c.closes[how]++
		if c.faults.Load() != before {
			c.met[how]++
		}
	}
}

// attach dials until a phone has been heard by the binary. It returns nil when over
// is closed.
func (c *closer) attach(ctx context.Context, tick *time.Ticker, over <-chan struct{}) (*testenv.Phone, string, error) {
	for {
		select {
		case <-tick.C:
		case <-over:
			return nil, "", nil
		case <-ctx.Done():
			return nil, "", context.Cause(ctx)
		}
		phone, err := testenv.DialPhone(ctx, c.phones.url, testenv.PhoneOptions{ServerID: c.serverID})
		if err != nil {
			c.told.add(refusalText(ctx, err))
			continue
		}
		c.dials++
		connID, err := c.greet(ctx, phone, c.dials)
		if err == nil {
			c.told.add("attached")
			return phone, connID, nil
		}
		phone.Drop()
		info, _ := phone.Closed(ctx) // does not wait
		if info.Code == 1006 {
			return nil, "", err
		}
		c.told.add(fmt.Sprintf("%d %s", info.Code, info.Reason))
	}
}

// greet sends the first frame of a phone. What the binary hears before that is of
// phones that were not let in.
func (c *closer) greet(ctx context.Context, phone *testenv.Phone, n int) (connID string, err error) {
	hello := numberedFrame(nil, up, n, 0)
	if err := phone.Send(ctx, hello); err != nil {
		return "", err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		select {
		case <-phone.Done():
			cancel()
		case <-ctx.Done():
		}
	}()
	for {
		e, err := c.binary.NextEnvelope(ctx)
		if err != nil || bytes.Equal(e.Frame, hello) {
			return e.ConnID, err
		}
		if e.Frame != nil {
			return "", fmt.Errorf("the binary got %s, want %s", e.Frame, hello)
		}
	}
}

// closePhone sends phone a burst, the last frame with the directive to close.
func (c *closer) closePhone(ctx context.Context, phone *testenv.Phone, connID string, code int) error {
	for n := range burstFrames {
		send, frame := c.binary.Send, numberedFrame(nil, down, 0, n)
		if n == burstFrames-1 {
			send = func(ctx context.Context, connID string, frame []byte) error {
				return c.binary.SendClose(ctx, connID, code, frame)
			}
		}
		if err := send(ctx, connID, frame); err != nil {
			return fmt.Errorf("the binary sends frame %d: %w", n, err)
		}
	}
	for n := range burstFrames {
		got, err := phone.Next(ctx)
		if want := numberedFrame(nil, down, 0, n); err != nil || !bytes.Equal(got, want) {
			return fmt.Errorf("the phone got %s (%w), want %s before it is closed", got, err, want)
		}
	}
	got, err := phone.Next(ctx)
	if want := (testenv.CloseInfo{Code: code}); err != want { //nolint:errorlint // it is that, unwrapped
		return fmt.Errorf("the phone got %s (%w), want %v", got, err, want)
	}
	return nil
}

// hangUp sends a burst from phone, which closes its connection behind it.
func (c *closer) hangUp(ctx context.Context, phone *testenv.Phone, connID string, code int) error {
	for n := range burstFrames {
		if err := phone.Send(ctx, numberedFrame(nil, up, 0, n)); err != nil {
			return fmt.Errorf("the phone sends frame %d: %w", n, err)
		}
	}
	if err := phone.Close(code, ""); err != nil {
		return fmt.Errorf("the phone hangs up: %w", err)
	}
	for n := range burstFrames {
		e, err := c.binary.NextEnvelope(ctx)
		if want := numberedFrame(nil, up, 0, n); err != nil || e.ConnID != connID || !bytes.Equal(e.Frame, want) {
			return fmt.Errorf("the binary got %s (%w), want %s before the notice", e.Raw, err, want)
		}
	}
	e, err := c.binary.NextEnvelope(ctx)
	if err != nil || e.ConnID != connID || e.CloseCode != code || e.Frame != nil {
		return fmt.Errorf("the binary got %s (%w), want the notice with %d", e.Raw, err, code)
	}
	return nil
}
