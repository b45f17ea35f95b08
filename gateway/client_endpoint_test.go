package gateway

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/pyrycode/pyrycode-relay/registry"
	"github.com/pyrycode/pyrycode-relay/testenv"
)

// The phone handshake, point by point.

func connIDs(r *registry.Registry, serverID string) (ids []string) {
	for _, c := range r.PhonesFor(serverID) {
		ids = append(ids, c.ConnID())
	}
	slices.Sort(ids)
	return ids
}

func TestClient_UpgradeWithBinary_PhonesForContainsIt(t *testing.T) {
	t.Parallel()
	eachPlacement(t, func(t *testing.T, phones, binaries *node) {
		id := newServerID()
		binaries.binary(id)
		phones.phone(id, func(o *testenv.PhoneOptions) { o.DeviceName = "Pixel 9" })
		ids := connIDs(phones.reg, id)
		if len(ids) != 1 {
			t.Fatalf("PhonesFor: %q, want one", ids)
		}
		if want := regexp.MustCompile("^client-" + id + "-[0-9a-f]{16}$"); !want.MatchString(ids[0]) {
			t.Errorf("ConnID %q, want %s", ids[0], want)
		}
		phones.wantEvent("phone_registered", map[string]string{
			"server_id": id, "conn_id": ids[0], "device_name": "Pixel 9", "remote": "127.0.0.1",
		})
		if phones != binaries && len(connIDs(binaries.reg, id)) != 0 {
			t.Error("PhonesFor of the binary's node has a phone of another")
		}
	})
}

func TestClient_ConnSendsAndCloses(t *testing.T) {
	t.Parallel()
	eachPlacement(t, func(t *testing.T, phones, binaries *node) {
		p, _, _ := meet(phones, binaries)
		conn := soleConn(phones)
		if err := conn.Send([]byte(`{"from":"go"}`)); err != nil {
			t.Fatal(err)
		}
		p.wantFrame(`{"from":"go"}`)
		conn.Close()
		p.wantClosed(1001, "")
		await(t, "Send fails after the end", func() bool { return conn.Send([]byte(`1`)) != nil })
	})
}

// soleConn is the only phone of a node.
func soleConn(n *node) registry.Conn {
	n.t.Helper()
	for _, e := range n.log.all("phone_registered") {
		if conns := n.reg.PhonesFor(e.attrs["server_id"]); len(conns) == 1 {
			return conns[0]
		}
	}
	n.t.Fatal("no phone")
	return nil
}

func TestClient_HeaderMissingOrEmpty_400(t *testing.T) {
	t.Parallel()
	eachPlacement(t, func(t *testing.T, phones, binaries *node) {
		id := newServerID()
		binaries.binary(id)
		logged := len(phones.log.all("phone_registered"))
		for _, name := range []string{"X-Pyrycode-Server", "X-Pyrycode-Token", "User-Agent"} {
			for what, value := range map[string][]string{"missing": nil, "empty": {""}} {
				_, err := phones.dialPhone(id, func(o *testenv.PhoneOptions) {
					o.Header = http.Header{name: value}
				})
				wantRefused(t, err, http.StatusBadRequest)
				if body := refusedBody(err); !strings.Contains(body, strings.ToLower(name)) || strings.Contains(body, markToken) {
					t.Errorf("%s %s: body %q", name, what, body)
				}
			}
		}
		if got := connIDs(phones.reg, id); len(got) != 0 {
			t.Errorf("PhonesFor: %q, want none", got)
		}
		if len(phones.log.all("phone_registered")) != logged || len(phones.log.all("phone_register_no_server")) != 0 {
			t.Error("a refused header was logged")
		}
	})
}

func TestClient_DeviceNameIsOptional(t *testing.T) {
	t.Parallel()
	eachPlacement(t, func(t *testing.T, phones, binaries *node) {
		id := newServerID()
		binaries.binary(id)
		phones.phone(id)
		phones.wantEvent("phone_registered", map[string]string{"server_id": id, "device_name": ""})
	})
}

func TestClient_NoBinary_4404(t *testing.T) {
	t.Parallel()
	eachPlacement(t, func(t *testing.T, phones, binaries *node) {
		binaries.binary(newServerID()) // of somebody else
		id := newServerID()
		p := phones.phone(id)
		p.wantClosed(4404, "no server with that id")
		phones.wantEvent("phone_register_no_server", map[string]string{"server_id": id, "remote": "127.0.0.1"})
		if got := connIDs(phones.reg, id); len(got) != 0 {
			t.Errorf("PhonesFor: %q, want none", got)
		}
		if got := phones.log.all("phone_registered"); len(got) != 0 {
			t.Errorf("logged %v", got)
		}
		if got := phones.metric(`pyrycode_relay_register_failures_total{kind="no_server"}`); got != "1" {
			t.Errorf("register failures: %s, want 1", got)
		}
	})
}

func TestClient_PhoneCloses_Unregistered(t *testing.T) {
	t.Parallel()
	eachPlacement(t, func(t *testing.T, phones, binaries *node) {
		for _, drop := range []bool{false, true} {
			id := newServerID()
			binaries.binary(id)
			p := phones.phone(id)
			connID := connIDs(phones.reg, id)[0]
			if drop {
				p.Drop()
			} else if err := p.Close(1000, ""); err != nil {
				t.Fatal(err)
			}
			phones.wantEvent("phone_unregistered", map[string]string{"server_id": id, "conn_id": connID})
			if got := connIDs(phones.reg, id); len(got) != 0 {
				t.Errorf("PhonesFor: %q, want none", got)
			}
		}
		await(t, "no phone is counted", func() bool { return phones.gw.phones.Load() == 0 })
	})
}

func TestClient_SeveralPhones_Independent(t *testing.T) {
	t.Parallel()
	eachPlacement(t, func(t *testing.T, phones, binaries *node) {
		id := newServerID()
		b := binaries.binary(id)
		var all []*testPhone
		var ids []string
		for range 4 {
			p, connID := join(phones, b, id)
			all, ids = append(all, p), append(ids, connID)
		}
		for i, p := range all {
			want := slices.Sorted(slices.Values(ids[i:]))
			if got := connIDs(phones.reg, id); !slices.Equal(got, want) {
				t.Fatalf("PhonesFor: %q, want %q", got, want)
			}
			b.send(ids[i], fmt.Sprintf(`{"to":%d}`, i))
			p.wantFrame(fmt.Sprintf(`{"to":%d}`, i))
			if err := p.Close(4000+i, ""); err != nil {
				t.Fatal(err)
			}
			b.wantNotice(ids[i], 4000+i)
			phones.wantEvent("phone_unregistered", map[string]string{"server_id": id, "conn_id": ids[i]})
		}
		if got := connIDs(phones.reg, id); len(got) != 0 {
			t.Errorf("PhonesFor: %q, want none", got)
		}
	})
}

// The handler on its own, with the plain text logger that an integrator may bring.
func TestClient_HandlerAndTextLog(t *testing.T) {
	t.Parallel()
	eachPlacement(t, func(t *testing.T, phones, binaries *node) {
		var text lockedBuffer
		srv := httptest.NewServer(ClientHandler(phones.reg, slog.New(slog.NewTextHandler(io.MultiWriter(&text, logged), nil)), WithConfig(Config{UpgradeBurst: -1})))
		defer srv.Close()
		id := newServerID()
		binaries.binary(id)
		p, err := testenv.DialPhone(soon(t), "ws"+strings.TrimPrefix(srv.URL, "http"), testenv.PhoneOptions{ServerID: id, Token: markToken, DeviceName: "my phone"})
		if err != nil {
			t.Fatal(err)
		}
		want := regexp.MustCompile(`event=phone_registered server_id=` + id + ` conn_id=client-` + id + `-[0-9a-f]{16} device_name="my phone" remote=127\.0\.0\.1`)
		await(t, "the log line", func() bool { return want.MatchString(strings.ReplaceAll(text.String(), "msg=phone_registered ", "")) })
		if err := p.Close(1000, ""); err != nil {
			t.Fatal(err)
		}
		await(t, "the end", func() bool {
			return strings.Contains(text.String(), "event=phone_unregistered server_id="+id+" conn_id=client-")
		})
	})
}

func TestClient_HandshakeFailsAfterHeaders_NothingRegistered(t *testing.T) {
	t.Parallel()
	eachPlacement(t, func(t *testing.T, phones, binaries *node) {
		id := newServerID()
		b := binaries.binary(id)
		resp, _ := phones.get("/v1/client", http.Header{
			"X-Pyrycode-Server": {id}, "X-Pyrycode-Token": {markToken}, "User-Agent": {"x"},
		})
		if resp.StatusCode != http.StatusUpgradeRequired {
			t.Errorf("status %d, want 426", resp.StatusCode)
		}
		if got := connIDs(phones.reg, id); len(got) != 0 {
			t.Errorf("PhonesFor: %q, want none", got)
		}
		wantQuiet(t, b.Peer)
	})
}

func TestClient_HealthAndServerBesideIt(t *testing.T) {
	t.Parallel()
	eachPlacement(t, func(t *testing.T, phones, binaries *node) {
		meet(phones, binaries)
		_, body := phones.get("/healthz", nil)
		if !strings.Contains(body, `"connected_phones":1`) {
			t.Errorf("healthz: %s", body)
		}
		_, body = binaries.get("/healthz", nil)
		if !strings.Contains(body, `"connected_binaries":1`) {
			t.Errorf("healthz: %s", body)
		}
	})
}

func TestClient_HostileServerIDs(t *testing.T) {
	t.Parallel()
	eachPlacement(t, func(t *testing.T, phones, binaries *node) {
		ids := []string{
			"*", ">", "a.b", "a.*", "a.>", "a b", `"`, `\`, "a\tb", "$KV.x", "=2A", "a=2Eb", "a", "A", ".", "..", "_", "-", "_INBOX.>",
			strings.Repeat("ü", 64), strings.Repeat("\u2028", 42), strings.Repeat("🦊", 32), strings.Repeat("x", 128), "\u202eevil", "<script>&amp;",
			"{\"conn_id\":\"x\"}",
		}
		bs := make([]*testBinary, len(ids))
		for i, id := range ids {
			bs[i] = binaries.binary(id)
		}
		for i, id := range ids {
			p := phones.phone(id)
			p.send(fmt.Sprint(i))
			connID := bs[i].wantFrame(fmt.Sprint(i))
			if !strings.HasPrefix(connID, "client-"+id+"-") {
				t.Errorf("conn_id %q of %q", connID, id)
			}
			bs[i].send(connID, fmt.Sprint(i+1000))
			p.wantFrame(fmt.Sprint(i + 1000))
		}
		for _, b := range bs {
			wantQuiet(t, b.Peer)
		}
		for _, id := range []string{strings.Repeat("x", 129), strings.Repeat("ü", 64) + "x", "\xff", "a\xc3", strings.Repeat("y", 100_000)} {
			_, err := phones.dialPhone(id)
			wantRefused(t, err, http.StatusBadRequest)
			_, err = binaries.dialBinary(id)
			wantRefused(t, err, http.StatusBadRequest)
		}
	})
}

func TestClient_HostileServerID_IsOneLogLine(t *testing.T) {
	t.Parallel()
	n := newCluster(t, 1)[0]
	var text lockedBuffer
	srv := httptest.NewServer(New(n.reg, slog.New(slog.NewTextHandler(io.MultiWriter(&text, logged), nil)), WithConfig(Config{UpgradeBurst: -1})).Handler())
	defer srv.Close()
	p, err := testenv.DialPhone(soon(t), "ws"+strings.TrimPrefix(srv.URL, "http"), testenv.PhoneOptions{ServerID: "a event=ready\u2028\tb=\"c\u202e"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Closed(soon(t)); err != nil {
		t.Fatal(err)
	}
	await(t, "a line", func() bool { return text.String() != "" })
	line := text.String()
	if strings.Count(line, "\n") != 1 || strings.ContainsAny(line, "\u2028\u202e\t") || !strings.Contains(line, `server_id="a event=ready`) {
		t.Errorf("log: %q", line)
	}
}

type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}
