package gateway

import (
	"encoding/json"
	"net/http"
	"regexp"
	"strings"
	"testing"
)

func TestHealthz(t *testing.T) {
	t.Parallel()
	eachPlacement(t, func(t *testing.T, phones, binaries *node) {
		want := func(n *node, numbers string) {
			t.Helper()
			line := regexp.MustCompile(`^\{"status":"ok","version":"1\.2\.3",` + numbers + `,"uptime_seconds":\d+[,}]`)
			var body string
			await(t, "healthz "+line.String()+"; it is "+body, func() bool {
				var resp *http.Response
				resp, body = n.get("/healthz", nil)
				if resp.StatusCode != 200 || resp.Header.Get("Cache-Control") != "no-store" || resp.Header.Get("Content-Type") != "application/json" {
					t.Errorf("%d %v", resp.StatusCode, resp.Header)
				}
				if !json.Valid([]byte(body)) {
					t.Errorf("not JSON: %q", body)
				}
				return line.MatchString(body)
			})
		}
		want(phones, `"connected_binaries":0,"connected_phones":0`)
		p, b, connID := meet(phones, binaries)
		phones.phone(b.serverID(connID))
		if phones == binaries {
			want(phones, `"connected_binaries":1,"connected_phones":2`)
		} else {
			want(phones, `"connected_binaries":0,"connected_phones":2`)
			want(binaries, `"connected_binaries":1,"connected_phones":0`)
		}
		p.Drop()
		b.Drop() // its grace does not count
		if phones == binaries {
			want(phones, `"connected_binaries":0,"connected_phones":1`)
		} else {
			want(phones, `"connected_binaries":0,"connected_phones":1`)
			want(binaries, `"connected_binaries":0,"connected_phones":0`)
		}
		phones.phone(newServerID()).wantClosed(4404, "no server with that id")
		want(phones, `"connected_binaries":0,"connected_phones":1`)
	})
}

func TestReadyz(t *testing.T) {
	t.Parallel()
	server := startNATS(t)
	n := newCluster(t, 1, func(s *settings) { s.nats = server.URL() })[0]
	resp, body := n.get("/readyz", nil)
	if resp.StatusCode != 200 || resp.Header.Get("Cache-Control") != "no-store" || !json.Valid([]byte(body)) {
		t.Errorf("ready: %d %v %s", resp.StatusCode, resp.Header, body)
	}
	notReady := func(reason string) {
		t.Helper()
		await(t, "not ready: "+reason, func() bool {
			resp, body := n.get("/readyz", nil)
			var answer struct{ Reason string }
			return resp.StatusCode == 503 && json.Unmarshal([]byte(body), &answer) == nil && strings.Contains(answer.Reason, reason)
		})
		_, err := n.dialPhone("x")
		wantRetryAfter(t, wantRefused(t, err, 503))
		_, err = n.dialBinary("x")
		wantRetryAfter(t, wantRefused(t, err, 503))
		if resp, _ := n.get("/healthz", nil); resp.StatusCode != 200 {
			t.Errorf("healthz: %d, want 200", resp.StatusCode)
		}
	}
	p, b, connID := meet(n, n)
	server.Kill()
	notReady("not connected to NATS")
	p.send("1") // nobody is disconnected whose frames need no NATS
	b.wantFrame("1")
	b.send(connID, "2")
	p.wantFrame("2")
	if err := server.Restart(); err != nil {
		t.Fatal(err)
	}
	n.awaitReady()
	p.send("3")
	b.wantFrame("3")
	join(n, b, b.serverID(connID))
	n.reg.Drain()
	notReady("draining")
}

func TestOtherPaths_404(t *testing.T) {
	t.Parallel()
	n := newCluster(t, 1)[0]
	for _, path := range []string{
		"/", "/metrics", "/v1", "/v1/", "/v1/clients", "/v1/client/", "/v1/server/x", "/v2/client", "/healthz/", "/debug/pprof/",
		"//healthz", "/x/../healthz", "/./readyz", "/V1/client",
	} {
		resp, _ := n.get(path, http.Header{"X-Pyrycode-Server": {"x"}})
		if resp.StatusCode != 404 {
			t.Errorf("%s: %d, want 404", path, resp.StatusCode)
		}
	}
}
