package main

// What the fault scenarios share: NATS servers and relays as processes, peers that
// notice every gap, and a look into the KV. The scenarios are in
// fault_gateway_test.go, fault_nats_test.go and fault_restart_test.go. Each bound
// is that of the promise; what was measured is logged.

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/pyrycode/pyrycode-relay/testenv"
)

// The bounds that the promises name.
const (
	shortLease = 6 * time.Second // --lease-ttl where a scenario outwaits it

	knownWithin  = 5 * time.Second  // that a gateway was killed, to everybody
	sweepTime    = 5 * time.Second  // connected means registered
	linkLimit    = 10 * time.Second // for data to be acknowledged
	answerWithin = 5 * time.Second  // an upgrade
	backWithin   = 15 * time.Second // everything, after NATS

	// electionTime is how long NATS may be without a leader: up to 9 s, and once more
	// if two candidates split the votes. (nats-measured.md 1.12)
	electionTime = 18 * time.Second
	// lapseTime is from the end of a lease until others act on it: the KV expires a
	// key up to a second late, and is asked twice a second. (nats-measured.md 1.4)
	lapseTime = 1500 * time.Millisecond
	// slack is the share of a loaded machine.
	slack = time.Second

	pollEvery = 20 * time.Millisecond
)

var (
	// natsProgram is the nats-server of the version in go.mod.
	natsProgram = &program{build: buildNATS}
	// calmNATS is for the scenarios that leave NATS alone.
	calmNATS = &shared[*natsTrio]{
		start: startTrio,
		close: (*natsTrio).close,
	}
)

func buildNATS() (program string, err error) {
	dir, err := os.MkdirTemp("", "pyrycode-relay-nats-server-")
	if err != nil {
		return "", err
	}
	program = filepath.Join(dir, "nats-server")
	command := exec.Command("go", "build", "-o", program, "github.com/nats-io/nats-server/v2")
	command.Dir = repository
	if out, err := command.CombinedOutput(); err != nil {
		os.RemoveAll(dir)
		return "", fmt.Errorf("build nats-server: %w\n%s", err, out)
	}
	return program, nil
}

// ownTrio is for a scenario that NATS does not survive unharmed.
func ownTrio(t *testing.T) *natsTrio {
	t.Helper()
	trio, err := startTrio(t)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		trio.close()
		for _, s := range trio {
			if t.Failed() {
				t.Logf("log of %s:\n%s", s.name, s.log.tail(30))
			}
		}
	})
	return trio
}

// natsTrio is a JetStream cluster of three nats-server processes, with the settings
// recommended for a relay. They do not tell clients about each other.
type natsTrio [3]*natsProcess

// natsProcess is one server. Its methods are called one at a time.
type natsProcess struct {
	// Static after construction.
	program, config, store string
	name, address, health  string
	log                    *logBook

	command *exec.Cmd // the latest; nil if it was killed
}

func startTrio(t *testing.T) (*natsTrio, error) {
	t.Helper()
	program, ports := natsProgram.path, freePorts(t, 9) // clients, routes, monitoring
	dir, err := os.MkdirTemp("", "pyrycode-relay-trio-")
	if err != nil {
		return nil, err
	}
	trio := new(natsTrio)
	for i := range trio {
		s := &natsProcess{
			program: program, log: newLogBook(),
			name:    fmt.Sprintf("nats-%d", i+1),
			config:  filepath.Join(dir, fmt.Sprintf("nats-%d.conf", i+1)),
			store:   filepath.Join(dir, fmt.Sprintf("store-%d", i+1)),
			address: fmt.Sprintf("127.0.0.1:%d", ports[i]),
			health:  fmt.Sprintf("http://127.0.0.1:%d/healthz", ports[6+i]),
		}
		trio[i] = s
		config := fmt.Sprintf(`server_name: %s, listen: %q, http: "127.0.0.1:%d"
write_deadline: "2s", no_fast_producer_stall: true, ping_interval: "5s", lame_duck_grace_period: "1s"
jetstream: { store_dir: %q }
cluster: {
  name: trio, listen: "127.0.0.1:%d", no_advertise: true, ping_interval: "3s"
  routes: [nats://127.0.0.1:%d, nats://127.0.0.1:%d, nats://127.0.0.1:%d]
}
`, s.name, s.address, ports[6+i], s.store, ports[3+i], ports[3], ports[4], ports[5])
		if err := os.WriteFile(s.config, []byte(config), 0o600); err != nil {
			return nil, err
		}
		if err := s.start(); err != nil {
			trio.close()
			return nil, err
		}
	}
	return trio, nil
}

func (s *natsProcess) start() error {
	s.command = exec.Command(s.program, "--config", s.config)
	s.command.Stdout, s.command.Stderr = s.log, s.log
	return s.command.Start()
}

// kill ends the server as a power cut would.
func (s *natsProcess) kill() {
	if s.command == nil {
		return
	}
	_ = s.command.Process.Kill() // fails if it has ended, and so does Wait
	_ = s.command.Wait()
	s.command = nil
}

func (s *natsProcess) signal(t *testing.T, sig os.Signal) {
	t.Helper()
	if err := s.command.Process.Signal(sig); err != nil {
		t.Fatal(err)
	}
}

func (s *natsProcess) restart(t *testing.T) {
	t.Helper()
	if err := s.start(); err != nil {
		t.Fatal(err)
	}
}

// kill ends all servers at once.
func (trio *natsTrio) kill() {
	var ends sync.WaitGroup
	for _, s := range trio {
		if s != nil {
			ends.Go(s.kill)
		}
	}
	ends.Wait()
}

func (trio *natsTrio) close() {
	trio.kill()
	os.RemoveAll(filepath.Dir(trio[0].config))
}

// urls are those of all servers, as --nats-url takes them.
func (trio *natsTrio) urls() string {
	var urls []string
	for _, s := range trio {
		urls = append(urls, "nats://"+s.address)
	}
	return strings.Join(urls, ",")
}

// place is where a scenario happens: three relay processes beside three NATS servers.
type place struct {
	nodes [3]*node
	kv    kvView
}

// startPlace starts three nodes that know all servers of trio, with buckets of this
// test's own.
func startPlace(t *testing.T, trio *natsTrio, flags ...string) place {
	t.Helper()
	p := place{kv: lookInto(t, trio.urls())}
	for i := range p.nodes {
		p.nodes[i] = startProcess(t, p.flags(i, trio.urls(), flags...)...)
	}
	return p
}

func (p place) flags(i int, natsURL string, more ...string) []string {
	return append([]string{
		"--gateway-id", fmt.Sprintf("node-%d", i+1), "--nats-url", natsURL, "--kv-prefix", p.kv.prefix, "--kv-replicas", "3",
	}, more...)
}

// kvView reads the buckets of one test as an operator would.
type kvView struct {
	js     jetstream.JetStream
	prefix string
}

func lookInto(t *testing.T, natsURLs string) kvView {
	t.Helper()
	nc, err := nats.Connect(natsURLs, nats.MaxReconnects(-1), nats.RetryOnFailedConnect(true), nats.ReconnectWait(100*time.Millisecond))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	return kvView{js: js, prefix: freshPrefix()}
}

// presence says what the KV knows of serverID, as "held by node-1"; "nothing" if it
// has no entry, "" if it does not answer. A replica may answer, and lag.
func (v kvView) presence(ctx context.Context, serverID string) string {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	kv, err := v.js.KeyValue(ctx, v.prefix+"_presence")
	if err != nil {
		return ""
	}
	found, err := kv.Get(ctx, serverID) // a UUID is its own key
	if errors.Is(err, jetstream.ErrKeyNotFound) {
		return "nothing"
	}
	var entry struct{ Node, State string }
	if err != nil || json.Unmarshal(found.Value(), &entry) != nil {
		return ""
	}
	return entry.State + " by " + entry.Node[:strings.LastIndexByte(entry.Node, '-')]
}

// whole reports whether both buckets are there, each with a leader and all replicas up
// to date.
func (v kvView) whole(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	for _, bucket := range []string{"_nodes", "_presence"} {
		stream, err := v.js.Stream(ctx, "KV_"+v.prefix+bucket)
		if err != nil {
			return false
		}
		c := stream.CachedInfo().Cluster
		behind := func(p *jetstream.PeerInfo) bool { return !p.Current || p.Offline }
		if c == nil || c.Leader == "" || slices.ContainsFunc(c.Replicas, behind) {
			return false
		}
	}
	return true
}

// await waits until the KV says want of serverID.
func (v kvView) await(ctx context.Context, t *testing.T, serverID, want string) {
	t.Helper()
	eventually(ctx, t, fmt.Sprintf("%q in the KV", want), func() bool { return v.presence(ctx, serverID) == want })
}

// leader is the name of the NATS server that decides claims.
func (v kvView) leader(ctx context.Context, t *testing.T) (name string) {
	t.Helper()
	eventually(ctx, t, "leader", func() bool {
		ctx, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		stream, err := v.js.Stream(ctx, "KV_"+v.prefix+"_presence")
		if err != nil || stream.CachedInfo().Cluster == nil {
			return false
		}
		name = stream.CachedInfo().Cluster.Leader
		return name != ""
	})
	return name
}

// eventually waits for a state that tells nobody when it comes.
func eventually(ctx context.Context, t *testing.T, what string, reached func() bool) {
	t.Helper()
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for !reached() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("no %s: %v", what, context.Cause(ctx))
		}
	}
}

// within bounds what follows, counted from since.
func within(ctx context.Context, t *testing.T, since time.Time, limit time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithDeadlineCause(ctx, since.Add(limit), fmt.Errorf("not within %v", limit))
	t.Cleanup(cancel)
	return ctx
}

// lasts lets a fault last until d after since.
func lasts(ctx context.Context, since time.Time, d time.Duration) {
	select {
	case <-time.After(time.Until(since.Add(d))):
	case <-ctx.Done():
	}
}

func sinceMS(t time.Time) time.Duration { return time.Since(t).Round(time.Millisecond) }

// wantUnready checks that a node which decides nothing says so, and refuses before
// the upgrade, so that clients back off.
func wantUnready(ctx context.Context, t *testing.T, n *node, reasons ...string) {
	t.Helper()
	status, body := fetch(t, n.http+"/readyz")
	if status != http.StatusServiceUnavailable || !slices.ContainsFunc(reasons, func(r string) bool { return strings.Contains(body, r) }) {
		t.Errorf("/readyz: got %d %s, want 503 and one of %q", status, body, reasons)
	}
	_, phone := testenv.DialPhone(ctx, n.url, testenv.PhoneOptions{ServerID: randomUUID()})
	_, binary := testenv.DialBinary(ctx, n.url, testenv.BinaryOptions{ServerID: randomUUID()})
	for who, err := range map[string]error{"phone": phone, "binary": binary} {
		var refused *testenv.RefusedError
		if !errors.As(err, &refused) || refused.Status != http.StatusServiceUnavailable || refused.Header.Get("Retry-After") == "" {
			t.Errorf("a %s that dials a node that is not ready: got %v, want 503 with Retry-After", who, err)
		}
	}
}

func isReady(t *testing.T, n *node) bool {
	t.Helper()
	status, _ := fetch(t, n.http+"/readyz")
	return status == http.StatusOK
}

// tally counts what clients were told. Safe for concurrent use.
type tally struct {
	mu     sync.Mutex
	counts map[string]int
}

func (c *tally) add(told string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.counts == nil {
		c.counts = make(map[string]int)
	}
	c.counts[told]++
}

func (c *tally) all() map[string]int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return maps.Clone(c.counts)
}

// want checks that clients were told nothing else.
func (c *tally) want(t *testing.T, allowed ...string) {
	t.Helper()
	for told, n := range c.all() {
		if !slices.Contains(allowed, told) {
			t.Errorf("clients were told %q %d times, want nothing but %q", told, n, allowed)
		}
	}
}

// refusalText is the status of a refusal, or whatever else became of a dial.
func refusalText(ctx context.Context, err error) string {
	if refused := new(testenv.RefusedError); errors.As(err, &refused) {
		return fmt.Sprint(refused.Status)
	}
	if ctx.Err() != nil {
		return "no time was left"
	}
	return err.Error()
}

// echo answers each frame with itself until the connection ends.
func echo(ctx context.Context, binary *testenv.Binary) {
	for {
		e, err := binary.NextEnvelope(ctx)
		if err == nil && e.Frame != nil {
			err = binary.Send(ctx, e.ConnID, e.Frame)
		}
		if err != nil {
			return
		}
	}
}

// conversation is a phone and its binary that exchange numbered frames all the time:
// the binary answers each. A gap, a duplicate or a change of order ends it.
type conversation struct {
	phone  *testenv.Phone
	binary *testenv.Binary
	every  time.Duration // a question
	hangUp func()        // ends the asking

	sent, answered atomic.Int64
	longest        atomic.Int64 // nanoseconds that an answer took
	notice         atomic.Int64 // the close code that the binary was told

	ended chan struct{} // closed with the first error
	err   error         // that, once ended is closed
}

// talkEvery paces a conversation that is one of a few.
const talkEvery = 10 * time.Millisecond

// converseAcross begins a conversation of a phone and a binary that it dials.
func converseAcross(ctx context.Context, t *testing.T, forPhone, forBinary *node, serverID string) *conversation {
	t.Helper()
	binary := dialBinary(ctx, t, forBinary, serverID)
	return converse(ctx, t, dialPhone(ctx, t, forPhone, serverID), binary)
}

// converse begins a conversation, which has both peers to itself.
func converse(ctx context.Context, t *testing.T, phone *testenv.Phone, binary *testenv.Binary) *conversation {
	t.Helper()
	c := beginToConverse(ctx, t, phone, binary, talkEvery)
	c.wantGoingOn(ctx, t, "at first")
	return c
}

// beginToConverse is converse that does not wait, with a pace of its own.
func beginToConverse(ctx context.Context, t *testing.T, phone *testenv.Phone, binary *testenv.Binary, every time.Duration) *conversation {
	t.Helper()
	asking, hangUp := context.WithCancel(ctx)
	c := &conversation{phone: phone, binary: binary, every: every, hangUp: hangUp, ended: make(chan struct{})}
	var first sync.Once
	var parts sync.WaitGroup
	for _, part := range []func() error{
		func() error { return c.ask(ctx, asking.Done()) },
		func() error { return c.answer(ctx) },
		func() error { return c.listen(ctx) },
	} {
		parts.Go(func() {
			if err := part(); err != nil {
				first.Do(func() {
					c.err = err
					close(c.ended)
				})
			}
		})
	}
	t.Cleanup(func() {
		hangUp()
		phone.Drop()
		binary.Drop()
		parts.Wait()
	})
	return c
}

func (c *conversation) ask(ctx context.Context, hungUp <-chan struct{}) error {
	tick := time.NewTicker(c.every)
	defer tick.Stop()
	for n := 0; ; n++ {
		select {
		case <-tick.C:
		case <-hungUp:
			return nil
		}
		c.sent.Store(int64(n) + 1)
		if err := c.phone.Send(ctx, numberedFrame(nil, up, 0, n)); err != nil {
			return fmt.Errorf("the phone sends frame %d: %w", n, err)
		}
	}
}

func (c *conversation) answer(ctx context.Context) error {
	for n := 0; ; n++ {
		e, err := c.binary.NextEnvelope(ctx)
		switch want := numberedFrame(nil, up, 0, n); {
		case err != nil:
			return fmt.Errorf("the binary waits for frame %d: %w", n, err)
		case e.HasClose:
			c.notice.Store(int64(e.CloseCode))
			return fmt.Errorf("the binary waits for frame %d: the phone is gone with %d", n, e.CloseCode)
		case !bytes.Equal(e.Frame, want):
			return fmt.Errorf("the binary got %s, want %s", e.Frame, want)
		}
		if err := c.binary.Send(ctx, e.ConnID, numberedFrame(nil, down, 0, n)); err != nil {
			return fmt.Errorf("the binary answers frame %d: %w", n, err)
		}
	}
}

func (c *conversation) listen(ctx context.Context) error {
	last := time.Now()
	for n := 0; ; n++ {
		got, err := c.phone.Next(ctx)
		switch want := numberedFrame(nil, down, 0, n); {
		case err != nil:
			return fmt.Errorf("the phone waits for answer %d: %w", n, err)
		case !bytes.Equal(got, want):
			return fmt.Errorf("the phone got %s, want %s", got, want)
		}
		c.longest.Store(max(c.longest.Load(), int64(time.Since(last))))
		last = time.Now()
		c.answered.Store(int64(n) + 1)
	}
}

func (c *conversation) over() bool {
	select {
	case <-c.ended:
		return true
	default:
		return false
	}
}

// wantGoingOn waits until what is sent from now on is answered.
func (c *conversation) wantGoingOn(ctx context.Context, t *testing.T, when string) {
	t.Helper()
	enough := c.sent.Load() + 2
	eventually(ctx, t, "answer "+when, func() bool { return c.over() || c.answered.Load() >= enough })
	if c.over() {
		t.Fatalf("%s: %v, want a conversation that goes on", when, c.err)
	}
}

// wantWhole ends the conversation and checks that nothing of it is missing.
func (c *conversation) wantWhole(ctx context.Context, t *testing.T, who string) {
	t.Helper()
	c.wantGoingOn(ctx, t, "at the end")
	c.hangUp()
	eventually(ctx, t, "last answer", func() bool { return c.over() || c.answered.Load() == c.sent.Load() })
	if c.over() {
		t.Fatalf("%s: %v, want every frame in order", who, c.err)
	}
	t.Logf("%s: %d frames each way, at most %v between two answers", who, c.answered.Load(), time.Duration(c.longest.Load()).Round(time.Millisecond))
}
