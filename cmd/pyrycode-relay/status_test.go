package main

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

const healthy = `{"status":"ok","version":"v1.2.3","connected_binaries":12,"connected_phones":40,"uptime_seconds":3661}`

// fakeNode answers /healthz with healthy and /readyz with code and body.
func fakeNode(t *testing.T, code int, body string) string {
	mux := http.NewServeMux()
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) {
		w.Write([]byte(healthy + "\n"))
	})
	mux.HandleFunc("/readyz", func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(code)
		w.Write([]byte(body + "\n"))
	})
	server := httptest.NewServer(mux)
	t.Cleanup(server.Close)
	return server.URL
}

func TestStatus(t *testing.T) {
	const alive = "alive: version v1.2.3, 12 binaries, 40 phones, up 1h1m1s\n"
	ready := fakeNode(t, 200, `{"status":"ready"}`)
	draining := fakeNode(t, 503, `{"status":"unavailable","reason":"draining"}`)
	for name, tt := range map[string]struct {
		args []string
		code int
		out  string
	}{
		"ready":              {[]string{"--url", ready}, 0, alive + "ready\n"},
		"slash at the end":   {[]string{"--url", ready + "/"}, 0, alive + "ready\n"},
		"not ready":          {[]string{"--url", draining}, 1, alive + "not ready: draining\n"},
		"not ready but live": {[]string{"--url", draining, "--live"}, 0, alive},
		"raw":                {[]string{"--url", ready, "--json"}, 0, healthy + "\n" + `{"status":"ready"}` + "\n"},
	} {
		t.Run(name, func(t *testing.T) {
			code, out, errOut := invoke(t, append([]string{"status"}, tt.args...)...)
			if code != tt.code || out != tt.out || errOut != "" {
				t.Errorf("got exit %d, output %q, error %q; want exit %d, output %q", code, out, errOut, tt.code, tt.out)
			}
		})
	}
}

func TestStatus_NoAnswer(t *testing.T) {
	server := httptest.NewServer(nil)
	server.Close()
	code, out, errOut := invoke(t, "status", "--url", server.URL)
	if code != 1 || out != "" || !isOneLine(errOut) || !strings.Contains(errOut, "connection refused") {
		t.Errorf("got exit %d, output %q, error %q; want exit 1 and one line with the reason", code, out, errOut)
	}
}

func TestStatus_NotARelay(t *testing.T) {
	server := httptest.NewServer(http.NotFoundHandler())
	defer server.Close()
	code, out, _ := invoke(t, "status", "--url", server.URL)
	if want := "/healthz: HTTP status 404 without JSON: is this a relay?\n"; code != 1 || out != want {
		t.Errorf("got exit %d, output %q; want exit 1, output %q", code, out, want)
	}
}

func TestStatus_BadURL(t *testing.T) {
	for _, bad := range []string{"", "127.0.0.1:8080", "ws://127.0.0.1:8080", "http://", "http://me:secret@%"} {
		code, _, errOut := invoke(t, "status", "--url", bad)
		if code != 2 || !isOneLine(errOut) || !strings.Contains(errOut, "--url") || strings.Contains(errOut, "secret") {
			t.Errorf("--url %q: got exit %d, error %q; want exit 2 and one line that names the flag", bad, code, errOut)
		}
	}
}
