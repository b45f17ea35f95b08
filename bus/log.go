package bus

import (
	"context"
	"log/slog"
)

// EventLogger returns log with the attribute event=<message> on every line: one
// event per line, by a fixed name, whatever handler an integrator brings. It is
// safe to call on its own result.                   (protocol.md: Log events)
func EventLogger(log *slog.Logger) *slog.Logger {
	if _, ok := log.Handler().(eventHandler); ok {
		return log
	}
	return slog.New(eventHandler{log.Handler()})
}

type eventHandler struct{ slog.Handler }

func (h eventHandler) Handle(ctx context.Context, r slog.Record) error {
	out := slog.NewRecord(r.Time, r.Level, r.Message, r.PC)
	out.AddAttrs(slog.String("event", r.Message))
	r.Attrs(func(a slog.Attr) bool {
		out.AddAttrs(a)
		return true
	})
	return h.Handler.Handle(ctx, out)
}

func (h eventHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return eventHandler{h.Handler.WithAttrs(attrs)}
}

func (h eventHandler) WithGroup(name string) slog.Handler {
	return eventHandler{h.Handler.WithGroup(name)}
}
