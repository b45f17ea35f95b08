package main

// What is shipped beside the program, proven without a Docker engine: the files
// are parsed, and what they start is started, with as few changes as a single
// machine without containers allows (addresses, ports, store directories).

import (
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"go.yaml.in/yaml/v3"
)

// deployWait bounds each wait for a state: an election takes up to 9 s, and the
// race detector and a loaded machine have their share.
const deployWait = 60 * time.Second

// compose is as much of docker-compose.yml as the tests look at.
type compose struct {
	Services map[string]composeService
	Networks map[string]any
	Volumes  map[string]any
}

type composeService struct {
	Image       string
	Build       any
	Command     []string
	Environment map[string]string
	Volumes     []string
	Networks    []string
	Profiles    []string
	Ports       []string
	DependsOn   map[string]struct{ Condition string } `yaml:"depends_on"`
	Healthcheck struct {
		Test    []string
		Disable bool
	}
}

var composeVariable = regexp.MustCompile(`\$\{[A-Z_]+:-([^}]*)\}`)

// readCompose returns docker-compose.yml as Compose sees it in an empty
// environment: every variable has its default.
func readCompose(t *testing.T) compose {
	t.Helper()
	text := composeVariable.ReplaceAll(readShipped(t, "docker-compose.yml"), []byte("$1"))
	if bytes.ContainsRune(text, '$') {
		t.Fatal("docker-compose.yml has a variable without a default, want ${NAME:-default} everywhere")
	}
	var c compose
	if err := yaml.Unmarshal(text, &c); err != nil {
		t.Fatal(err)
	}
	return c
}

var (
	composeNATS     = []string{"nats-1", "nats-2", "nats-3"}
	composeGateways = []string{"gateway-1", "gateway-2", "gateway-3"}
)

func TestCompose_ServicesHoldTogether(t *testing.T) {
	c := readCompose(t)
	for _, name := range slices.Concat(composeNATS, composeGateways, []string{"balancer", "smoke"}) {
		if _, ok := c.Services[name]; !ok {
			t.Errorf("service %s is missing", name)
		}
	}
	for name, s := range c.Services {
		if s.Image == "" {
			t.Errorf("%s: no image", name)
		}
		if !s.Healthcheck.Disable && len(s.Healthcheck.Test) < 2 {
			t.Errorf("%s: health check %q, want a command", name, s.Healthcheck.Test)
		}
		for _, network := range s.Networks {
			if _, ok := c.Networks[network]; !ok {
				t.Errorf("%s: network %s is not defined", name, network)
			}
		}
		for other, on := range s.DependsOn {
			if _, ok := c.Services[other]; !ok || on.Condition != "service_healthy" {
				t.Errorf("%s: depends on %s (%s), want a service of the file, healthy", name, other, on.Condition)
			}
		}
		for _, mount := range s.Volumes {
			source, _, _ := strings.Cut(mount, ":")
			if !strings.HasPrefix(source, ".") {
				if _, ok := c.Volumes[source]; !ok {
					t.Errorf("%s: volume %s is not defined", name, source)
				}
			} else if _, err := os.Stat(filepath.Join(repository, source)); err != nil {
				t.Errorf("%s mounts what is not there: %v", name, err)
			}
		}
	}
	for _, name := range composeNATS {
		if !slices.Contains(c.Services[name].Volumes, name+":/data") {
			t.Errorf("%s: volumes %q, want a named one at /data, the store_dir of relay.conf", name, c.Services[name].Volumes)
		}
	}
	// Everybody whom the load balancer names is there, at the port it names.
	haproxy := string(readShipped(t, "deploy/haproxy/haproxy.cfg"))
	for _, name := range composeGateways {
		if want := fmt.Sprintf("server %s %s:8080", name, name); !strings.Contains(haproxy, want) {
			t.Errorf("haproxy.cfg has no line %q", want)
		}
	}
}

func TestCompose_GatewaySettingsAreSettingsOfTheRelay(t *testing.T) {
	c := readCompose(t)
	for _, name := range composeGateways {
		s := c.Services[name]
		if s.Command[0] != "serve" {
			t.Fatalf("%s: command %q, want serve", name, s.Command)
		}
		cfg, err := parseConfig(s.Command[1:], environ(s.Environment))
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if cfg.gatewayID != name || cfg.insecureListen != ":8080" || len(cfg.trustXForwardedFor) != 1 {
			t.Errorf("%s: id %q on %q behind %v, want its own name, :8080 and the edge network", name, cfg.gatewayID, cfg.insecureListen, cfg.trustXForwardedFor)
		}
		if got := strings.Count(cfg.natsURL, "nats://gateway:"); got != 3 {
			t.Errorf("%s: %d NATS servers in --nats-url, want 3", name, got)
		}
	}
}

func TestSystemdEnvironment_IsOneOfTheRelay(t *testing.T) {
	var variables []string
	for line := range strings.Lines(string(readShipped(t, "deploy/systemd/relay.env"))) {
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "#") {
			variables = append(variables, line)
		}
	}
	if _, err := parseConfig(nil, variables); err != nil {
		t.Error(err)
	}
	unit := string(readShipped(t, "deploy/systemd/pyrycode-relay.service"))
	for _, want := range []string{"ExecStart=/usr/local/bin/pyrycode-relay serve\n", "EnvironmentFile=/etc/pyrycode-relay/relay.env\n"} {
		if !strings.Contains(unit, want) {
			t.Errorf("the unit has no line %q", want)
		}
	}
}

func TestNATSConfigurations_AreValidAndAsRecommended(t *testing.T) {
	for name, value := range readCompose(t).Services["nats-1"].Environment {
		t.Setenv(name, value)
	}
	files := []string{"deploy/nats/relay.conf"}
	relays, err := filepath.Glob(filepath.Join(repository, "deploy/three-relays/*.conf"))
	if err != nil || len(relays) != 3 {
		t.Fatalf("%d files in deploy/three-relays (%v), want 3", len(relays), err)
	}
	for _, file := range relays {
		files = append(files, "deploy/three-relays/"+filepath.Base(file))
	}
	for _, file := range files {
		o, err := server.ProcessConfigFile(filepath.Join(repository, file))
		if err != nil {
			t.Errorf("%s: %v", file, err)
			continue
		}
		if !o.NoFastProducerStall || o.WriteDeadline != 2*time.Second || o.PingInterval != 5*time.Second ||
			o.Cluster.PingInterval != 3*time.Second || o.MaxPayload != mib {
			t.Errorf("%s: stall %v, write_deadline %v, ping_interval %v and %v, max_payload %d; want what architecture.md recommends",
				file, !o.NoFastProducerStall, o.WriteDeadline, o.PingInterval, o.Cluster.PingInterval, o.MaxPayload)
		}
		if !o.JetStream || o.StoreDir == "" || len(o.Routes) != 3 || o.Cluster.Name == "" || o.ServerName == "" {
			t.Errorf("%s: JetStream %v in %q, %d routes of cluster %q: want one of three servers with file storage",
				file, o.JetStream, o.StoreDir, len(o.Routes), o.Cluster.Name)
		}
	}
}

// The two account files say the same but for two rights.
func TestNATSAccounts_DifferInTheRightToCreate(t *testing.T) {
	rights := func(file string) []string {
		return regexp.MustCompile(`(?m)^\s*"[^"]+"$|\b(?:user|password|max_\w+): *[\w$]+`).
			FindAllString(string(readShipped(t, "deploy/nats/"+file)), -1)
	}
	want := slices.DeleteFunc(rights("accounts.conf"), func(s string) bool { return strings.Contains(s, ".STREAM.CREATE.") })
	got := rights("accounts-no-create.conf")
	if !slices.Equal(got, want) {
		t.Errorf("accounts-no-create.conf:\ngot  %q\nwant %q", got, want)
	}
	if n := len(rights("accounts.conf")) - len(got); n != 2 {
		t.Errorf("accounts.conf has %d rights to create more, want 2", n)
	}
}

func TestComposeNATS_GatewayMayDoWhatItNeedsAndNoMore(t *testing.T) {
	cluster := startComposeNATS(t, "accounts.conf")
	gateway, errs := cluster.connect(t, "gateway", "demo-gateway")
	createBuckets(t, gateway)
	useBuckets(t, gateway)
	keepOut(t, cluster, gateway, errs)
}

func TestComposeNATS_GatewayWithoutTheRightToCreate(t *testing.T) {
	cluster := startComposeNATS(t, "accounts-no-create.conf")
	ctx := t.Context()
	gateway, errs := cluster.connect(t, "gateway", "demo-gateway")
	for _, bucket := range relayBuckets {
		short, cancel := context.WithTimeout(ctx, time.Second)
		if _, err := gateway.CreateKeyValue(short, bucket); err == nil {
			t.Errorf("create %s: done, want it refused", bucket.Bucket)
		}
		cancel()
		wantViolation(t, errs, "$JS.API.STREAM.CREATE.KV_"+bucket.Bucket)
	}
	admin, _ := cluster.connect(t, "admin", "demo-admin")
	createBuckets(t, admin)
	useBuckets(t, gateway)
	keepOut(t, cluster, gateway, errs)
}

// relayBuckets are the buckets of the relay, in the shape that matters to NATS.
var relayBuckets = []jetstream.KeyValueConfig{
	{Bucket: "pyrycode_relay_nodes", History: 1, Replicas: 3, TTL: 20 * time.Second, LimitMarkerTTL: time.Minute},
	{Bucket: "pyrycode_relay_presence", History: 1, Replicas: 3, LimitMarkerTTL: time.Minute},
}

// createBuckets tries until it may: a cluster that has just formed knows of
// fewer servers than it has ("no suitable peers").
func createBuckets(t *testing.T, js jetstream.JetStream) {
	t.Helper()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(deployWait)
	for _, bucket := range relayBuckets {
		for {
			_, err := js.CreateKeyValue(t.Context(), bucket)
			if err == nil {
				break
			}
			select {
			case <-tick.C:
			case <-deadline:
				t.Fatalf("create %s: %v", bucket.Bucket, err)
			}
		}
	}
}

// useBuckets does to both buckets what a gateway does.
func useBuckets(t *testing.T, js jetstream.JetStream) {
	t.Helper()
	ctx := t.Context()
	for _, config := range relayBuckets {
		kv, err := js.KeyValue(ctx, config.Bucket)
		if err != nil {
			t.Fatalf("open %s: %v", config.Bucket, err)
		}
		revision, err := kv.Create(ctx, "some=20node", []byte("1"))
		if err != nil {
			t.Fatalf("create in %s: %v", config.Bucket, err)
		}
		if revision, err = kv.Update(ctx, "some=20node", []byte("2"), revision); err != nil {
			t.Errorf("update in %s: %v", config.Bucket, err)
		}
		ack, err := js.Publish(ctx, "$KV."+config.Bucket+".some=20node", []byte("3"),
			jetstream.WithExpectLastSequencePerSubject(revision), jetstream.WithMsgTTL(30*time.Second))
		if err != nil {
			t.Fatalf("CAS with a TTL in %s: %v", config.Bucket, err)
		}
		if entry, err := kv.Get(ctx, "some=20node"); err != nil {
			t.Errorf("get from %s: %v", config.Bucket, err)
		} else if entry.Revision() > ack.Sequence { // a replica may lag, but not run ahead
			t.Errorf("get from %s: revision %d, want at most %d", config.Bucket, entry.Revision(), ack.Sequence)
		}
		leader, err := js.Conn().RequestWithContext(ctx, "$JS.API.STREAM.MSG.GET.KV_"+config.Bucket,
			[]byte(`{"last_by_subj":"$KV.`+config.Bucket+`.some=20node"}`))
		if err != nil || !bytes.Contains(leader.Data, []byte(`"seq":`+fmt.Sprint(ack.Sequence))) {
			t.Errorf("read %s at the leader: %v, want revision %d", config.Bucket, err, ack.Sequence)
		}
		many, err := js.Conn().RequestWithContext(ctx, "$JS.API.DIRECT.GET.KV_"+config.Bucket,
			[]byte(`{"multi_last":["$KV.`+config.Bucket+`.some=20node"]}`))
		if err != nil || many.Header.Get(jetstream.SequenceHeader) != fmt.Sprint(ack.Sequence) {
			t.Errorf("read many from %s: %v, want revision %d", config.Bucket, err, ack.Sequence)
		}
		if err := kv.Delete(ctx, "some=20node", jetstream.LastRevision(ack.Sequence)); err != nil {
			t.Errorf("delete in %s: %v", config.Bucket, err)
		}
	}

	// The data path, and a request that another node answers.
	nc := js.Conn()
	sub, err := nc.SubscribeSync("pyrycode.relay.v1.node-1.>")
	if err != nil {
		t.Fatal(err)
	}
	if err := nc.PublishRequest("pyrycode.relay.v1.node-1.server.some-id", "pyrycode.relay.inbox.node-2.1", []byte("frame")); err != nil {
		t.Fatal(err)
	}
	if msg, err := sub.NextMsgWithContext(ctx); err != nil || string(msg.Data) != "frame" {
		t.Errorf("a frame over NATS: %v", err)
	}
}

// keepOut tries what no gateway may.
func keepOut(t *testing.T, cluster natsCluster, gateway jetstream.JetStream, errs <-chan error) {
	t.Helper()
	admin, _ := cluster.connect(t, "admin", "demo-admin")
	if _, err := admin.CreateStream(t.Context(), jetstream.StreamConfig{Name: "OTHER", Subjects: []string{"other.>"}, AllowDirect: true}); err != nil {
		t.Fatal(err)
	}
	nc := gateway.Conn()
	for _, subject := range []string{">", "other.>", "pyrycode.>", "$KV.>", "$JS.>", "$SYS.>", "_INBOX.>"} {
		if _, err := nc.SubscribeSync(subject); err != nil {
			t.Fatal(err)
		}
		wantViolation(t, errs, `Subscription to "`+subject+`"`)
	}
	for _, subject := range []string{
		"other.x", "$KV.other.x", "_INBOX.someone", "pyrycode.relay.v2.x",
		"$JS.API.STREAM.INFO.OTHER", "$JS.API.STREAM.MSG.GET.OTHER", "$JS.API.DIRECT.GET.OTHER.other.x",
		"$JS.API.CONSUMER.CREATE.OTHER.c", "$JS.API.CONSUMER.CREATE.KV_pyrycode_relay_presence.c", "$JS.API.STREAM.CREATE.MORE", "$JS.API.STREAM.NAMES",
		"$JS.API.STREAM.DELETE.KV_pyrycode_relay_presence", "$JS.API.STREAM.PURGE.KV_pyrycode_relay_presence",
		"$JS.API.STREAM.UPDATE.KV_pyrycode_relay_presence", "$JS.API.STREAM.MSG.DELETE.KV_pyrycode_relay_presence",
	} {
		if err := nc.Publish(subject, nil); err != nil {
			t.Fatal(err)
		}
		wantViolation(t, errs, `Publish to "`+subject+`"`)
	}
}

// wantViolation waits for the server to refuse what names subject.
func wantViolation(t *testing.T, errs <-chan error, subject string) {
	t.Helper()
	deadline := time.After(deployWait)
	for {
		select {
		case err := <-errs:
			if errors.Is(err, nats.ErrPermissionViolation) && strings.Contains(err.Error(), subject) {
				return
			}
		case <-deadline:
			t.Fatalf("no permission violation for %s", subject)
		}
	}
}

// natsCluster is the three servers of docker-compose.yml in this process.
type natsCluster []*server.Server

// startComposeNATS starts them from the file that Compose mounts, with one of
// the account files that it may include, and waits until they are one cluster.
// Only what one machine without containers needs is changed.
func startComposeNATS(t *testing.T, accounts string) natsCluster {
	t.Helper()
	config := filepath.Join(repository, "deploy/nats/relay.conf")
	if accounts != "accounts.conf" {
		dir := t.TempDir()
		text := bytes.Replace(readShipped(t, "deploy/nats/relay.conf"), []byte(`include "accounts.conf"`), []byte(`include "`+accounts+`"`), 1)
		writeConfig(t, filepath.Join(dir, "relay.conf"), text)
		writeConfig(t, filepath.Join(dir, accounts), readShipped(t, "deploy/nats/"+accounts))
		config = filepath.Join(dir, "relay.conf")
	}
	services, routes := readCompose(t).Services, freePorts(t, len(composeNATS))
	var cluster natsCluster
	for i, name := range composeNATS {
		for key, value := range services[name].Environment {
			for j, other := range composeNATS {
				value = strings.ReplaceAll(value, other+":6222", fmt.Sprintf("127.0.0.1:%d", routes[j]))
			}
			t.Setenv(key, value)
		}
		o, err := server.ProcessConfigFile(config)
		if err != nil {
			t.Fatal(err)
		}
		o.Host, o.Port, o.HTTPPort = "127.0.0.1", server.RANDOM_PORT, server.RANDOM_PORT
		o.Cluster.Host, o.Cluster.Port = "127.0.0.1", routes[i]
		o.StoreDir = t.TempDir()
		o.NoSigs, o.NoLog = true, true
		s, err := server.NewServer(o)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.Shutdown(); s.WaitForShutdown() })
		s.Start()
		cluster = append(cluster, s)
	}
	for i, s := range cluster {
		if !s.ReadyForConnections(deployWait) {
			t.Fatalf("%s does not listen", s.Name())
		}
		check := services[composeNATS[i]].Healthcheck.Test
		waitForOK(t, strings.Replace(check[len(check)-1], "127.0.0.1:8222", s.MonitorAddr().String(), 1))
	}
	return cluster
}

// connect returns a connection as user, as a gateway makes it, and what NATS
// complains about on it.
func (c natsCluster) connect(t *testing.T, user, password string) (jetstream.JetStream, <-chan error) {
	t.Helper()
	errs := make(chan error, 1024)
	nc, err := nats.Connect(c[0].ClientURL(), nats.UserInfo(user, password), nats.CustomInboxPrefix("pyrycode.relay.inbox.node-1"),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { errs <- err }))
	if err != nil {
		t.Fatalf("connect as %s: %v", user, err)
	}
	t.Cleanup(nc.Close)
	js, err := jetstream.New(nc, jetstream.WithDefaultTimeout(deployWait))
	if err != nil {
		t.Fatal(err)
	}
	return js, errs
}

func TestDockerfile_BuildsStaticProgramThatRunsEverywhere(t *testing.T) {
	program := builtProgram.path
	t.Run("static", func(t *testing.T) {
		file, err := elf.Open(program)
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		for _, segment := range file.Progs {
			if segment.Type == elf.PT_INTERP || segment.Type == elf.PT_DYNAMIC {
				t.Errorf("the program has a %v segment, want a static one: the image has no loader", segment.Type)
			}
		}
	})
	t.Run("version", func(t *testing.T) {
		if got := runProgram(t, program, "version"); !strings.Contains(got, "v0.0.0-deploy-test") {
			t.Errorf("version: %q, want the one of --build-arg VERSION", got)
		}
	})
	t.Run("gateways of the compose file", func(t *testing.T) { composeGatewaysMeet(t, program) })
}

// composeGatewaysMeet starts the gateways of docker-compose.yml beside its NATS
// servers and proves that peers meet across any two.
func composeGatewaysMeet(t *testing.T, program string) {
	cluster, c := startComposeNATS(t, "accounts.conf"), readCompose(t)
	ports := freePorts(t, len(composeGateways))
	for i, name := range composeGateways {
		s := c.Services[name]
		environment := s.Environment
		for j, other := range composeNATS {
			address, err := url.Parse(cluster[j].ClientURL())
			if err != nil {
				t.Fatal(err)
			}
			environment["PYRYCODE_RELAY_NATS_URL"] = strings.ReplaceAll(environment["PYRYCODE_RELAY_NATS_URL"], other+":4222", address.Host)
		}
		// In containers each has a loopback of its own.
		environment["PYRYCODE_RELAY_METRICS_LISTEN"] = ""
		args := replaced(s.Command, ":8080", fmt.Sprintf("127.0.0.1:%d", ports[i]))
		startProgram(t, program, environ(environment), args...)
	}
	for i, name := range composeGateways {
		node := fmt.Sprintf("127.0.0.1:%d", ports[i])
		waitForOK(t, "http://"+node+"/readyz")
		check := replaced(c.Services[name].Healthcheck.Test, "http://127.0.0.1:8080", "http://"+node)
		if check[0] != "CMD" || check[1] != "/pyrycode-relay" {
			t.Fatalf("%s: health check %q, want the program itself", name, check)
		}
		runProgram(t, program, check[2:]...)
	}
	if want := `HEALTHCHECK [^\n]* CMD \["/pyrycode-relay", "status", "--live", "--url", "http://127.0.0.1:8080"\]`; !regexp.MustCompile(want).Match(readShipped(t, "Dockerfile")) {
		t.Error("the Dockerfile has another health check than the compose file")
	}
	smoke := c.Services["smoke"].Command
	if len(smoke) != 3 || smoke[2] != "ws://balancer:8080" {
		t.Fatalf("smoke: %q, want it to go to the load balancer", smoke)
	}
	smokeAcross(t, program, ports)
}

func TestThreeRelays_AreTheirOwnNATSCluster(t *testing.T) {
	t.Parallel() // an election is mostly waiting
	program := builtProgram.path
	listen := freePorts(t, 3)
	for i, config := range threeRelayConfigs(t) {
		startProgram(t, program, nil, "serve", "--insecure-listen", fmt.Sprintf("127.0.0.1:%d", listen[i]),
			"--metrics-listen", "", "--gateway-id", fmt.Sprintf("relay-%d", i+1), "--nats-config", config)
	}
	for _, port := range listen {
		waitForOK(t, fmt.Sprintf("http://127.0.0.1:%d/readyz", port))
	}
	smokeAcross(t, program, listen)
}

// smokeAcross runs smoke with the binary on each node and the phone on the next.
func smokeAcross(t *testing.T, program string, ports []int) {
	t.Helper()
	for i, port := range ports {
		runProgram(t, program, "smoke",
			"--url", fmt.Sprintf("ws://127.0.0.1:%d", port),
			"--url2", fmt.Sprintf("ws://127.0.0.1:%d", ports[(i+1)%len(ports)]))
	}
}

// buildAsDockerfile runs the build line of the Dockerfile and returns the program,
// alone in its directory.
func buildAsDockerfile() (program string, err error) {
	text, err := os.ReadFile(filepath.Join(repository, "Dockerfile"))
	if err != nil {
		return "", err
	}
	match := regexp.MustCompile(`(?m)^RUN ((?:--mount=\S+ )*)(.*\bgo build .*-o /out/pyrycode-relay .*)$`).FindSubmatch(text)
	if match == nil {
		return "", errors.New("the Dockerfile has no line RUN … go build … -o /out/pyrycode-relay …")
	}
	dir, err := os.MkdirTemp("", "pyrycode-relay-built-")
	if err != nil {
		return "", err
	}
	program = filepath.Join(dir, "pyrycode-relay")
	command := exec.Command("sh", "-c", strings.Replace(string(match[2]), "/out/pyrycode-relay", program, 1))
	command.Dir = repository
	command.Env = append(os.Environ(), "VERSION=v0.0.0-deploy-test")
	if out, err := command.CombinedOutput(); err != nil {
		os.RemoveAll(dir)
		return "", fmt.Errorf("%s: %w\n%s", match[2], err, out)
	}
	return program, nil
}

// runProgram runs the program to its end, which must be a good one, and returns
// what it printed.
func runProgram(t *testing.T, program string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), deployWait)
	defer cancel()
	command := exec.CommandContext(ctx, program, args...)
	command.Env = environ(nil)
	out, err := command.CombinedOutput()
	if err != nil {
		t.Fatalf("%q: %v\n%s", args, err, out)
	}
	return string(out)
}

// startProgram starts the program and ends it with the test by SIGTERM, upon
// which it must exit 0. Its output is shown if the test fails.
func startProgram(t *testing.T, program string, env []string, args ...string) {
	t.Helper()
	var output bytes.Buffer
	command := exec.Command(program, args...)
	command.Env = append(environ(nil), env...)
	command.Stdout, command.Stderr = &output, &output
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stuck := time.AfterFunc(deployWait, func() { _ = command.Process.Kill() })
		defer stuck.Stop()
		_ = command.Process.Signal(syscall.SIGTERM) // gone already: Wait says how
		if err := command.Wait(); err != nil {
			t.Errorf("%q after SIGTERM: %v, want exit 0", args, err)
		}
		if t.Failed() {
			t.Logf("%q:\n%s", args, output.String())
		}
	})
}

// waitForOK asks until the answer is 200.
func waitForOK(t *testing.T, address string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), deployWait)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for last := "no answer"; ; {
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
		if err != nil {
			t.Fatal(err)
		}
		if response, err := http.DefaultClient.Do(request); err == nil {
			var body bytes.Buffer
			_, _ = body.ReadFrom(response.Body) // only for the message below
			response.Body.Close()
			if last = response.Status + " " + body.String(); response.StatusCode == http.StatusOK {
				return
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("%s: %s, want 200", address, last)
		}
	}
}

// freePorts returns ports that nobody listens on, below those that outgoing
// connections are given. None is returned twice: a server that is down for a while finds
// its own free.
func freePorts(t *testing.T, n int) []int {
	t.Helper()
	var ports []int
	for range portCount {
		port := firstPort + int(portCursor.Add(1)%portCount)
		listener, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			continue
		}
		listener.Close()
		if ports = append(ports, port); len(ports) == n {
			return ports
		}
	}
	t.Fatalf("no %d free ports from %d to %d", n, firstPort, firstPort+portCount-1)
	return nil
}

const firstPort, portCount = 12_000, 8_000

// portCursor starts anywhere: another process may test beside this one.
var portCursor = func() *atomic.Uint32 {
	c := new(atomic.Uint32)
	c.Store(rand.Uint32N(portCount))
	return c
}()

// environ returns variables as os.Environ would, with nothing of this machine's
// but where things are.
func environ(variables map[string]string) []string {
	list := []string{"PATH=" + os.Getenv("PATH"), "HOME=" + os.TempDir()}
	for name, value := range variables {
		list = append(list, name+"="+value)
	}
	return list
}

func replaced(list []string, old, with string) []string {
	list = slices.Clone(list)
	for i := range list {
		if list[i] == old {
			list[i] = with
		}
	}
	return list
}

// readShipped reads a file of the repository.
func readShipped(t *testing.T, name string) []byte {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(repository, name))
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func writeConfig(t *testing.T, name string, text []byte) {
	t.Helper()
	if err := os.WriteFile(name, text, 0o600); err != nil {
		t.Fatal(err)
	}
}
