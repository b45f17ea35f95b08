package registry

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/pyrycode/pyrycode-relay/bus"
	"github.com/pyrycode/pyrycode-relay/testenv"
)

// world is the NATS that a scenario runs on: one server, or a cluster of three
// with replicated buckets. Both are shared by the package.
type world struct {
	name string
	urls []string // of each server
}

var (
	alone   = &world{name: "R1"}
	cluster = &world{name: "R3"}
)

func TestMain(m *testing.M) {
	flag.Parse()
	// Most tests wait for NATS' clock, not for a CPU.
	if err := flag.Set("test.parallel", "8"); err != nil {
		panic(err)
	}
	os.Exit(testenv.VerifyNoLeaks(func() int {
		return detector.Verify(func() int {
			s, err := testenv.StartServer(testenv.ServerOptions{Memory: true, Detector: detector})
			if err != nil {
				fmt.Fprintln(os.Stderr, err)
				return 1
			}
			defer s.Close()
			alone.urls = []string{s.URL()}
			c, err := testenv.StartCluster(testenv.ClusterOptions{Memory: true, Detector: detector})
			if err != nil {
				fmt.Fprintln(os.Stderr, err)
				return 1
			}
			defer c.Close()
			cluster.urls = c.URLs()
			return m.Run()
		})
	}))
}

// markFrame is in every frame that the tests send.
const markFrame = "fr4me-of-a-test"

// detector looks through what the tests' nodes log, and what they tell NATS by
// anything but the data of messages: entries too.   (protocol.md: Log events, last line)
var (
	detector = testenv.NewDetector(markFrame)
	logger   = slog.New(slog.NewTextHandler(detector.Writer("the log"), &slog.HandlerOptions{Level: slog.LevelDebug}))
)

// onBoth runs a scenario on one server and on a cluster.
func onBoth(t *testing.T, f func(t *testing.T, s *scene)) {
	t.Parallel()
	for _, w := range []*world{alone, cluster} {
		t.Run(w.name, func(t *testing.T) {
			t.Parallel()
			f(t, newScene(t, w))
		})
	}
}

// scene is one test's own buckets, its nodes, and an observer whom no fault
// reaches.
type scene struct {
	t     *testing.T
	w     *world
	cfg   Config
	nc    *nats.Conn
	js    jetstream.JetStream
	nodes int
}

var scenes atomic.Uint64

func newScene(t *testing.T, w *world) *scene {
	t.Helper()
	nc, err := nats.Connect(strings.Join(w.urls, ","))
	if err != nil {
		t.Fatal(err)
	}
	js, err := jetstream.New(nc, jetstream.WithDefaultTimeout(5*time.Second))
	if err != nil {
		t.Fatal(err)
	}
	s := &scene{t: t, w: w, nc: nc, js: js}
	s.cfg = Config{
		KVPrefix: fmt.Sprintf("test%d", scenes.Add(1)), KVReplicas: len(w.urls), Memory: true,
		Grace: 2 * time.Second, ProbeTimeout: 2 * time.Second, Version: "v0", Region: "here",
	}
	t.Cleanup(func() {
		for _, b := range []string{"_nodes", "_presence"} {
			_ = js.DeleteKeyValue(context.Background(), s.cfg.KVPrefix+b) // keeps the servers small
		}
		nc.Close()
	})
	return s
}

// node is one relay process as far as the registry knows: its connection to NATS
// leads through a proxy.
type node struct {
	*Registry
	t     *testing.T
	id    bus.NodeID
	conn  *bus.Conn
	proxy *testenv.Proxy
}

// node starts a node on the next server.
func (s *scene) node() *node {
	s.t.Helper()
	n := s.startNode()
	n.waitReady()
	return n
}

// three starts three nodes, each on its own server if there are three.
func (s *scene) three() [3]*node {
	s.t.Helper()
	ns := [3]*node{s.startNode(), s.startNode(), s.startNode()}
	for _, n := range ns {
		n.waitReady()
	}
	return ns
}

func (s *scene) startNode() *node {
	s.t.Helper()
	url := s.w.urls[s.nodes%len(s.w.urls)]
	proxy, err := testenv.NewProxy(strings.TrimPrefix(url, "nats://"))
	if err != nil {
		s.t.Fatal(err)
	}
	id := bus.NewNodeID(fmt.Sprintf("n%d", s.nodes))
	s.nodes++
	conn, err := bus.Dial(bus.ConnConfig{URL: "nats://" + proxy.Addr()}, id, logger)
	if err != nil {
		s.t.Fatal(err)
	}
	n := &node{t: s.t, id: id, conn: conn, proxy: proxy}
	n.Registry = New(bus.New(conn, id, bus.Config{}, logger), s.cfg, logger)
	if err := n.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		proxy.Resume()
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		n.Stop(ctx)
		conn.Close()
		proxy.Close()
	})
	return n
}

func (n *node) waitReady() {
	n.t.Helper()
	eventually(n.t, 15*time.Second, "node ready", func() bool { return n.Ready() == nil })
}

// kill ends the node as SIGKILL would, seen from the others: nobody hears a
// goodbye, its lease and its entries stay.
func (n *node) kill() { n.conn.Close() }

// raw returns the latest message of a server-id's key, markers included.
func (s *scene) raw(serverID string) *jetstream.RawStreamMsg {
	s.t.Helper()
	return s.rawKey("_presence", bus.EncodeToken(serverID))
}

// rawKey asks the leader: replicas may lag.
func (s *scene) rawKey(bucket, key string) *jetstream.RawStreamMsg {
	s.t.Helper()
	name := s.cfg.KVPrefix + bucket
	ask := fmt.Appendf(nil, `{"last_by_subj":"$KV.%s.%s"}`, name, key)
	for end := time.Now().Add(10 * time.Second); ; {
		var a stored
		m, err := s.nc.Request("$JS.API.STREAM.MSG.GET.KV_"+name, ask, time.Second)
		if err == nil {
			err = json.Unmarshal(m.Data, &a)
		}
		switch {
		case err == nil && a.Message != nil:
			header, err := nats.DecodeHeadersMsg(a.Message.Header)
			if err != nil && len(a.Message.Header) > 0 {
				s.t.Fatalf("observe %s: %v", name, err)
			}
			return &jetstream.RawStreamMsg{Sequence: a.Message.Sequence, Header: header, Data: a.Message.Data}
		case err == nil && a.Error != nil && (a.Error.ErrorCode == jetstream.JSErrCodeMessageNotFound || a.Error.ErrorCode == jetstream.JSErrCodeStreamNotFound):
			return nil
		case time.Now().After(end):
			s.t.Fatalf("observe %s: %v %+v", name, err, a.Error)
		}
	}
}

// entry returns what the KV says of a server-id.
func (s *scene) entry(serverID string) (e entry, ok bool) {
	s.t.Helper()
	m := s.raw(serverID)
	if m == nil || ended(m) {
		return entry{}, false
	}
	if err := json.Unmarshal(m.Data, &e); err != nil {
		s.t.Fatalf("entry of %q: %v", serverID, err)
	}
	return e, true
}

func ended(m *jetstream.RawStreamMsg) bool {
	return m.Header.Get("KV-Operation") != "" || m.Header.Get("Nats-Marker-Reason") != ""
}

// write puts a value into the presence bucket by hand, over whatever is there.
func (s *scene) write(serverID string, value []byte) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if _, err := s.js.Publish(ctx, "$KV."+s.cfg.KVPrefix+"_presence."+bus.EncodeToken(serverID), value); err != nil {
		s.t.Fatal(err)
	}
}

// wantHolder fails the test unless the KV says that b holds its server-id.
func (s *scene) wantHolder(b *binary) {
	s.t.Helper()
	e, ok := s.entry(b.serverID)
	if !ok || e.Session != b.session() || e.Node != b.at.id || e.State != stateHeld {
		s.t.Errorf("entry of %q: got %+v (%v), want held by session %s on %s", b.serverID, e, ok, b.session(), b.at.id)
	}
}

// fakeConn is a connection that remembers its end.
type fakeConn struct {
	id     string
	closed chan struct{}
	once   sync.Once
}

var conns atomic.Uint64

func newConn() *fakeConn {
	return &fakeConn{id: fmt.Sprintf("conn-%d", conns.Add(1)), closed: make(chan struct{})}
}

func (c *fakeConn) ConnID() string    { return c.id }
func (c *fakeConn) Send([]byte) error { return nil }
func (c *fakeConn) Close()            { c.once.Do(func() { close(c.closed) }) }

// inbox is a bus.Receiver that reads at once and remembers everything.
type inbox struct {
	ends chan error

	mu     sync.Mutex
	frames []string
}

func newInbox() *inbox { return &inbox{ends: make(chan error, 64)} }

func (i *inbox) Deliver(l *bus.Link, buf []byte) {
	p := bus.Frame(buf)
	i.mu.Lock()
	i.frames = append(i.frames, unmarked(p))
	i.mu.Unlock()
	l.Consumed(1, len(p))
}

func (i *inbox) End(_ *bus.Link, err error) { i.ends <- err }

func (i *inbox) got() []string {
	i.mu.Lock()
	defer i.mu.Unlock()
	return slices.Clone(i.frames)
}

// binary is a binary's connection.
type binary struct {
	*fakeConn
	at       *node
	serverID string
	in       *inbox
	evicted  chan error
	dead     atomic.Bool // answers no ping
	pings    atomic.Int64
}

func (n *node) newBinary(serverID string) *binary {
	return &binary{fakeConn: newConn(), at: n, serverID: serverID, in: newInbox(), evicted: make(chan error, 8)}
}

// claim claims serverID for a new binary.
func (n *node) claim(serverID string, opts ...Option) (*binary, error) {
	b := n.newBinary(serverID)
	return b, b.claim(opts...)
}

func (b *binary) claim(opts ...Option) error {
	return b.at.ClaimServer(b.serverID, b, append([]Option{
		WithReceiver(b.in), WithPing(b.ping), OnEvict(func(err error) { b.evicted <- err }),
	}, opts...)...)
}

func (n *node) mustClaim(serverID string, opts ...Option) *binary {
	n.t.Helper()
	b, err := n.claim(serverID, opts...)
	if err != nil {
		n.t.Fatalf("claim %q: %v", serverID, err)
	}
	return b
}

func (b *binary) ping(context.Context) error {
	b.pings.Add(1)
	if b.dead.Load() {
		return errors.New("no pong")
	}
	return nil
}

func (b *binary) release() { b.at.ReleaseServer(b.serverID, b) }

// session is the session of b's holding; zero if it has none.
func (b *binary) session() bus.SessionID {
	if h := b.at.localHolding(b.serverID); h != nil && h.conn == b {
		return h.session
	}
	return bus.SessionID{}
}

// phone is a phone's connection.
type testPhone struct {
	*fakeConn
	at       *node
	serverID string
	in       *inbox
	link     *bus.Link
}

func (n *node) dial(serverID string) (*testPhone, error) {
	p := &testPhone{fakeConn: newConn(), at: n, serverID: serverID, in: newInbox()}
	p.link = n.Bus().NewLink(serverID, p.id, p.in)
	return p, n.RegisterPhone(serverID, p, WithLink(p.link))
}

func (n *node) mustDial(serverID string) *testPhone {
	n.t.Helper()
	p, err := n.dial(serverID)
	if err != nil {
		n.t.Fatalf("dial %q: %v", serverID, err)
	}
	return p
}

func (p *testPhone) send(t *testing.T, frame string) {
	t.Helper()
	if err := p.link.Send(append(make([]byte, bus.Headroom), markFrame+frame...)); err != nil {
		t.Fatalf("send %q: %v", frame, err)
	}
}

// unmarked is what send was given.
func unmarked(frame []byte) string { return strings.TrimPrefix(string(frame), markFrame) }

func (p *testPhone) hangUp() { p.at.UnregisterPhone(p.serverID, p.id) }

// slack is the share of a loaded machine in what is timed.
const slack = time.Second

// eventually waits for a state.
func eventually(t *testing.T, d time.Duration, what string, cond func() bool) {
	t.Helper()
	tick := time.NewTicker(3 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(d); !cond(); <-tick.C {
		if time.Now().After(end) {
			t.Fatalf("not within %s: %s", d, what)
		}
	}
}

// within takes the next value of c.
func within[T any](t *testing.T, d time.Duration, what string, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(d):
		t.Fatalf("not within %s: %s", d, what)
		panic("unreachable")
	}
}

func wantErr(t *testing.T, what string, got, want error) {
	t.Helper()
	if !errors.Is(got, want) || want == nil && got != nil {
		t.Errorf("%s: got %v, want %v", what, got, want)
	}
}

// wantQuiet fails the test if c has a value already.
func wantQuiet[T any](t *testing.T, what string, c <-chan T) {
	t.Helper()
	select {
	case v := <-c:
		t.Errorf("%s: got %v, want nothing", what, v)
	default:
	}
}
