package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"strconv"
	"sync"
	"time"

	hdr "github.com/HdrHistogram/hdrhistogram-go"

	"github.com/pyrycode/pyrycode-relay/testenv"
)

// benchSession is a phone and its binary.
type benchSession struct {
	phone  *testenv.Phone
	binary *testenv.Binary
}

func (s *benchSession) end() {
	if s.phone != nil {
		_ = s.phone.Close(1000, "") // whether the relay answers proves nothing more
	}
	if s.binary != nil {
		_ = s.binary.Close(1000, "")
	}
}

// connectBench dials all sessions, one after the other: a relay lets an address open
// only so many at once. The caller ends those that it returns, with an error too.
func connectBench(ctx context.Context, cfg benchConfig, progress io.Writer) (sessions []*benchSession, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, benchSetup, fmt.Errorf("the sessions are not there after %v", benchSetup))
	defer cancel()
	waiting := false
	patient := func(dial func() error) error {
		for {
			err := dial()
			wait, ok := askedToWait(err)
			if !ok {
				return err
			}
			if !waiting {
				waiting = true
				fmt.Fprintf(progress, "the relay asks to wait (%v): --pairs %d are %d upgrades from this address\n", err, cfg.Pairs, 2*cfg.Pairs)
			}
			select {
			case <-time.After(wait):
			case <-ctx.Done():
				return errors.Join(context.Cause(ctx), err)
			}
		}
	}
	for range cfg.Pairs {
		s, id := new(benchSession), randomUUID()
		sessions = append(sessions, s)
		err := patient(func() (err error) {
			s.binary, err = testenv.DialBinary(ctx, cfg.binaryURL, testenv.BinaryOptions{ServerID: id})
			return err
		})
		if err == nil {
			err = patient(func() (err error) {
				s.phone, err = testenv.DialPhone(ctx, cfg.phoneURL, testenv.PhoneOptions{ServerID: id, DeviceName: "bench"})
				return err
			})
		}
		if err != nil {
			return sessions, err
		}
	}
	return sessions, nil
}

// askedToWait reports for how long a refusal says to wait.
func askedToWait(err error) (time.Duration, bool) {
	refused := new(testenv.RefusedError)
	if !errors.As(err, &refused) || refused.Status != http.StatusTooManyRequests && refused.Status != http.StatusServiceUnavailable {
		return 0, false
	}
	seconds, err := strconv.Atoi(refused.Header.Get("Retry-After"))
	if err != nil || seconds < 1 {
		seconds = 1
	}
	return time.Duration(seconds) * time.Second, true
}

// run sends the session's frames from first on, and returns when all have been
// answered, or the session has ended, or ctx.
func (s *benchSession) run(ctx context.Context, cfg benchConfig, first time.Time, t *benchTally) {
	due := func(n int) time.Time { return first.Add(time.Duration(n) * cfg.interval()) }
	ctx, cancel := context.WithCancel(ctx)
	var others sync.WaitGroup
	defer others.Wait()
	defer cancel()
	others.Go(func() { s.echo(ctx) })
	others.Go(func() {
		for n := range cfg.frames() {
			select {
			case <-time.After(time.Until(due(n))):
			case <-ctx.Done():
				return
			}
			t.sending(time.Since(due(n)))
			if s.phone.Send(ctx, cfg.frame(n)) != nil {
				return // the reader below says how the session ended
			}
		}
	})
	for n := range cfg.frames() {
		got, err := s.phone.Next(ctx)
		switch {
		case err != nil:
			t.end(err)
			return
		case !bytes.Equal(got, cfg.frame(n)):
			t.end(fmt.Errorf("not frame %d came back: a gap, or other bytes", n))
			return
		}
		t.answer(time.Since(due(n)))
	}
}

// echo answers each frame with itself.
func (s *benchSession) echo(ctx context.Context) {
	for {
		e, err := s.binary.NextEnvelope(ctx)
		if err == nil && e.Frame != nil {
			err = s.binary.Send(ctx, e.ConnID, e.Frame)
		}
		if err != nil {
			return // the phone hears of it
		}
	}
}

// benchTally is what has been seen so far. Safe for concurrent use.
type benchTally struct {
	mu             sync.Mutex
	sent, answered int
	ended          map[string]int
	latency, late  *hdr.Histogram // microseconds
}

func newBenchTally() *benchTally {
	const low, high, digits = 1, int64(time.Minute / time.Microsecond), 3
	return &benchTally{ended: make(map[string]int), latency: hdr.New(low, high, digits), late: hdr.New(low, high, digits)}
}

func (t *benchTally) sending(late time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.sent++
	_ = t.late.RecordValue(max(1, late.Microseconds())) // fails above a minute: nothing here lasts so long
}

func (t *benchTally) answer(took time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.answered++
	_ = t.latency.RecordValue(max(1, took.Microseconds())) // as above
}

func (t *benchTally) end(err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.ended[err.Error()]++
}

// tell reports on the way, until stop.
func (t *benchTally) tell(out io.Writer) (stop func()) {
	start, tick, over := time.Now(), time.NewTicker(benchProgress), make(chan struct{})
	var telling sync.WaitGroup
	telling.Go(func() {
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
			case <-over:
				return
			}
			t.mu.Lock()
			fmt.Fprintf(out, "%3.0f s  %d round trips, %d under way, p50 %.2f ms, p99 %.2f ms, %d sessions ended\n", time.Since(start).Seconds(),
				t.answered, t.sent-t.answered, float64(t.latency.ValueAtQuantile(50))/1000, float64(t.latency.ValueAtQuantile(99))/1000, total(t.ended))
			t.mu.Unlock()
		}
	})
	return func() {
		close(over)
		telling.Wait()
	}
}

func total(counts map[string]int) (n int) {
	for _, c := range counts {
		n += c
	}
	return n
}

func (t *benchTally) result(cfg benchConfig) *benchResult {
	t.mu.Lock()
	defer t.mu.Unlock()
	return &benchResult{
		benchConfig: cfg, Sent: t.sent, Answered: t.answered, Lost: t.sent - t.answered, Ended: maps.Clone(t.ended),
		Latency: quantilesOf(t.latency), Late: quantilesOf(t.late),
	}
}
