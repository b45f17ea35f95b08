package bus

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/pyrycode/pyrycode-relay/testenv"
)

func dial(t *testing.T, cfg ConnConfig) *Conn {
	t.Helper()
	c, err := Dial(cfg, NewNodeID("gw"), logger)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// useBucket proves that JetStream works.
func useBucket(t *testing.T, c *Conn) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	kv, err := c.JetStream().CreateKeyValue(ctx, jetstream.KeyValueConfig{Bucket: "b"})
	if err != nil {
		t.Fatalf("create a bucket: %v", err)
	}
	if _, err := kv.Create(ctx, "k", []byte("v")); err != nil {
		t.Errorf("create a key: %v", err)
	}
}

func TestDial_ServerIsNotThereYet(t *testing.T) {
	s := startNATS(t, testenv.ServerOptions{})
	s.Stop()
	c := dial(t, ConnConfig{URL: s.URL()})
	if c.Connected() || c.Embedded() || c.MaxPayload() != 0 {
		t.Errorf("connected %v, embedded %v, max payload %d before the server is there", c.Connected(), c.Embedded(), c.MaxPayload())
	}
	if err := s.Restart(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the connection comes up", c.Connected)
	if c.MaxPayload() != 1<<20 || c.Servers() != 1 {
		t.Errorf("max payload %d, servers %d", c.MaxPayload(), c.Servers())
	}
	useBucket(t, c)
	if _, err := c.Request(t.Context(), "nobody", nil); !errors.Is(err, ErrNoResponders) {
		t.Errorf("request to nobody: %v, want ErrNoResponders", err)
	}
}

func TestDial_ServerIsThere_IsConnectedAtOnce(t *testing.T) {
	s := startNATS(t, testenv.ServerOptions{})
	for range 20 {
		if c := dial(t, ConnConfig{URL: s.URL()}); !c.Connected() {
			t.Fatal("not connected when Dial returned")
		}
	}
}

// Whoever decides by Connected knows by then that what was true before is a hint.
func TestReconnect_DisturbanceIsToldFirst(t *testing.T) {
	s := startNATS(t, testenv.ServerOptions{})
	proxy, err := testenv.NewProxy(strings.TrimPrefix(s.URL(), "nats://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(proxy.Close)
	c := dial(t, ConnConfig{URL: "nats://" + proxy.Addr()})
	told := make(chan bool, 1)
	c.OnDisturbed(func() { told <- c.Connected() })
	proxy.Cut()
	select {
	case connected := <-told:
		if connected {
			t.Error("connected before that was told")
		}
	case <-time.After(patience):
		t.Fatal("nothing was told")
	}
	eventually(t, "it is connected", c.Connected)
}

func TestDial_SubscriptionMadeBeforeTheServerIsThere_Works(t *testing.T) {
	s := startNATS(t, testenv.ServerOptions{})
	s.Stop()
	r := &rig{T: t, session: NewSessionID()}
	r.phones, r.mover = startBus(t, s.URL(), testConfig)
	r.binaries, r.held = startBus(t, s.URL(), testConfig)
	if err := s.Restart(); err != nil {
		t.Fatal(err)
	}
	r.waitConnected()
	binary := r.newReceiver()
	p, _ := r.connect(r.newReceiver(), binary)
	sendAll(t, p, "x")
	binary.wants("x")
}

// A relay that starts while its credential is not allowed yet goes on trying.
func TestDial_CredentialIsAllowedLater(t *testing.T) {
	var password atomic.Value
	password.Store("another")
	s := startNATS(t, testenv.ServerOptions{Configure: func(o *server.Options) {
		o.Username, o.Password = "relay", password.Load().(string)
	}})
	c := dial(t, ConnConfig{URL: strings.Replace(s.URL(), "://", "://relay:secret@", 1)})
	refused := func() bool {
		err := c.nc.LastError()
		return err != nil && strings.Contains(strings.ToLower(err.Error()), "authorization")
	}
	eventually(t, "the credential is refused", refused)
	wait(t, 6*(reconnectWait+reconnectJitter)) // nats.go gives up at the second refusal, unless told otherwise
	s.Stop()
	password.Store("secret")
	if err := s.Restart(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the connection comes up", c.Connected)
}

func TestDial_EmbeddedInMemory(t *testing.T) {
	c := dial(t, ConnConfig{})
	eventually(t, "the connection comes up", c.Connected)
	if !c.Embedded() || c.Servers() != 1 || c.MaxPayload() != embeddedMaxPayload {
		t.Errorf("embedded %v, servers %d, max payload %d", c.Embedded(), c.Servers(), c.MaxPayload())
	}
	useBucket(t, c)
	c.Close()
	if _, err := os.Stat(c.tmp); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the temporary store is still there: %v", err)
	}
}

func TestDial_EmbeddedWithAStore_RemembersIt(t *testing.T) {
	dir := t.TempDir()
	c := dial(t, ConnConfig{StoreDir: dir})
	useBucket(t, c)
	c.Close()
	c = dial(t, ConnConfig{StoreDir: dir})
	kv, err := c.JetStream().KeyValue(t.Context(), "b")
	if err != nil {
		t.Fatal(err)
	}
	if e, err := kv.Get(t.Context(), "k"); err != nil || string(e.Value()) != "v" {
		t.Errorf("got %v, %v, want v", e, err)
	}
}

func writeConfig(t *testing.T, text string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "nats.conf")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func TestDial_EmbeddedWithAConfiguration(t *testing.T) {
	file := writeConfig(t, fmt.Sprintf(`
		server_name: one
		listen: "127.0.0.1:-1"
		max_payload: 2MB
		jetstream { store_dir: %q, max_memory_store: 64MB, max_file_store: 64MB }
	`, t.TempDir()))
	c := dial(t, ConnConfig{ConfigFile: file})
	eventually(t, "the connection comes up", c.Connected)
	if !c.Embedded() || c.MaxPayload() != 2<<20 || c.Servers() != 1 {
		t.Errorf("embedded %v, max payload %d, servers %d", c.Embedded(), c.MaxPayload(), c.Servers())
	}
	useBucket(t, c)
	other := dial(t, ConnConfig{URL: c.srv.ClientURL()}) // the port is open
	eventually(t, "another process connects", other.Connected)
}

func TestDial_SettingThatCannotWork_IsNamed(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()             //nolint:errcheck // nothing depends on it
	t.Setenv("TMPDIR", t.TempDir()) // other packages' tests make such stores at the same time
	before := tempStores(t)
	for name, c := range map[string]struct {
		cfg  ConnConfig
		want string
	}{
		"no JetStream":          {ConnConfig{ConfigFile: writeConfig(t, `listen: "127.0.0.1:-1"`)}, "JetStream is off"},
		"no such configuration": {ConnConfig{ConfigFile: "/nonexistent/nats.conf"}, "/nonexistent/nats.conf"},
		"broken configuration":  {ConnConfig{ConfigFile: writeConfig(t, `jetstream {`)}, "nats.conf"},
		"port is taken":         {ConnConfig{ConfigFile: writeConfig(t, fmt.Sprintf("listen: %q\njetstream { store_dir: %q }", taken.Addr(), t.TempDir()))}, taken.Addr().String()},
		"store is a file":       {ConnConfig{StoreDir: writeConfig(t, "")}, "embedded NATS server"},
		"no such credential":    {ConnConfig{URL: "nats://127.0.0.1:1", Creds: "/nonexistent/creds"}, "/nonexistent/creds"},
		"no such CA":            {ConnConfig{URL: "nats://127.0.0.1:1", CA: "/nonexistent/ca"}, "/nonexistent/ca"},
		"no such certificate":   {ConnConfig{URL: "nats://127.0.0.1:1", Cert: "/nonexistent/cert", Key: "/nonexistent/key"}, "/nonexistent/cert"},
		"malformed URL":         {ConnConfig{URL: "nats://user:secret/x@host:4222"}, "URL"},
	} {
		conn, err := Dial(c.cfg, "n", logger)
		if err == nil {
			conn.Close()
			t.Errorf("%s: no error", name)
			continue
		}
		if !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: %v, want it to name %q", name, err, c.want)
		}
	}
	if after := tempStores(t); after > before {
		t.Errorf("%d temporary stores were left behind", after-before)
	}
}

func tempStores(t *testing.T) int {
	t.Helper()
	dirs, err := filepath.Glob(filepath.Join(os.TempDir(), "pyrycode-relay-nats-*"))
	if err != nil {
		t.Fatal(err)
	}
	return len(dirs)
}

func TestClusterSize_CountsRoutesToOthers(t *testing.T) {
	for want, routes := range map[int]string{
		1: ``,
		2: `"nats://127.0.0.1:6222", "nats://127.0.0.1:6223"`,
		3: `"nats://127.0.0.1:6223", "nats://127.0.0.1:6224"`,
	} {
		opts, err := server.ProcessConfigFile(writeConfig(t, `cluster { name: c, listen: "127.0.0.1:6222", routes: [`+routes+`] }`))
		if err != nil {
			t.Fatal(err)
		}
		if got := clusterSize(opts); got != want {
			t.Errorf("routes %s: %d servers, want %d", routes, got, want)
		}
	}
}

func TestRedact_LetsNoPasswordThrough(t *testing.T) {
	for text, want := range map[string]string{
		"nats: no servers available for connection":                "nats: no servers available for connection",
		"dial nats://relay:SECRET@host:4222: refused":              "dial (url) refused",
		`parse "nats://relay:SECRET@host": bad`:                    `parse (url) bad`,
		"dial relay:SECRET@host:4222":                              "dial (url)",
		"SECRET@host":                                              "(url)",
		"nats://a:SECRET@h1,nats://b:SECRET@h2 and more":           "(url) and more",
		"try nats://a:SECRET@h1 then\nb:SECRET@h2 then":            "try (url) then",
		"dial nats://relay:SECRET WITH SPACES SECRET@host refused": "dial (url) refused",
		"dial nats://host:4222 refused":                            "dial nats://host:4222 refused",
		"":                                                         "",
	} {
		if got := redact(errors.New(text)).Error(); got != want {
			t.Errorf("redact(%q) = %q, want %q", text, got, want)
		}
	}
}

func FuzzRedact(f *testing.F) {
	f.Add("dial ", "nats", "p w")
	f.Fuzz(func(t *testing.T, before, user, password string) {
		if strings.ContainsAny(user, " \t\r\n") || !strings.Contains(password, "SECRET") {
			return
		}
		got := redact(errors.New(before + " nats://" + user + ":" + password + "@host x")).Error()
		if strings.Contains(got, "SECRET") && !strings.Contains(before, "SECRET") && !strings.Contains(user, "SECRET") {
			t.Errorf("got %q", got)
		}
	})
}

// newProxiedRig has a fault proxy between the phones' node and NATS.
func newProxiedRig(t *testing.T, cfg Config) (*rig, *testenv.Proxy) {
	t.Helper()
	s := startNATS(t, testenv.ServerOptions{})
	proxy, err := testenv.NewProxy(strings.TrimPrefix(s.URL(), "nats://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(proxy.Close)
	r := &rig{T: t, session: NewSessionID()}
	r.phones, r.mover = startBus(t, "nats://"+proxy.Addr(), cfg)
	r.binaries, r.held = startBus(t, s.URL(), cfg)
	r.waitConnected()
	return r, proxy
}

// traffic sends numbered frames from both ends until stopped, and then checks
// that all of them have arrived. The receivers check the numbers.
type traffic struct {
	r     *rig
	links [2]*Link
	sent  [2]uint64
	stop  atomic.Bool
	wg    sync.WaitGroup
}

func (r *rig) startTraffic() *traffic {
	r.Helper()
	tr := &traffic{r: r}
	tr.links[0], tr.links[1] = r.connect(&receiver{t: r.T, onTake: checkNumber(r.T)}, &receiver{t: r.T, onTake: checkNumber(r.T)})
	for i, l := range tr.links {
		tr.wg.Go(func() {
			for ; !tr.stop.Load(); tr.sent[i]++ {
				if err := l.Send(numberedFrame(tr.sent[i], 1000)); err != nil {
					return
				}
			}
		})
	}
	return tr
}

// progress waits for another 200 frames each way.
func (tr *traffic) progress() {
	tr.r.Helper()
	for _, l := range tr.links {
		recv := l.recv.(*receiver)
		want := recv.count() + 200
		eventually(tr.r.T, "frames arrive", func() bool {
			if ends := recv.told(); len(ends) > 0 {
				tr.r.Fatalf("the link ended: %v", ends)
			}
			return recv.count() >= want
		})
	}
}

func (tr *traffic) finish() {
	tr.r.Helper()
	tr.stop.Store(true)
	tr.wg.Wait()
	for i, l := range tr.links {
		other := tr.links[1-i].recv.(*receiver)
		eventually(tr.r.T, "the last frame arrives", func() bool { return other.count() >= int(tr.sent[i]) }) //nolint:gosec // small
		if ends := l.recv.(*receiver).told(); len(ends) > 0 {
			tr.r.Errorf("the link ended: %v", ends)
		}
	}
}

func TestNATSConnectionIsCutAgainAndAgain_LinkLosesNothing(t *testing.T) {
	t.Parallel()
	r, proxy := newProxiedRig(t, testConfig)
	tr := r.startTraffic()
	for range 5 {
		tr.progress()
		proxy.Cut()
	}
	tr.progress()
	tr.finish()
	tr.links[0].Close(CodeError(1000))
	r.empty()
}

func TestNATSConnectionIsHeldFiveSeconds_LinkLosesNothing(t *testing.T) {
	t.Parallel()
	r, proxy := newProxiedRig(t, testConfig)
	tr := r.startTraffic()
	tr.progress()
	proxy.Hold()
	wait(t, 5*time.Second)
	proxy.Resume()
	tr.progress()
	tr.finish()
}

func TestNATSIsDownForLong_IdleLinkSurvives(t *testing.T) {
	t.Parallel()
	cfg := testConfig
	cfg.LinkTimeout = time.Second
	r, proxy := newProxiedRig(t, cfg)
	phone, binary := r.newReceiver(), r.newReceiver()
	p, b := r.connect(phone, binary)
	sendAll(t, p, "1")
	binary.wants("1")
	eventually(t, "the link is idle", func() bool {
		return strings.Contains(r.phones.size(), "timed 0") && strings.Contains(r.binaries.size(), "timed 0")
	})
	proxy.Refuse()
	proxy.Cut()
	wait(t, 3*cfg.LinkTimeout)
	proxy.Accept()
	r.waitConnected()
	sendAll(t, p, "2")
	sendAll(t, b, "a")
	binary.wants("1", "2")
	phone.wants("a")
}

// An end that gave up telling is found by the other one, when its own connection
// comes back.
func TestNATSIsDownForLong_LinkThatEndedMeanwhileEnds(t *testing.T) {
	t.Parallel()
	r, proxy := newProxiedRig(t, testConfig)
	phone := r.newReceiver()
	_, b := r.connect(phone, r.newReceiver())
	proxy.Refuse()
	proxy.Cut()
	b.forget(ErrNodeGone)
	proxy.Accept()
	if err := phone.ended(); !errors.Is(err, ErrLinkLost) {
		t.Errorf("ended with %v, want ErrLinkLost", err)
	}
	r.empty()
}

func TestNATSIsDeadWithDataOutstanding_BothEndsAreLost(t *testing.T) {
	t.Parallel()
	cfg := testConfig
	cfg.LinkTimeout = 2 * time.Second // 10 s by default, and the rule is the same
	r, proxy := newProxiedRig(t, cfg)
	tr := r.startTraffic()
	tr.progress()
	proxy.Hold()
	start := time.Now()
	for _, l := range tr.links {
		if err := l.recv.(*receiver).ended(); !errors.Is(err, ErrLinkLost) {
			t.Errorf("ended with %v, want ErrLinkLost", err)
		}
	}
	if d := time.Since(start); d < cfg.LinkTimeout-time.Second {
		t.Errorf("lost after %v, want %v", d, cfg.LinkTimeout)
	}
	tr.wg.Wait()
	proxy.Resume()
	r.empty()
}

// wait lets a fault last for d, of real time.
func wait(t *testing.T, d time.Duration) {
	select {
	case <-time.After(d):
	case <-t.Context().Done():
	}
}
