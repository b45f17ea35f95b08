package gateway

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/pyrycode/pyrycode-relay/bus"
	"github.com/pyrycode/pyrycode-relay/registry"
	"github.com/pyrycode/pyrycode-relay/testenv"
)

// patience bounds whatever a test waits for: far above what it takes, for loaded
// machines.
const patience = 20 * time.Second

// loaded is how long something of d may take on a machine that is busy with much
// else under the race detector.
func loaded(d time.Duration) time.Duration { return d + 4*time.Second }

// settings of one node.
type settings struct {
	nats     string
	bus      bus.Config
	registry registry.Config
	gateway  Config
}

// node is one running gateway.
type node struct {
	t       *testing.T
	reg     *registry.Registry
	gw      *Gateway
	log     *recorder
	url     string // ws://host:port
	http    string // http://host:port
	metrics *prometheus.Registry
	set     settings
	stop    func()
}

var clusters atomic.Uint32

// newCluster starts n gateways that form a cluster of their own.
func newCluster(t *testing.T, n int, change ...func(*settings)) []*node {
	t.Helper()
	prefix := fmt.Sprintf("test%d", clusters.Add(1))
	t.Cleanup(func() { removeBuckets(natsURL, prefix) })
	nodes := make([]*node, n)
	for i := range nodes {
		nodes[i] = newNode(t, prefix, change...)
	}
	for _, n := range nodes {
		n.awaitReady()
	}
	return nodes
}

// newNode starts a gateway. It need not be ready yet.
func newNode(t *testing.T, prefix string, change ...func(*settings)) *node {
	t.Helper()
	set := settings{
		nats:     natsURL,
		registry: registry.Config{KVPrefix: prefix, Memory: true, KVReplicas: 1},
		gateway:  Config{Version: "1.2.3", UpgradeBurst: -1},
	}
	for _, f := range change {
		f(&set)
	}
	metrics := prometheus.NewRegistry()
	set.gateway.Metrics = metrics
	rec := &recorder{}
	log := slog.New(rec)
	id := bus.NewNodeID("test")
	conn, err := bus.Dial(bus.ConnConfig{URL: set.nats}, id, log)
	if err != nil {
		t.Fatal(err)
	}
	reg := registry.New(bus.New(conn, id, set.bus, log), set.registry, log)
	if err := reg.Start(); err != nil {
		t.Fatal(err)
	}
	gw := New(reg, log, WithConfig(set.gateway))
	srv := httptest.NewServer(gw.Handler())
	n := &node{t: t, reg: reg, gw: gw, log: rec, http: srv.URL, url: "ws" + strings.TrimPrefix(srv.URL, "http"), metrics: metrics, set: set}
	n.stop = sync.OnceFunc(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		reg.Drain()
		gw.Shutdown(ctx)
		n.wantNothingLeft()
		srv.Close()
		reg.Stop(ctx)
		conn.Close()
		fmt.Fprintln(exposed, n.exposition())
		if t.Failed() {
			rec.dump(t, string(id))
		}
	})
	t.Cleanup(n.stop)
	return n
}

// removeBuckets deletes what a cluster kept in the shared server.
func removeBuckets(url, prefix string) {
	nc, err := nats.Connect(url)
	if err != nil {
		return
	}
	defer nc.Close()
	js, _ := jetstream.New(nc)
	for _, bucket := range []string{"_nodes", "_presence"} {
		_ = js.DeleteKeyValue(context.Background(), prefix+bucket) // it may be in another server
	}
}

// wantNothingLeft checks the books of a gateway that was shut down.
func (n *node) wantNothingLeft() {
	n.gw.mu.Lock()
	defer n.gw.mu.Unlock()
	for _, slot := range n.gw.slots {
		if len(slot) != 0 {
			n.t.Errorf("%d connections in a heartbeat slot, want none", len(slot))
		}
	}
	if n.gw.open != 0 || n.gw.phones.Load() != 0 || n.gw.held.Load() != 0 {
		n.t.Errorf("%d open, %d phones, %d binaries, want none", n.gw.open, n.gw.phones.Load(), n.gw.held.Load())
	}
}

// crash takes the node off NATS without a word. Its peers stay connected.
func (n *node) crash() {
	n.reg.Bus().Conn().Close()
}

func (n *node) awaitReady() {
	n.t.Helper()
	await(n.t, "ready", func() bool { return n.reg.Ready() == nil })
}

// get answers a plain GET.
func (n *node) get(path string, header http.Header) (*http.Response, string) {
	n.t.Helper()
	return request(n.t, http.MethodGet, n.http+path, header)
}

func request(t *testing.T, method, url string, header http.Header) (*http.Response, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(soon(t), method, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	for k, v := range header {
		req.Header[k] = v
	}
	client := &http.Client{
		Transport:     &http.Transport{DisableKeepAlives: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(body)
}

// exposition is the node's /metrics.
func (n *node) exposition() string {
	rec := httptest.NewRecorder()
	promhttp.HandlerFor(n.metrics, promhttp.HandlerOpts{}).ServeHTTP(rec, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	return rec.Body.String()
}

// metric is the value of one line of the exposition, name and labels as they stand there.
func (n *node) metric(name string) string {
	n.t.Helper()
	for line := range strings.Lines(n.exposition()) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), name+" "); ok {
			return v
		}
	}
	n.t.Fatalf("no metric %s", name)
	return ""
}

// eachPlacement runs f with the binary on the phones' node and with it on another.
func eachPlacement(t *testing.T, f func(t *testing.T, phones, binaries *node), change ...func(*settings)) {
	for _, tt := range []struct {
		name  string
		nodes int
	}{{"SameNode", 1}, {"OtherNode", 2}} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			nodes := newCluster(t, tt.nodes, change...)
			f(t, nodes[0], nodes[tt.nodes-1])
		})
	}
}

// soon is a context that ends with the test, or when it hangs.
func soon(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

// await waits until cond.
func await(t testing.TB, what string, cond func() bool) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for end := time.After(patience); !cond(); {
		select {
		case <-tick.C:
		case <-end:
			t.Fatalf("waited in vain for: %s", what)
		}
	}
}

// pass lets time go by where that is what the test is about.
func pass(d time.Duration) { <-time.After(d) }

var serverIDs atomic.Uint32

func newServerID() string { return fmt.Sprintf("7d0c1a3e-0000-4000-8000-%012d", serverIDs.Add(1)) }

// testPhone is a phone that fails its test.
type testPhone struct {
	*testenv.Phone
	t *testing.T
}

func (n *node) dialPhone(serverID string, change ...func(*testenv.PhoneOptions)) (*testPhone, error) {
	o := testenv.PhoneOptions{ServerID: serverID, Token: markToken + "-" + serverID}
	for _, f := range change {
		f(&o)
	}
	p, err := testenv.DialPhone(soon(n.t), n.url, o)
	if err != nil {
		return nil, err
	}
	n.t.Cleanup(p.Drop)
	return &testPhone{p, n.t}, nil
}

func (n *node) phone(serverID string, change ...func(*testenv.PhoneOptions)) *testPhone {
	n.t.Helper()
	p, err := n.dialPhone(serverID, change...)
	if err != nil {
		n.t.Fatal(err)
	}
	return p
}

func (p *testPhone) send(frame string) {
	p.t.Helper()
	if err := p.Send(soon(p.t), []byte(frame)); err != nil {
		p.t.Fatalf("phone sends: %v", err)
	}
}

func (p *testPhone) wantFrame(want string) {
	p.t.Helper()
	m, err := p.NextMessage(soon(p.t))
	if err != nil {
		p.t.Fatalf("phone: %v, want frame %.100q", err, want)
	}
	if string(m.Data) != want {
		p.t.Fatalf("phone got %.200q, want %.200q", m.Data, want)
	}
	if m.Binary {
		p.t.Error("phone got a binary message, want text")
	}
}

func (p *testPhone) wantClosed(code int, reason string) {
	p.t.Helper()
	wantClosed(p.t, p.Peer, code, reason)
}

// wantClosed waits for the end, which must be the next thing that the peer sees.
func wantClosed(t *testing.T, p *testenv.Peer, code int, reason string) {
	t.Helper()
	m, err := p.Next(soon(t))
	var info testenv.CloseInfo
	switch {
	case err == nil:
		t.Fatalf("got message %.200q, want close %d %q", m, code, reason)
	case !errors.As(err, &info):
		t.Fatalf("%v, want close %d %q", err, code, reason)
	case info.Code != code || info.Reason != reason:
		t.Fatalf("closed %d %q, want %d %q", info.Code, info.Reason, code, reason)
	}
}

// wantQuiet pings the relay and expects that nothing came before the pong.
func wantQuiet(t *testing.T, p *testenv.Peer) {
	t.Helper()
	if err := p.Ping(soon(t)); err != nil {
		t.Fatalf("ping: %v (%v)", err, p)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if m, err := p.Next(ctx); err == nil {
		t.Fatalf("got %.200q, want nothing", m)
	} else if info := (testenv.CloseInfo{}); errors.As(err, &info) {
		t.Fatalf("closed %d %q, want nothing", info.Code, info.Reason)
	}
}

// testBinary is a binary that fails its test.
type testBinary struct {
	*testenv.Binary
	t *testing.T
}

func (n *node) dialBinary(serverID string, change ...func(*testenv.BinaryOptions)) (*testBinary, error) {
	o := testenv.BinaryOptions{ServerID: serverID}
	for _, f := range change {
		f(&o)
	}
	b, err := testenv.DialBinary(soon(n.t), n.url, o)
	if err != nil {
		return nil, err
	}
	n.t.Cleanup(b.Drop)
	return &testBinary{b, n.t}, nil
}

func (n *node) binary(serverID string, change ...func(*testenv.BinaryOptions)) *testBinary {
	n.t.Helper()
	b, err := n.dialBinary(serverID, change...)
	if err != nil {
		n.t.Fatal(err)
	}
	return b
}

func (b *testBinary) next() testenv.Envelope {
	b.t.Helper()
	e, err := b.NextEnvelope(soon(b.t))
	if err != nil {
		b.t.Fatalf("binary: %v (%.200q)", err, e.Raw)
	}
	return e
}

// wantFrame expects a frame and returns the conn_id that it came from.
func (b *testBinary) wantFrame(want string) string {
	b.t.Helper()
	e := b.next()
	if string(e.Frame) != want {
		b.t.Fatalf("binary got %.200q, want frame %.200q", e.Raw, want)
	}
	return e.ConnID
}

// wantNotice expects the close notice of connID.
func (b *testBinary) wantNotice(connID string, code int) {
	b.t.Helper()
	e := b.next()
	id, _ := json.Marshal(connID)
	if want := fmt.Sprintf(`{"conn_id":%s,"close_code":%d}`, id, code); string(e.Raw) != want {
		b.t.Fatalf("binary got %.200q, want %s", e.Raw, want)
	}
}

func (b *testBinary) wantClosed(code int, reason string) {
	b.t.Helper()
	wantClosed(b.t, b.Peer, code, reason)
}

func (b *testBinary) send(connID, frame string) {
	b.t.Helper()
	if err := b.Send(soon(b.t), connID, []byte(frame)); err != nil {
		b.t.Fatalf("binary sends: %v", err)
	}
}

func (b *testBinary) sendRaw(message string) {
	b.t.Helper()
	if err := b.SendRaw(soon(b.t), []byte(message)); err != nil {
		b.t.Fatalf("binary sends: %v", err)
	}
}

func (b *testBinary) sendClose(connID string, code int, frame string) {
	b.t.Helper()
	var f []byte
	if frame != "" {
		f = []byte(frame)
	}
	if err := b.SendClose(soon(b.t), connID, code, f); err != nil {
		b.t.Fatalf("binary sends: %v", err)
	}
}

// meet connects a binary and a phone, and lets the binary hear from the phone.
func meet(phones, binaries *node) (p *testPhone, b *testBinary, connID string) {
	phones.t.Helper()
	id := newServerID()
	b = binaries.binary(id)
	p, connID = join(phones, b, id)
	return p, b, connID
}

// join connects a phone to b and lets b hear from it.
func join(phones *node, b *testBinary, serverID string) (p *testPhone, connID string) {
	phones.t.Helper()
	p = phones.phone(serverID)
	const hello = `"hello, ` + markFrame + `"`
	p.send(hello)
	return p, b.wantFrame(hello)
}

// event is one recorded log line.
type event struct {
	at    time.Time
	name  string
	attrs map[string]string
}

// recorder is a slog.Handler that keeps what it gets.
type recorder struct {
	mu     *sync.Mutex
	events *[]event
	with   []slog.Attr
	once   sync.Once
}

func (r *recorder) init() {
	r.once.Do(func() {
		if r.mu == nil {
			r.mu, r.events = new(sync.Mutex), new([]event)
		}
	})
}

func (r *recorder) Enabled(context.Context, slog.Level) bool { return true }

func (r *recorder) Handle(_ context.Context, rec slog.Record) error {
	r.init()
	e := event{rec.Time, rec.Message, make(map[string]string)}
	add := func(a slog.Attr) bool {
		e.attrs[a.Key] = a.Value.String()
		return true
	}
	for _, a := range r.with {
		add(a)
	}
	rec.Attrs(add)
	r.mu.Lock()
	*r.events = append(*r.events, e)
	r.mu.Unlock()
	fmt.Fprintf(logged, "%s %q\n", e.name, e.attrs)
	return nil
}

func (r *recorder) WithAttrs(attrs []slog.Attr) slog.Handler {
	r.init()
	return &recorder{mu: r.mu, events: r.events, with: append(append([]slog.Attr(nil), r.with...), attrs...)}
}

func (r *recorder) WithGroup(string) slog.Handler { return r }

// all returns the events of a name so far.
func (r *recorder) all(name string) (found []event) {
	r.init()
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, e := range *r.events {
		if e.name == name {
			found = append(found, e)
		}
	}
	return found
}

func (r *recorder) count() int {
	r.init()
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(*r.events)
}

// dump shows a failed test what one node did, and when.
func (r *recorder) dump(t *testing.T, node string) {
	r.init()
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, e := range *r.events {
		delete(e.attrs, "event")
		t.Logf("%s %s %s %v", node, e.at.Format("05.000"), e.name, e.attrs)
	}
}

// wantEvent waits for the first event of a name with these attributes.
func (n *node) wantEvent(name string, want map[string]string) {
	n.t.Helper()
	var match event
	await(n.t, fmt.Sprintf("event %s %v; there are %v", name, want, n.log.all(name)), func() bool {
	next:
		for _, e := range n.log.all(name) {
			for k, v := range want {
				if got, ok := e.attrs[k]; !ok || got != v {
					continue next
				}
			}
			match = e
			return true
		}
		return false
	})
	if match.attrs["event"] != name {
		n.t.Errorf("%s has event=%q", name, match.attrs["event"])
	}
}

// rawDial connects a phone over a plain socket, for tests of the very bytes.
func (n *node) rawDial(serverID string) net.Conn {
	n.t.Helper()
	c := n.rawConn()
	handshake(n.t, c, serverID)
	return c
}

// rawServe connects a binary over a plain socket.
func (n *node) rawServe(serverID string) net.Conn {
	n.t.Helper()
	c := n.rawConn()
	upgradeRaw(n.t, c, "/v1/server", fmt.Sprintf("X-Pyrycode-Server: %s\r\nX-Pyrycode-Version: 1\r\n", serverID))
	return c
}

func (n *node) rawConn() net.Conn {
	n.t.Helper()
	c, err := net.Dial("tcp", strings.TrimPrefix(n.http, "http://"))
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { c.Close() })
	return c
}

// handshake makes c a phone's connection.
func handshake(t *testing.T, c net.Conn, serverID string) {
	t.Helper()
	upgradeRaw(t, c, "/v1/client", fmt.Sprintf("X-Pyrycode-Server: %s\r\nX-Pyrycode-Token: %s\r\n", serverID, markToken))
}

func upgradeRaw(t *testing.T, c net.Conn, path, headers string) {
	t.Helper()
	fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"+
		"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nUser-Agent: raw/1\r\n%s\r\n", path, headers)
	var head []byte
	for one := make([]byte, 1); !strings.HasSuffix(string(head), "\r\n\r\n"); head = append(head, one[0]) {
		c.SetReadDeadline(time.Now().Add(patience))
		if _, err := c.Read(one); err != nil {
			t.Fatalf("handshake: %v", err)
		}
	}
	if !strings.HasPrefix(string(head), "HTTP/1.1 101 ") {
		t.Fatalf("handshake: %q", head)
	}
}
