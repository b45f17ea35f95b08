package main

import (
	"io"
	"log/slog"
)

// newLogger returns a logger that writes one event per line: what is usually
// called the message is the event's name, and every line names the gateway.
//
//	time=… level=INFO event=listening gateway=… addr=…
//
// Format is text or json, level one of debug, info, warn and error.
func newLogger(w io.Writer, format, level, gatewayID string) *slog.Logger {
	options := &slog.HandlerOptions{Level: parseLevel(level), ReplaceAttr: messageIsEvent}
	var handler slog.Handler = slog.NewTextHandler(w, options)
	if format == "json" {
		handler = slog.NewJSONHandler(w, options)
	}
	return slog.New(handler).With("gateway", gatewayID)
}

// messageIsEvent renames the message, which is not in any group.
func messageIsEvent(groups []string, a slog.Attr) slog.Attr {
	if len(groups) == 0 && a.Key == slog.MessageKey {
		a.Key = "event"
	}
	return a
}

func parseLevel(name string) (level slog.Level) {
	_ = level.UnmarshalText([]byte(name)) // parseConfig has checked it; info otherwise
	return level
}
