package main

import (
	"context"
	"log/slog"
)

// run is a stand-in: replace this file by run.go.
func run(ctx context.Context, _ config, _ *slog.Logger) error {
	<-ctx.Done()
	return nil
}
