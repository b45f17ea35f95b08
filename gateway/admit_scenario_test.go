package gateway

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/pyrycode/pyrycode-relay/testenv"
)

// wantRefused returns the headers of the refusal.
func wantRefused(t *testing.T, err error, status int) http.Header {
	t.Helper()
	var refused *testenv.RefusedError
	if !errors.As(err, &refused) || refused.Status != status {
		t.Fatalf("dial: %v, want refused with %d", err, status)
	}
	return refused.Header
}

func refusedBody(err error) string {
	var refused *testenv.RefusedError
	errors.As(err, &refused)
	return refused.Body
}

// wantRetryAfter checks that a refusal says when to come back, in whole seconds.
func wantRetryAfter(t *testing.T, h http.Header) {
	t.Helper()
	if n, err := strconv.Atoi(h.Get("Retry-After")); err != nil || n < 1 || n > 30 {
		t.Errorf("Retry-After %q", h.Get("Retry-After"))
	}
}

// 429 before 503 before 400 before 426/405 before the registry.
func TestOrderOfChecks(t *testing.T) {
	t.Parallel()
	for _, path := range []string{"/v1/client", "/v1/server"} {
		t.Run(path[4:], func(t *testing.T) {
			t.Parallel()
			limit := func(burst, connections int) func(*settings) {
				return func(s *settings) {
					s.gateway.UpgradeBurst, s.gateway.UpgradeInterval, s.gateway.MaxConnections = burst, time.Minute, connections
				}
			}
			good := http.Header{
				"X-Pyrycode-Server": {"x"}, "X-Pyrycode-Token": {markToken}, "X-Pyrycode-Version": {"1"}, "User-Agent": {"x"},
			}
			outcome := func(n *node, o outcome) string {
				return n.metric(fmt.Sprintf(`pyrycode_relay_ws_upgrade_attempts_total{endpoint=%q,outcome=%q}`, path[4:], o))
			}

			n := newCluster(t, 1, limit(3, 1))[0]
			n.binary("full") // takes one upgrade, and the one connection
			resp, _ := n.get(path, nil)
			if resp.StatusCode != 503 {
				t.Errorf("full, no headers: %d, want 503", resp.StatusCode)
			}
			wantRetryAfter(t, resp.Header)
			resp, _ = n.get(path, good)
			if resp.StatusCode != 503 {
				t.Errorf("full, not an upgrade: %d, want 503", resp.StatusCode)
			}
			resp, _ = n.get(path, nil)
			if resp.StatusCode != 429 {
				t.Errorf("over the rate limit, full, no headers: %d, want 429", resp.StatusCode)
			}
			wantRetry := resp.Header.Get("Retry-After")
			if s, err := strconv.Atoi(wantRetry); err != nil || s < 50 || s > 60 {
				t.Errorf("Retry-After %q, want up to 60", wantRetry)
			}
			if got := outcome(n, outcomeFull); got != "2" {
				t.Errorf("outcome full: %s, want 2", got)
			}
			if got := outcome(n, outcomeRateLimited); got != "1" {
				t.Errorf("outcome rate limited: %s, want 1", got)
			}

			n = newCluster(t, 1)[0]
			before := n.log.count()
			resp, _ = n.get(path, nil)
			if resp.StatusCode != 400 {
				t.Errorf("no headers, not an upgrade: %d, want 400", resp.StatusCode)
			}
			resp, _ = request(t, http.MethodPost, n.http+path, nil)
			if resp.StatusCode != 400 {
				t.Errorf("POST without headers: %d, want 400", resp.StatusCode)
			}
			resp, _ = n.get(path, good)
			if resp.StatusCode != 426 {
				t.Errorf("not an upgrade: %d, want 426", resp.StatusCode)
			}
			upgrade := good.Clone()
			for k, v := range map[string]string{"Connection": "Upgrade", "Upgrade": "websocket", "Sec-Websocket-Version": "13", "Sec-Websocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="} {
				upgrade.Set(k, v)
			}
			resp, _ = request(t, http.MethodPost, n.http+path, upgrade)
			if resp.StatusCode != 405 {
				t.Errorf("POST upgrade: %d, want 405", resp.StatusCode)
			}
			upgrade.Set("Sec-Websocket-Version", "12")
			resp, _ = n.get(path, upgrade)
			if resp.StatusCode != 400 {
				t.Errorf("old version: %d, want 400", resp.StatusCode)
			}
			if got := n.log.count() - before; got != 0 {
				t.Errorf("%d lines were logged, want none", got)
			}
			if got := outcome(n, outcomeBadRequest) + outcome(n, outcomeHandshake); got != "23" {
				t.Errorf("outcomes bad request, handshake: %q, want 2 and 3", got)
			}

			n.reg.Drain()
			resp, _ = n.get(path, nil)
			if resp.StatusCode != 400 {
				t.Errorf("draining, no headers: %d, want 400", resp.StatusCode)
			}
			upgrade.Set("Sec-Websocket-Version", "13")
			resp, body := n.get(path, upgrade)
			if resp.StatusCode != 503 {
				t.Errorf("draining: %d, want 503", resp.StatusCode)
			}
			wantRetryAfter(t, resp.Header)
			for _, h := range []string{"Upgrade", "Sec-Websocket-Accept"} {
				if resp.Header.Get(h) != "" {
					t.Errorf("a refusal has the header %s", h)
				}
			}
			if strings.Contains(body, "x-pyry") || strings.Count(body, "\n") != 1 {
				t.Errorf("body %q", body)
			}
			if got := outcome(n, outcomeUnavailable); got != "1" {
				t.Errorf("outcome unavailable: %s, want 1", got)
			}
		})
	}
}

func TestConnectionCap_FreedWhenAConnectionEnds(t *testing.T) {
	t.Parallel()
	n := newCluster(t, 1, func(s *settings) { s.gateway.MaxConnections = 2 })[0]
	id := newServerID()
	n.binary(id)
	p := n.phone(id)
	_, err := n.dialPhone(id)
	wantRetryAfter(t, wantRefused(t, err, 503))
	_, err = n.dialBinary(newServerID())
	wantRetryAfter(t, wantRefused(t, err, 503))
	p.Drop()
	await(t, "room", func() bool { _, err := n.dialPhone(id); return err == nil })
	for range 5 {
		n.get("/v1/client", nil) // what is refused keeps no place
	}
	if resp, _ := n.get("/healthz", nil); resp.StatusCode != 200 {
		t.Errorf("healthz of a full gateway: %d", resp.StatusCode)
	}
}

// The limit counts the address of the client, which a trusted proxy may tell.
func TestUpgradeLimit_PerAddress(t *testing.T) {
	t.Parallel()
	from := func(addr string) func(*testenv.PhoneOptions) {
		return func(o *testenv.PhoneOptions) { o.Header = http.Header{"X-Forwarded-For": {addr}} }
	}
	limit := func(s *settings) { s.gateway.UpgradeBurst, s.gateway.UpgradeInterval = 2, time.Hour }
	t.Run("TrustedProxy", func(t *testing.T) {
		t.Parallel()
		n := newCluster(t, 1, limit, func(s *settings) { s.gateway.TrustedProxies = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")} })[0]
		for _, tt := range []struct {
			addr    string
			refused bool
		}{
			{"192.0.2.1", false}, {"192.0.2.1", false}, {"192.0.2.1", true}, {"192.0.2.2", false},
			{"2001:db8::1", false}, {"2001:db8::ffff:2", false}, {"2001:db8:0:0:8000::3", true}, {"2001:db8:0:1::1", false},
			{"198.51.100.9, 192.0.2.1", true}, // the right-most counts
		} {
			p, err := n.dialPhone(newServerID(), from(tt.addr))
			if tt.refused {
				wantRetryAfterSeconds(t, wantRefused(t, err, 429), 3600)
				continue
			}
			if err != nil {
				t.Fatalf("%s: %v", tt.addr, err)
			}
			p.wantClosed(4404, "no server with that id")
		}
		n.wantEvent("phone_register_no_server", map[string]string{"remote": "2001:db8:0:1::1"})
	})
	t.Run("NobodyTrusted", func(t *testing.T) {
		t.Parallel()
		n := newCluster(t, 1, limit)[0]
		for i := range 3 {
			_, err := n.dialPhone(newServerID(), from(fmt.Sprintf("192.0.2.%d", i)))
			if i < 2 && err != nil {
				t.Fatal(err)
			}
			if i == 2 {
				wantRefused(t, err, 429)
			}
		}
		n.wantEvent("phone_register_no_server", map[string]string{"remote": "127.0.0.1"})
	})
}

func wantRetryAfterSeconds(t *testing.T, h http.Header, atMost int) {
	t.Helper()
	if n, err := strconv.Atoi(h.Get("Retry-After")); err != nil || n < 1 || n > atMost {
		t.Errorf("Retry-After %q, want 1…%d", h.Get("Retry-After"), atMost)
	}
}

// An upgrade that fails after the claim leaves no socket, no place and no holder.
func TestUpgrade_PeerGoneBefore101_LeavesNothing(t *testing.T) {
	t.Parallel()
	n := newCluster(t, 1, func(s *settings) { s.registry.Grace = time.Second })[0]
	for range 20 {
		c, err := net.Dial("tcp", strings.TrimPrefix(n.http, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(c, "GET /v1/server HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"+
			"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nUser-Agent: raw/1\r\nX-Pyrycode-Server: %s\r\nX-Pyrycode-Version: 1\r\n\r\n", newServerID())
		_ = c.(*net.TCPConn).SetLinger(0)
		c.Close()
	}
	await(t, "nothing is open", func() bool {
		n.gw.mu.Lock()
		defer n.gw.mu.Unlock()
		return n.gw.open == 0
	})
	if got := n.gw.held.Load(); got != 0 {
		t.Errorf("%d binaries are counted, want 0", got)
	}
}
