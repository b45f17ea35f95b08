package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	hdr "github.com/HdrHistogram/hdrhistogram-go"
)

const (
	benchMinFrame = 40               // bytes: its number and what is around it
	benchSetup    = 2 * time.Minute  // for all sessions to be there; an address may open one every 6 s
	benchAnswer   = 10 * time.Second // for the last answer to come
	benchProgress = time.Second
)

// bench measures a deployment as its users meet it: sessions between two relay
// addresses, frames at a fixed rate whatever comes back (open loop), each answered by
// its binary, every byte compared. It exits 0 if nothing was lost.
func bench(args []string, c console) int {
	flags := flag.NewFlagSet("pyrycode-relay bench", flag.ContinueOnError)
	var cfg benchConfig
	flags.StringVar(&cfg.binaryURL, "url", "", "relay address for the binaries, as in ws://127.0.0.1:8080")
	flags.StringVar(&cfg.phoneURL, "url2", "", "relay address for the phones (default: that of the binaries)")
	flags.IntVar(&cfg.Pairs, "pairs", 10, "sessions, each a phone and its binary")
	flags.IntVar(&cfg.Size, "size", 300, "bytes of a frame")
	flags.Float64Var(&cfg.Rate, "rate", 20, "frames a second of each phone")
	flags.DurationVar(&cfg.duration, "for", 10*time.Second, "how long")
	raw := flags.Bool("json", false, "print the result as JSON")
	if code, ok := c.parseTool(flags, args); !ok {
		return code
	}
	if err := cfg.check(); err != nil {
		return c.usageError(err)
	}
	ctx, stop := untilSignal()
	defer stop()
	result, err := runBench(ctx, cfg, c.stderr)
	if err != nil {
		fmt.Fprintf(c.stderr, "pyrycode-relay: %v\n", err)
		if hint := dialHint(err); hint != "" {
			fmt.Fprintf(c.stderr, "hint: %s\n", hint)
		}
		return exitFailed
	}
	if *raw {
		_ = json.NewEncoder(c.stdout).Encode(result) // fails when nobody reads it
	} else {
		result.print(c.stdout)
	}
	if result.Lost > 0 || len(result.Ended) > 0 {
		return exitFailed
	}
	return exitOK
}

// benchConfig is what to do. The exported fields stand in the result.
type benchConfig struct {
	Pairs int     `json:"pairs"`
	Size  int     `json:"frame_bytes"`
	Rate  float64 `json:"frames_per_second"` // of each phone

	binaryURL, phoneURL string
	duration            time.Duration
}

func (c *benchConfig) check() error {
	if err := checkURL(c.binaryURL, "ws", "wss"); err != nil {
		return fmt.Errorf("--url %w", err)
	}
	c.phoneURL = cmp.Or(c.phoneURL, c.binaryURL)
	if err := checkURL(c.phoneURL, "ws", "wss"); err != nil {
		return fmt.Errorf("--url2 %w", err)
	}
	c.binaryURL, c.phoneURL = strings.TrimSuffix(c.binaryURL, "/"), strings.TrimSuffix(c.phoneURL, "/")
	switch {
	case c.Pairs < 1:
		return fmt.Errorf("--pairs %d: want 1 or more", c.Pairs)
	case c.Size < benchMinFrame || c.Size > 256*kib:
		return fmt.Errorf("--size %d: want %d to %d", c.Size, benchMinFrame, 256*kib)
	case !(c.Rate > 0 && c.Rate <= 10_000):
		return fmt.Errorf("--rate %v: want more than 0, 10000 at most", c.Rate)
	case c.duration < time.Second:
		return fmt.Errorf("--for %v: want 1s or more", c.duration)
	}
	return nil
}

// frames is how many frames each phone sends.
func (c *benchConfig) frames() int { return max(1, int(c.Rate*c.duration.Seconds())) }

// interval lies between two frames of one phone.
func (c *benchConfig) interval() time.Duration { return time.Duration(float64(time.Second) / c.Rate) }

// frame is number n, of the size that was asked for.
func (c *benchConfig) frame(n int) []byte {
	b := fmt.Appendf(make([]byte, 0, c.Size), `{"n":%d,"_":"`, n)
	b = append(b, bytes.Repeat([]byte("x"), c.Size-len(b)-len(`"}`))...)
	return append(b, `"}`...)
}

// benchResult is what came of it. Times are in milliseconds.
type benchResult struct {
	benchConfig
	Seconds  float64        `json:"seconds"`
	Sent     int            `json:"sent"`
	Answered int            `json:"answered"`
	Lost     int            `json:"lost"`
	Ended    map[string]int `json:"ended,omitempty"` // sessions that did, and how
	Latency  quantiles      `json:"latency_ms"`      // from when a frame was due to when its answer was there
	Late     quantiles      `json:"send_late_ms"`    // how late this program was: latencies below mean little
}

// quantiles are those of a histogram of microseconds, in milliseconds.
type quantiles struct {
	P50  float64 `json:"p50"`
	P90  float64 `json:"p90"`
	P99  float64 `json:"p99"`
	P999 float64 `json:"p99.9"`
	Max  float64 `json:"max"`
}

func quantilesOf(h *hdr.Histogram) quantiles {
	ms := func(us int64) float64 { return float64(us) / 1000 }
	return quantiles{
		P50: ms(h.ValueAtQuantile(50)), P90: ms(h.ValueAtQuantile(90)), P99: ms(h.ValueAtQuantile(99)),
		P999: ms(h.ValueAtQuantile(99.9)), Max: ms(h.Max()),
	}
}

func (r *benchResult) print(out io.Writer) {
	fmt.Fprintf(out, "%d sessions, %d bytes, %g frames a second each, %.1f s\n", r.Pairs, r.Size, r.Rate, r.Seconds)
	fmt.Fprintf(out, "round trips   %d of %d (%.0f a second), %d lost\n", r.Answered, r.Sent, float64(r.Answered)/r.Seconds, r.Lost)
	for _, how := range slices.Sorted(maps.Keys(r.Ended)) {
		fmt.Fprintf(out, "ended         %d: %s\n", r.Ended[how], how)
	}
	row := func(name string, q quantiles) {
		fmt.Fprintf(out, "%-13s p50 %.2f   p90 %.2f   p99 %.2f   p99.9 %.2f   max %.2f ms\n", name, q.P50, q.P90, q.P99, q.P999, q.Max)
	}
	row("latency", r.Latency)
	row("sent late by", r.Late)
}

// runBench connects the sessions, keeps the schedule, and waits for the last answers.
func runBench(ctx context.Context, cfg benchConfig, progress io.Writer) (*benchResult, error) {
	sessions, err := connectBench(ctx, cfg, progress)
	defer func() {
		for _, s := range sessions {
			s.end()
		}
	}()
	if err != nil {
		return nil, err
	}
	tally := newBenchTally()
	stopTelling := tally.tell(progress)
	start := time.Now()
	running, cancel := context.WithDeadlineCause(ctx, start.Add(cfg.duration+benchAnswer), errors.New("no answer in time"))
	defer cancel()
	done := make(chan struct{})
	for i, s := range sessions {
		first := start.Add(cfg.interval() * time.Duration(i) / time.Duration(len(sessions)))
		go func() {
			s.run(running, cfg, first, tally)
			done <- struct{}{}
		}()
	}
	for range sessions {
		<-done
	}
	stopTelling()
	result := tally.result(cfg)
	result.Seconds = min(time.Since(start), cfg.duration).Seconds()
	return result, nil
}
