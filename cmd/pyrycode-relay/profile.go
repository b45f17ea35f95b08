//go:build profile

package main

import (
	"net/http"
	_ "net/http/pprof" //nolint:gosec // a build of its own, on loopback, for measuring
	"os"
)

// A program built with -tags profile serves net/http/pprof on $PROFILE_LISTEN, a
// loopback address. A released program has no such port.       (docs/performance.md)
func init() {
	if addr := os.Getenv("PROFILE_LISTEN"); addr != "" {
		go func() { _ = http.ListenAndServe(addr, nil) }()
	}
}
