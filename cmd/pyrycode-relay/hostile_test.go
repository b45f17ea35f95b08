package main

// Server-ids are any text that HTTP lets through. (protocol.md: Endpoints)

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pyrycode/pyrycode-relay/testenv"
)

var hostileIDs = []string{
	"*", ">", "**", "*.>", "a", "A", "a.b", "a.*", "a b", "a\tb", ".", "..", "a..b", "../x", "/", "$KV.x", "$JS.API.>", "_INBOX.x", "_",
	"=", "=2A", "%2A", `"`, `\`, `a"b\c`, `","close_code":1000,"x":"`, "{}", "null", "<&>", "\u2028", "höyry", "ho\u0308yry", "蒸気 🚂",
	"client-a-0123456789abcdef", strings.Repeat("x", 128), strings.Repeat(".", 128), strings.Repeat("蒸", 42) + "é",
	strings.Repeat("🚂", 32), "\u0080\u009f", "\ufeff", "\U0010ffff",
}

func TestHostileServerIDs(t *testing.T) {
	ctx := scenarioContext(t, time.Minute)
	flags := besideOneNATS(t)
	nodes := []*node{startNode(t, flags...), startNode(t, flags...)}

	tenants := make([]*tenant, len(hostileIDs))
	for i, id := range hostileIDs {
		tenants[i] = &tenant{serverID: id, binary: dialBinaryAs(ctx, t, nodes[i%2], id)}
		for j := range nodes {
			tenants[i].phones[j] = dialPhoneAs(ctx, t, nodes[j], id)
		}
	}
	// All are there now, and all talk at once. Whoever hears another's frame does
	// not find its own where it should be.
	atOnce := func(talk func(i int, own *tenant) error) {
		var talks sync.WaitGroup
		for i, own := range tenants {
			talks.Go(func() {
				if err := talk(i, own); err != nil {
					t.Errorf("server-id %q: %v", own.serverID, err)
				}
			})
		}
		talks.Wait()
		if t.Failed() {
			t.FailNow()
		}
	}
	atOnce(func(_ int, own *tenant) error { return own.talk(ctx) })
	atOnce(func(i int, own *tenant) error { return own.reachFor(ctx, tenants[(i+1)%len(tenants)]) })
	atOnce(func(_ int, own *tenant) error { return own.talk(ctx) })
	atOnce(func(_ int, own *tenant) error { return own.hangUp(ctx) })
	for _, own := range tenants {
		own.binary.Drop()
		if m, err := own.binary.NextMessage(ctx); err == nil {
			t.Errorf("server-id %q: its binary got %d bytes more, want nothing of anybody else", own.serverID, len(m.Data))
		}
	}

	// What merely looks like one of them belongs to nobody.
	for _, id := range []string{"=3E", "=2a", "=5F", "b", "a.b.c", "a.B", "=61", "%3E", "KV.x", "x", strings.Repeat("x", 127), "hoyry"} {
		wantEnd(ctx, t, fmt.Sprintf("a phone of %q", id), dialPhoneAs(ctx, t, nodes[0], id), 4404, "no server with that id")
	}
}

// tenant is the peers of one server-id.
type tenant struct {
	serverID string
	binary   *testenv.Binary
	phones   [2]*testenv.Phone // one on each node
	connIDs  [2]string
}

// talk exchanges frames that no other tenant sends.
func (own *tenant) talk(ctx context.Context) (err error) {
	for range 3 {
		for j, phone := range own.phones {
			if own.connIDs[j], err = exchangeFrames(ctx, phone, own.binary, own.serverID); err != nil {
				return err
			}
			if want := "client-" + own.serverID + "-"; !strings.HasPrefix(own.connIDs[j], want) || len(own.connIDs[j]) != len(want)+16 {
				return fmt.Errorf("conn id %q, want %s and 16 hex", own.connIDs[j], want)
			}
		}
	}
	return nil
}

// reachFor sends to the phones of another tenant, and asks to close them.
func (own *tenant) reachFor(ctx context.Context, other *tenant) error {
	for _, connID := range other.connIDs {
		if err := own.binary.Send(ctx, connID, []byte(`"from somebody else"`)); err != nil {
			return err
		}
		if err := own.binary.SendClose(ctx, connID, 4000, nil); err != nil {
			return err
		}
	}
	return nil
}

// hangUp closes the phones, and checks that the binary hears of these and of
// nothing else.
func (own *tenant) hangUp(ctx context.Context) error {
	for j, phone := range own.phones {
		if err := phone.Close(4000+j, ""); err != nil {
			return err
		}
		e, err := own.binary.NextEnvelope(ctx)
		if err != nil {
			return err
		}
		if e.ConnID != own.connIDs[j] || e.CloseCode != 4000+j || e.Frame != nil {
			return fmt.Errorf("got %s, want the close notice with %d of its own phone", describe(e), 4000+j)
		}
	}
	return nil
}

func TestServerID_RefusedOrTrimmed(t *testing.T) {
	ctx := scenarioContext(t, time.Minute)
	n := startNode(t)
	for name, id := range map[string]string{
		"129 bytes":               strings.Repeat("x", 129),
		"129 bytes of UTF-8":      strings.Repeat("蒸", 43),
		"100 KB":                  strings.Repeat("x", 100_000),
		"not UTF-8":               "a\xffb",
		"half a character":        "蒸"[:2],
		"a surrogate":             "\xed\xa0\x80",
		"an overlong form of '.'": "a\xc0\xaeb",
		"only spaces":             "   ",
		"a control byte":          "a\x00b",
		"empty":                   "",
	} {
		for _, path := range []string{"/v1/client", "/v1/server"} {
			if got := rawUpgrade(ctx, t, n, path, id); got != http.StatusBadRequest {
				t.Errorf("%s, %s: got %d, want 400", path, name, got)
			}
		}
	}
	// HTTP itself takes spaces off the ends of a value.
	b := dialBinaryAs(ctx, t, n, "  a b  ")
	meet(ctx, t, dialPhoneAs(ctx, t, n, "a b"), b, "hello")
}

// rawUpgrade asks for an upgrade with any bytes as the server-id and returns the
// status.
func rawUpgrade(ctx context.Context, t *testing.T, n *node, path, serverID string) int {
	t.Helper()
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", strings.TrimPrefix(n.http, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: relay\r\nUser-Agent: raw\r\nX-Pyrycode-Server: %s\r\nX-Pyrycode-Token: t\r\nX-Pyrycode-Version: 1\r\n"+
		"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n", path, serverID)
	response, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	response.Body.Close()
	return response.StatusCode
}

// standIn is what net/http sends for a server-id that it might refuse or change.
const standIn = "stand-in-for-a-server-id"

func dialBinaryAs(ctx context.Context, t *testing.T, n *node, serverID string) *testenv.Binary {
	t.Helper()
	b, err := testenv.DialBinary(ctx, n.url, testenv.BinaryOptions{ServerID: standIn, DialContext: sendingAs(serverID)})
	if err != nil {
		t.Fatalf("server-id %q: %v", serverID, err)
	}
	t.Cleanup(b.Drop)
	return b
}

func dialPhoneAs(ctx context.Context, t *testing.T, n *node, serverID string) *testenv.Phone {
	t.Helper()
	p, err := testenv.DialPhone(ctx, n.url, testenv.PhoneOptions{ServerID: standIn, DialContext: sendingAs(serverID)})
	if err != nil {
		t.Fatalf("server-id %q: %v", serverID, err)
	}
	t.Cleanup(p.Drop)
	return p
}

// sendingAs dials connections that put serverID in the place of standIn.
func sendingAs(serverID string) testenv.DialFunc {
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := new(net.Dialer).DialContext(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		return &substituted{TCPConn: conn.(*net.TCPConn), serverID: serverID}, nil
	}
}

type substituted struct {
	*net.TCPConn
	serverID string
	done     bool // owned by the goroutine that writes the request
}

func (s *substituted) Write(p []byte) (int, error) {
	if s.done || !bytes.Contains(p, []byte(standIn)) {
		return s.TCPConn.Write(p)
	}
	s.done = true
	if _, err := s.TCPConn.Write(bytes.Replace(p, []byte(standIn), []byte(s.serverID), 1)); err != nil {
		return 0, err
	}
	return len(p), nil
}
