package main

import (
	"bytes"
	"regexp"
	"testing"
)

func TestLogger(t *testing.T) {
	for format, want := range map[string]string{
		"text": `^time=\S+ level=INFO gateway="relay 1" event=listening addr=127.0.0.1:1\n$`,
		"json": `^\{"time":"[^"]+","level":"INFO","gateway":"relay 1","event":"listening","addr":"127.0.0.1:1"\}\n$`,
	} {
		var out bytes.Buffer
		newLogger(&out, format, "info", "relay 1").Info("listening", "addr", "127.0.0.1:1")
		if !regexp.MustCompile(want).Match(out.Bytes()) {
			t.Errorf("%s: got %q, want %s", format, &out, want)
		}
	}
}

func TestLogger_Level(t *testing.T) {
	for level, want := range map[string]string{
		"debug": "a b c d",
		"info":  "b c d",
		"warn":  "c d",
		"error": "d",
	} {
		var out bytes.Buffer
		log := newLogger(&out, "text", level, "relay-1")
		log.Debug("a")
		log.Info("b")
		log.Warn("c")
		log.Error("d")
		if got := events(out.String()); got != want {
			t.Errorf("%s: got events %q, want %q", level, got, want)
		}
	}
}
