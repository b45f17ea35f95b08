package main

// What the scenarios share: NATS servers, nodes in this process and as processes
// of the built program, and peers that meet through them.

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/pyrycode/pyrycode-relay/testenv"
)

// scenarioWait bounds each wait for a state that has no bound of its own in
// protocol.md: the race detector and a loaded machine have their share.
const scenarioWait = 30 * time.Second

// shared starts something once for all tests of this package.
type shared[T any] struct {
	start func(*testing.T) (T, error) // the test is the first that asks
	close func(T)

	once  sync.Once
	value T
	err   error
	up    bool
}

func (s *shared[T]) get(t *testing.T) T {
	t.Helper()
	s.once.Do(func() {
		s.value, s.err = s.start(t)
		s.up = s.err == nil
	})
	if s.err != nil {
		t.Fatal(s.err)
	}
	return s.value
}

func (s *shared[T]) end() {
	if s.up {
		s.close(s.value)
	}
}

var (
	oneNATS = &shared[*testenv.Server]{
		start: func(*testing.T) (*testenv.Server, error) {
			return testenv.StartServer(testenv.ServerOptions{Detector: detector})
		},
		close: (*testenv.Server).Close,
	}
	threeNATS = &shared[*testenv.Cluster]{
		start: func(*testing.T) (*testenv.Cluster, error) {
			return testenv.StartCluster(testenv.ClusterOptions{Detector: detector})
		},
		close: (*testenv.Cluster).Close,
	}
	// builtProgram is the file that the Dockerfile's build line makes.
	builtProgram = &program{build: buildAsDockerfile}
)

// program is a program that tests run.
type program struct {
	build func() (path string, err error) // alone in its directory
	path  string
}

// buildPrograms builds all of them before the first test, whose clock would run
// meanwhile: on a new machine this takes a minute.
func buildPrograms() (err error) {
	for _, p := range []*program{builtProgram, natsProgram} {
		if p.path, err = p.build(); err != nil {
			return err
		}
	}
	return nil
}

func (p *program) remove() {
	if p.path != "" {
		os.RemoveAll(filepath.Dir(p.path))
	}
}

func endShared() {
	oneNATS.end()
	threeNATS.end()
	builtProgram.remove()
	calmNATS.end()
	natsProgram.remove()
}

var prefixCount atomic.Int64

// besideOneNATS returns flags of nodes that share the one NATS server, with
// buckets of this test's own.
func besideOneNATS(t *testing.T) []string {
	t.Helper()
	return []string{"--nats-url", oneNATS.get(t).URL(), "--kv-prefix", freshPrefix()}
}

// besideThreeNATS returns flags of three nodes, each beside its own server of
// the NATS cluster, with buckets of this test's own in three replicas.
func besideThreeNATS(t *testing.T) [3][]string {
	t.Helper()
	prefix := freshPrefix()
	var flags [3][]string
	for i, s := range threeNATS.get(t).Servers {
		flags[i] = []string{"--nats-url", s.URL(), "--kv-prefix", prefix, "--kv-replicas", "3", "--gateway-id", fmt.Sprintf("node-%d", i+1)}
	}
	return flags
}

func freshPrefix() string { return fmt.Sprintf("scenario_%d", prefixCount.Add(1)) }

// node is one running relay: run in this process, or the built program.
type node struct {
	url     string // ws://host:port
	http    string // http://host:port
	metrics string // http://host:port of the metrics listener
	log     *logBook

	process *os.Process // nil in this process
	stop    func()      // begins the drain
	ended   chan struct{}
	result  error // of run or of the process, once ended is closed
}

// nodeFlags are what every node of a test gets first: flags after them win.
func nodeFlags(flags []string) []string {
	return append([]string{
		"--insecure-listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0",
		"--upgrade-burst", "0", "--log-level", "debug",
	}, flags...)
}

// startNode is launchNode that returns once the node is ready.
func startNode(t *testing.T, flags ...string) *node {
	t.Helper()
	n := launchNode(t, flags...)
	n.awaitReady(t)
	return n
}

// launchNode runs a node in this process until the end of the test. Its addresses
// are known after awaitReady.
func launchNode(t *testing.T, flags ...string) *node {
	t.Helper()
	cfg, err := parseConfig(nodeFlags(flags), []string{"HOME=" + os.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	n := &node{log: newLogBook(), stop: cancel, ended: make(chan struct{})}
	go func() {
		defer close(n.ended)
		n.result = run(ctx, cfg, newLogger(n.log, cfg.logFormat, cfg.logLevel, cfg.gatewayID))
	}()
	t.Cleanup(func() {
		cancel()
		<-n.ended
		if n.result != nil {
			t.Errorf("node %s: %v, want no error", cfg.gatewayID, n.result)
		}
		n.showLog(t)
	})
	return n
}

// startProcess runs the built program as a node until the end of the test, and
// returns once it is ready. It is killed then, if it still runs.
func startProcess(t *testing.T, flags ...string) *node {
	t.Helper()
	n := &node{log: newLogBook(), ended: make(chan struct{})}
	command := exec.Command(builtProgram.path, append([]string{"serve"}, nodeFlags(flags)...)...)
	command.Env = append(environ(nil), "GOTRACEBACK=all")
	command.Stdout, command.Stderr = n.log, n.log
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	n.process = command.Process
	n.stop = func() { n.signal(t, syscall.SIGTERM) }
	go func() {
		defer close(n.ended)
		n.result = command.Wait()
	}()
	t.Cleanup(func() {
		_ = n.process.Kill() // fails when it has ended, as it should
		<-n.ended
		n.showLog(t)
	})
	n.awaitReady(t)
	return n
}

func (n *node) awaitReady(t *testing.T) {
	t.Helper()
	const address = `event=listening addr=(\S+) listener=`
	host := n.await(t, address+"insecure")
	n.url, n.http = "ws://"+host, "http://"+host
	n.metrics = "http://" + n.await(t, address+"metrics")
	n.await(t, "event=(ready) ")
}

// await waits for a line of the log and returns what its first group matched.
func (n *node) await(t *testing.T, pattern string) string {
	t.Helper()
	return n.awaitAfter(t, 0, pattern)
}

// awaitAfter is await for a line behind the first bytes of the log.
func (n *node) awaitAfter(t *testing.T, bytes int, pattern string) string {
	t.Helper()
	match := regexp.MustCompile(pattern)
	deadline := time.After(scenarioWait)
	for {
		grown := n.log.grown()
		if found := match.FindStringSubmatch(n.log.String()[bytes:]); found != nil {
			return found[1]
		}
		select {
		case <-grown:
		case <-n.ended:
			t.Fatalf("the node ended (%v) without a line %q:\n%s", n.result, pattern, n.log)
		case <-deadline:
			t.Fatalf("no line %q:\n%s", pattern, n.log)
		}
	}
}

func (n *node) signal(t *testing.T, s os.Signal) {
	t.Helper()
	if err := n.process.Signal(s); err != nil {
		t.Fatal(err)
	}
}

// kill ends a process as a power cut would, and waits for its end.
func (n *node) kill(t *testing.T) {
	t.Helper()
	n.signal(t, syscall.SIGKILL)
	<-n.ended
}

// exit waits for the end of a process and returns how it came.
func (n *node) exit(t *testing.T, limit time.Duration) syscall.WaitStatus {
	t.Helper()
	select {
	case <-n.ended:
	case <-time.After(limit):
		t.Fatalf("the program runs after %v", limit)
	}
	if exit := new(exec.ExitError); errors.As(n.result, &exit) {
		return exit.Sys().(syscall.WaitStatus)
	}
	if n.result != nil {
		t.Fatal(n.result)
	}
	return 0
}

func (n *node) showLog(t *testing.T) {
	if t.Failed() {
		t.Logf("log of %s:\n%s", n.url, n.log.tail(40))
	}
}

// logBook is a log that can be waited for. Safe for concurrent use.
type logBook struct {
	mu   sync.Mutex
	text bytes.Buffer
	more chan struct{} // closed by the next write
	grep io.Writer     // of the detector
}

func newLogBook() *logBook {
	return &logBook{more: make(chan struct{}), grep: detector.Writer("the log of a node")}
}

func (l *logBook) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	close(l.more)
	l.more = make(chan struct{})
	_, _ = l.grep.Write(p) // never fails
	return l.text.Write(p)
}

func (l *logBook) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// grown is closed when the log has more than now.
func (l *logBook) grown() <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.more
}

func (l *logBook) tail(lines int) string {
	all := strings.Split(strings.TrimSpace(l.String()), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// scenarioContext bounds a scenario, so that its failure names the step rather
// than dumping goroutines.
func scenarioContext(t *testing.T, limit time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeoutCause(t.Context(), limit, fmt.Errorf("not within %v", limit))
	t.Cleanup(cancel)
	return ctx
}

func dialBinary(ctx context.Context, t *testing.T, n *node, serverID string) *testenv.Binary {
	t.Helper()
	b, err := testenv.DialBinary(ctx, n.url, testenv.BinaryOptions{ServerID: serverID})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Drop)
	return b
}

func dialPhone(ctx context.Context, t *testing.T, n *node, serverID string) *testenv.Phone {
	t.Helper()
	p, err := testenv.DialPhone(ctx, n.url, testenv.PhoneOptions{ServerID: serverID})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Drop)
	return p
}

// meet sends one frame from phone to binary and one back, and returns the conn
// id of phone.
func meet(ctx context.Context, t *testing.T, phone *testenv.Phone, binary *testenv.Binary, mark string) string {
	t.Helper()
	connID, err := exchangeFrames(ctx, phone, binary, mark)
	if err != nil {
		t.Fatal(err)
	}
	return connID
}

func exchangeFrames(ctx context.Context, phone *testenv.Phone, binary *testenv.Binary, mark string) (connID string, err error) {
	text, err := json.Marshal(mark)
	if err != nil {
		return "", err
	}
	up, down := fmt.Sprintf(`[%s,"up",%q]`, text, markFrame), fmt.Sprintf(`[%s,"down",%q]`, text, markFrame)
	if err := phone.Send(ctx, []byte(up)); err != nil {
		return "", fmt.Errorf("phone sends: %w", err)
	}
	e, err := binary.NextEnvelope(ctx)
	if err != nil {
		return "", fmt.Errorf("the binary: %w, want %s%s", err, up, phoneEnd(phone))
	}
	if string(e.Frame) != up {
		return "", fmt.Errorf("the binary got %s, want %s", describe(e), up)
	}
	if err := binary.Send(ctx, e.ConnID, []byte(down)); err != nil {
		return "", fmt.Errorf("binary sends: %w", err)
	}
	got, err := phone.Next(ctx)
	if err != nil {
		return "", fmt.Errorf("the phone: %w, want %s", err, down)
	}
	if string(got) != down {
		return "", fmt.Errorf("the phone got %s, want %s", got, down)
	}
	return e.ConnID, nil
}

// peerEnd is what a phone and a binary have in common here.
type peerEnd interface {
	Closed(context.Context) (testenv.CloseInfo, error)
}

func wantEnd(ctx context.Context, t *testing.T, who string, p peerEnd, code int, reason string) {
	t.Helper()
	got, err := p.Closed(ctx)
	if want := (testenv.CloseInfo{Code: code, Reason: reason}); err != nil || got != want {
		t.Errorf("%s: got %v (%v), want %v", who, got, err, want)
	}
}
