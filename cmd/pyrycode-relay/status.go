package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"
)

const (
	statusTimeout = 5 * time.Second // for one answer
	maxStatusBody = 64 * kib        // a real one has a few hundred bytes
)

// status asks a node how it is. It exits 0 if the node is ready, with --live if
// it answers at all.
func status(args []string, c console) int {
	flags := flag.NewFlagSet("pyrycode-relay status", flag.ContinueOnError)
	base := flags.String("url", "http://127.0.0.1:8080", "address of a listener of the node")
	live := flags.Bool("live", false, "only check that it answers, as for the health check of a container")
	raw := flags.Bool("json", false, "print the answers as they are, one per line")
	if code, ok := c.parseTool(flags, args); !ok {
		return code
	}
	if err := checkURL(*base, "http", "https"); err != nil {
		return c.usageError(fmt.Errorf("--url %w", err))
	}
	paths := []string{"/healthz", "/readyz"}
	if *live {
		paths = paths[:1]
	}
	for _, path := range paths {
		a, err := ask(*base, path)
		if err != nil {
			fmt.Fprintf(c.stderr, "pyrycode-relay: no answer to %s: %v\n", path, err)
			return exitFailed
		}
		if *raw {
			fmt.Fprintln(c.stdout, a.body)
		} else {
			fmt.Fprintln(c.stdout, a.summary(path))
		}
		if a.code != http.StatusOK {
			return exitFailed
		}
	}
	return exitOK
}

// checkURL returns an error that says what is right unless value is a URL with
// a host and one of the schemes.
func checkURL(value string, schemes ...string) error {
	u, err := url.Parse(value)
	if err != nil || u.Hostname() == "" || !slices.Contains(schemes, u.Scheme) {
		return fmt.Errorf("%q: want an address as in %s://127.0.0.1:8080", redact(value), schemes[0])
	}
	return nil
}

// answer is what a node said: a status, and JSON if it was a relay that spoke.
type answer struct {
	code int
	body string
}

// ask gets path from the node at base.
func ask(base, path string) (answer, error) {
	client := http.Client{Timeout: statusTimeout}
	defer client.CloseIdleConnections()
	resp, err := client.Get(strings.TrimSuffix(base, "/") + path)
	if err != nil {
		if wrapped, ok := errors.AsType[*url.Error](err); ok {
			err = wrapped.Err // the rest repeats the URL
		}
		return answer{}, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxStatusBody))
	return answer{resp.StatusCode, string(bytes.TrimSpace(body))}, err
}

// summary says in one line what an answer means.
func (a answer) summary(path string) string {
	var fields struct {
		Status   string `json:"status"`
		Version  string `json:"version"`
		Binaries int    `json:"connected_binaries"`
		Phones   int    `json:"connected_phones"`
		Uptime   int64  `json:"uptime_seconds"`
		Reason   string `json:"reason"`
	}
	if err := json.Unmarshal([]byte(a.body), &fields); err != nil {
		return fmt.Sprintf("%s: HTTP status %d without JSON: is this a relay?", path, a.code)
	}
	switch {
	case path == "/healthz" && a.code == http.StatusOK:
		return fmt.Sprintf("alive: version %s, %d binaries, %d phones, up %v",
			fields.Version, fields.Binaries, fields.Phones, time.Duration(fields.Uptime)*time.Second)
	case a.code == http.StatusOK:
		return "ready"
	case fields.Reason != "":
		return fmt.Sprintf("not ready: %s", fields.Reason)
	}
	return fmt.Sprintf("%s: HTTP status %d: %s", path, a.code, a.body)
}
