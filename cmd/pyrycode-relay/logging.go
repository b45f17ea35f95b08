package main

import (
	"io"
	"log/slog"

	"github.com/pyrycode/pyrycode-relay/bus"
)

// newLogger returns a logger that writes one event per line: the message is the
// event's name, and every line names the gateway.
//
//	time=… level=INFO gateway=… event=listening addr=…
//
// Format is text or json, level one of debug, info, warn and error.
func newLogger(w io.Writer, format, level, gatewayID string) *slog.Logger {
	options := &slog.HandlerOptions{Level: parseLevel(level), ReplaceAttr: dropMessage}
	var handler slog.Handler = slog.NewTextHandler(w, options)
	if format == "json" {
		handler = slog.NewJSONHandler(w, options)
	}
	return bus.EventLogger(slog.New(handler)).With("gateway", gatewayID)
}

// dropMessage leaves the message out: it stands in event already.
func dropMessage(groups []string, a slog.Attr) slog.Attr {
	if len(groups) == 0 && a.Key == slog.MessageKey {
		return slog.Attr{}
	}
	return a
}

func parseLevel(name string) (level slog.Level) {
	_ = level.UnmarshalText([]byte(name)) // parseConfig has checked it; info otherwise
	return level
}
