package main

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"
)

func TestSmoke_Refused(t *testing.T) {
	for _, tt := range []struct {
		status int
		hint   string
	}{
		{503, "pyrycode-relay status"},
		{429, "--upgrade-burst"},
		{421, "--domain"},
		{404, "public listener"},
		{200, "proxy"},
	} {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(tt.status)
		}))
		defer server.Close()
		wantSmokeFailure(t, server, fmt.Sprintf("upgrade refused: %d", tt.status), tt.hint)
	}
}

func TestSmoke_NobodyListens(t *testing.T) {
	server := httptest.NewServer(nil)
	server.Close()
	wantSmokeFailure(t, server, "connection refused", "event=listening")
}

// wantSmokeFailure runs smoke against server and checks what it prints about
// the first step.
func wantSmokeFailure(t *testing.T, server *httptest.Server, got, hint string) {
	t.Helper()
	code, out, errOut := invoke(t, "smoke", "--url", "ws"+strings.TrimPrefix(server.URL, "http"))
	lines := strings.Split(out, "\n")
	if code != 1 || errOut != "" || len(lines) != 4 {
		t.Fatalf("got exit %d, error %q, output:\n%s\nwant exit 1 and three lines", code, errOut, out)
	}
	if want := regexp.MustCompile(`^FAIL +\d+ ms  a phone without a binary is closed 4404$`); !want.MatchString(lines[0]) {
		t.Errorf("got first line %q, want %v", lines[0], want)
	}
	if !strings.HasPrefix(lines[1], "     want an upgrade, got: ") || !strings.Contains(lines[1], got) {
		t.Errorf("got second line %q, want what was expected, and %q", lines[1], got)
	}
	if !strings.HasPrefix(lines[2], "     hint: ") || !strings.Contains(lines[2], hint) {
		t.Errorf("got third line %q, want a hint with %q", lines[2], hint)
	}
}

func TestSmoke_SecondAddress(t *testing.T) {
	first := httptest.NewServer(http.NotFoundHandler())
	defer first.Close()
	second := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusServiceUnavailable)
	}))
	defer second.Close()
	code, out, _ := invoke(t, "smoke", "--url", "ws"+first.URL[len("http"):], "--url2", "ws"+second.URL[len("http"):])
	if code != 1 || !strings.Contains(out, "503") {
		t.Errorf("got exit %d, output %q; want exit 1 and the phone's status of 503", code, out)
	}
}

func TestSmoke_BadFlags(t *testing.T) {
	for _, tt := range []struct {
		args []string
		want string
	}{
		{nil, "--url"},
		{[]string{"--url", "127.0.0.1:8080"}, "ws://127.0.0.1:8080"},
		{[]string{"--url", "http://127.0.0.1:8080"}, "--url"},
		{[]string{"--url", "ws://a", "--url2", "b"}, "--url2"},
		{[]string{"--url", "ws://a", "--timeout", "0s"}, "--timeout"},
		{[]string{"--url", "ws://a", "--timeout", "soon"}, "-timeout"},
	} {
		code, _, errOut := invoke(t, append([]string{"smoke"}, tt.args...)...)
		if code != 2 || !isOneLine(errOut) || !strings.Contains(errOut, tt.want) {
			t.Errorf("%q: got exit %d, error %q; want exit 2 and one line with %q", tt.args, code, errOut, tt.want)
		}
	}
}

func TestWantBytes(t *testing.T) {
	for _, tt := range []struct{ got, want, part string }{
		{`[1]`, `[1]`, ""},
		{`[2]`, `[1]`, "from byte 1 on"},
		{`[1`, `[1]`, "want 3 bytes, got 2"},
		{``, `[1]`, "from byte 0 on"},
	} {
		err := wantBytes([]byte(tt.got), []byte(tt.want))
		if (err != nil) != (tt.part != "") || err != nil && !strings.Contains(err.Error(), tt.part) {
			t.Errorf("wantBytes(%s, %s): got %v, want an error with %q", tt.got, tt.want, err, tt.part)
		}
	}
}

func TestRandomUUID(t *testing.T) {
	want := regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`)
	a, b := randomUUID(), randomUUID()
	if !want.MatchString(a) || a == b {
		t.Errorf("got %s and %s, want two of version 4", a, b)
	}
}
