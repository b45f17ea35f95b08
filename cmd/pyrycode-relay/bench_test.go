package main

import (
	"bytes"
	"encoding/json"
	"regexp"
	"strings"
	"testing"
	"time"
)

func TestBench_MeasuresADeployment(t *testing.T) {
	flags := besideOneNATS(t)
	first, second := startNode(t, flags...), startNode(t, flags...)
	var out, progress bytes.Buffer
	args := []string{"bench", "--url", first.url, "--url2", second.url + "/", "--pairs", "4", "--rate", "50", "--for", "2s", "--size", "1000"}
	if code := mainExit(append(args, "--json"), console{stdout: &out, stderr: &progress}); code != exitOK {
		t.Fatalf("exit %d: %s%s", code, &out, &progress)
	}
	var r benchResult
	if err := json.Unmarshal(out.Bytes(), &r); err != nil {
		t.Fatalf("%v: %s", err, &out)
	}
	if r.Pairs != 4 || r.Size != 1000 || r.Rate != 50 || r.Sent != 400 || r.Answered != 400 || r.Lost != 0 || len(r.Ended) > 0 {
		t.Errorf("got %+v, want 4 sessions with 100 frames each, all answered", r)
	}
	if l := r.Latency; l.P50 <= 0 || l.P50 > l.P90 || l.P90 > l.P99 || l.P99 > l.P999 || l.P999 > l.Max {
		t.Errorf("latency %+v is no distribution", l)
	}
	if !regexp.MustCompile(`(?m)^ +\d+ s  \d+ round trips, .* 0 sessions ended$`).Match(progress.Bytes()) {
		t.Errorf("progress %q, want a line a second", &progress)
	}

	out.Reset()
	if code := mainExit(args, console{stdout: &out, stderr: &progress}); code != exitOK {
		t.Fatalf("exit %d: %s", code, &out)
	}
	for _, want := range []string{"4 sessions, 1000 bytes", "round trips   400 of 400", "0 lost", "latency       p50 ", "sent late by  p50 "} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("got %s, want %q in it", &out, want)
		}
	}
}

// A node that goes away under it: its sessions are told apart by how they ended.
func TestBench_SessionsEnd_ExitsOne(t *testing.T) {
	n := startNode(t, besideOneNATS(t)...)
	var out, progress bytes.Buffer
	var stopped bool
	stop := writerFunc(func(p []byte) (int, error) { // with the first line of progress
		if !stopped {
			stopped = true
			n.stop()
		}
		return progress.Write(p)
	})
	code := mainExit([]string{"bench", "--url", n.url, "--pairs", "3", "--rate", "0.5", "--for", "30s", "--json"}, console{stdout: &out, stderr: stop})
	var r benchResult
	if err := json.Unmarshal(out.Bytes(), &r); err != nil {
		t.Fatalf("%v: %s%s", err, &out, &progress)
	}
	if got := r.Ended[`closed 1001 "shutting down"`]; code != exitFailed || got != 3 {
		t.Errorf("exit %d, ended %v, want exit %d and three sessions closed 1001", code, r.Ended, exitFailed)
	}
}

// A relay that limits upgrades is asked again when it says so.
func TestBench_WaitsWhenTheRelayAsks(t *testing.T) {
	n := startNode(t, append(besideOneNATS(t), "--upgrade-burst", "3", "--upgrade-interval", "1s")...)
	code, out, progress := invoke(t, "bench", "--url", n.url, "--pairs", "2", "--for", "1s")
	if code != exitOK || !strings.Contains(progress, "asks to wait") {
		t.Errorf("exit %d, %s%s, want that it waits", code, out, progress)
	}
}

func TestBench_BadFlags(t *testing.T) {
	for _, tt := range []struct{ args, want string }{
		{"", "--url"},
		{"--url http://x", "--url"},
		{"--url ws://x --url2 x", "--url2"},
		{"--url ws://x --pairs 0", "--pairs 0: want 1 or more"},
		{"--url ws://x --size 10", "--size 10: want 40 to 262144"},
		{"--url ws://x --rate NaN", "--rate NaN"},
		{"--url ws://x --for 1ms", "--for 1ms: want 1s or more"},
		{"--url ws://x --nonsense", "-nonsense"},
	} {
		code, out, stderr := invoke(t, append([]string{"bench"}, strings.Fields(tt.args)...)...)
		if code != exitUsage || out != "" || !isOneLine(stderr) || !strings.Contains(stderr, tt.want) {
			t.Errorf("bench %s: exit %d, %q, %q, want exit 2 and one line with %q", tt.args, code, out, stderr, tt.want)
		}
	}
}

func TestBench_Schedule(t *testing.T) {
	cfg := benchConfig{Size: 64, Rate: 2.5, duration: 4 * time.Second}
	if cfg.frames() != 10 || cfg.interval() != 400*time.Millisecond {
		t.Errorf("%d frames every %v, want 10 every 400ms", cfg.frames(), cfg.interval())
	}
	if f := cfg.frame(9999); len(f) != 64 || !json.Valid(f) || bytes.Equal(f, cfg.frame(9998)) {
		t.Errorf("frame %s of %d bytes", f, len(f))
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }
