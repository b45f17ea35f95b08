package gateway

import (
	"fmt"
	"strings"
	"testing"
)

func TestMetrics_EveryLabelValueFromTheStart(t *testing.T) {
	t.Parallel()
	n := newCluster(t, 1)[0]
	want := []string{
		"connected_binaries 0", "connected_phones 0", "grace_expiries_total 0", "ready 1",
		`frames_forwarded_total{direction="phone_to_binary"} 0`, `frames_forwarded_total{direction="binary_to_phone"} 0`,
	}
	for _, e := range endpoints {
		for _, o := range outcomes {
			want = append(want, fmt.Sprintf("ws_upgrade_attempts_total{endpoint=%q,outcome=%q} 0", e, o))
		}
	}
	for _, f := range failures {
		want = append(want, fmt.Sprintf("register_failures_total{kind=%q} 0", f))
	}
	for _, d := range drops {
		want = append(want, fmt.Sprintf("envelopes_dropped_total{kind=%q} 0", d))
	}
	text := n.exposition()
	for _, line := range want {
		if !strings.Contains(text, "\npyrycode_relay_"+line+"\n") {
			t.Errorf("no line %q", line)
		}
	}
}

func TestMetrics_UpgradesAndConnections(t *testing.T) {
	t.Parallel()
	eachPlacement(t, func(t *testing.T, phones, binaries *node) {
		start := strings.Count(phones.exposition(), "\n")
		p, b, _ := meet(phones, binaries)
		if got := phones.metric(`pyrycode_relay_ws_upgrade_attempts_total{endpoint="client",outcome="upgraded"}`); got != "1" {
			t.Errorf("phones upgraded: %s, want 1", got)
		}
		if got := binaries.metric(`pyrycode_relay_ws_upgrade_attempts_total{endpoint="server",outcome="upgraded"}`); got != "1" {
			t.Errorf("binaries upgraded: %s, want 1", got)
		}
		await(t, "a phone", func() bool { return phones.metric("pyrycode_relay_connected_phones") == "1" })
		await(t, "a binary", func() bool { return binaries.metric("pyrycode_relay_connected_binaries") == "1" })
		p.Drop()
		b.Drop()
		await(t, "no phone", func() bool { return phones.metric("pyrycode_relay_connected_phones") == "0" })
		await(t, "no binary", func() bool { return binaries.metric("pyrycode_relay_connected_binaries") == "0" })
		if got := strings.Count(phones.exposition(), "\n"); got != start {
			t.Errorf("%d lines after traffic, %d before: a label came from it", got, start)
		}
	})
}
