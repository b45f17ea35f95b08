package main

// Scenarios with the built program as processes: what a signal does, to the
// program and to those who are connected to it.

import (
	"context"
	"errors"
	"net"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pyrycode/pyrycode-relay/testenv"
)

// A node is killed. Its binaries have their server-ids elsewhere within a second,
// and nobody is left in a session that is no more.  (protocol.md: Life of a claim, 7)
func TestNodeKilled(t *testing.T) {
	ctx := scenarioContext(t, time.Minute)
	flags := besideOneNATS(t)
	survivor := startNode(t, flags...)
	victim := startProcess(t, flags...)

	mover, stayer, elsewhere := randomUUID(), randomUUID(), randomUUID()
	movers := dialBinary(ctx, t, victim, mover)
	stayers := dialBinary(ctx, t, victim, stayer)
	watching := dialBinary(ctx, t, survivor, elsewhere)

	phoneOfMover := dialPhone(ctx, t, survivor, mover)
	phoneOfStayer := dialPhone(ctx, t, survivor, stayer)
	silentPhone := dialPhone(ctx, t, survivor, stayer)
	lostPhone := dialPhone(ctx, t, victim, elsewhere)
	meet(ctx, t, phoneOfMover, movers, "mover")
	meet(ctx, t, phoneOfStayer, stayers, "stayer")
	lostConnID := meet(ctx, t, lostPhone, watching, "elsewhere")

	killed := time.Now()
	victim.kill(t)

	// The binary dials another node as soon as it sees its connection break.
	if _, err := movers.Closed(ctx); err != nil {
		t.Fatal(err)
	}
	again, refusals := redial(ctx, t, survivor, mover)
	t.Logf("the binary was back after %v and %d times 503", time.Since(killed).Round(time.Millisecond), refusals)
	if took := time.Since(killed); took > time.Second+slack {
		t.Errorf("the binary was back after %v, want 1 s", took)
	}
	meet(ctx, t, dialPhone(ctx, t, survivor, mover), again, "back")

	within5s, cancel := context.WithDeadline(ctx, killed.Add(5*time.Second+slack))
	defer cancel()
	for name, p := range map[string]*testenv.Phone{"phone of the binary that moved": phoneOfMover, "phone": phoneOfStayer, "phone that never sent": silentPhone} {
		if got, err := p.Closed(within5s); err != nil || got.Code != 4404 {
			t.Errorf("%s: got %v (%v), want 4404 within 5 s", name, got, err)
		}
	}
	e, err := watching.NextEnvelope(within5s)
	if err != nil || e.ConnID != lostConnID || e.CloseCode != 1001 || e.Frame != nil {
		t.Errorf("binary of a phone on the dead node: got %s (%v), want the close notice with 1001 within 5 s", describe(e), err)
	}
	t.Logf("all others knew after %v", time.Since(killed).Round(time.Millisecond))
	select {
	case <-again.Done():
		info, _ := again.Closed(ctx)
		t.Errorf("the binary that moved was closed %v, want it connected", info)
	default:
	}
}

// redial dials until a binary has its server-id, with no pause after a 503. Any
// other answer ends the test.
func redial(ctx context.Context, t *testing.T, n *node, serverID string) (b *testenv.Binary, refusals int) {
	t.Helper()
	for {
		b, err := testenv.DialBinary(ctx, n.url, testenv.BinaryOptions{ServerID: serverID})
		if err == nil {
			t.Cleanup(b.Drop)
			return b, refusals
		}
		var refused *testenv.RefusedError
		if !errors.As(err, &refused) || refused.Status != 503 {
			t.Fatal(err)
		}
		refusals++
	}
}

// SIGTERM: everybody is told, the program exits 0 in time, and another node takes
// over without anybody being refused for good.
func TestDrain(t *testing.T) {
	ctx := scenarioContext(t, time.Minute)
	flags := besideOneNATS(t)
	second := startNode(t, flags...)
	first := startProcess(t, flags...)
	here, there := randomUUID(), randomUUID()
	binary, other := dialBinary(ctx, t, first, here), dialBinary(ctx, t, second, there)
	nearPhone, farPhone := dialPhone(ctx, t, first, here), dialPhone(ctx, t, second, here)
	leavingPhone := dialPhone(ctx, t, first, there)
	meet(ctx, t, nearPhone, binary, "near")
	meet(ctx, t, farPhone, binary, "far")
	connID := meet(ctx, t, leavingPhone, other, "leaving")

	start := time.Now()
	first.signal(t, syscall.SIGTERM)
	wantEnd(ctx, t, "the binary", binary, 1001, "shutting down")
	again, refusals := redial(ctx, t, second, here)
	t.Logf("the binary was back after %v and %d times 503", time.Since(start).Round(time.Millisecond), refusals)
	wantEnd(ctx, t, "its phone on the same node", nearPhone, 1001, "shutting down")
	wantEnd(ctx, t, "another binary's phone", leavingPhone, 1001, "shutting down")
	e, err := other.NextEnvelope(ctx)
	if err != nil || e.ConnID != connID || e.CloseCode != 1001 {
		t.Errorf("the binary of that phone: got %s (%v), want the close notice with 1001", describe(e), err)
	}
	if got, err := farPhone.Closed(ctx); err != nil || got.Code != 4404 {
		t.Errorf("a phone on the second node: got %v (%v), want 4404", got, err)
	}
	meet(ctx, t, dialPhone(ctx, t, second, here), again, "again")

	if status := first.exit(t, 10*time.Second-time.Since(start)); !status.Exited() || status.ExitStatus() != 0 {
		t.Errorf("exit %d, signal %v; want 0", status.ExitStatus(), status.Signal())
	}
	t.Logf("the program had ended after %v", time.Since(start).Round(time.Millisecond))
	if _, err := net.DialTimeout("tcp", strings.TrimPrefix(first.url, "ws://"), time.Second); err == nil {
		t.Error("somebody listens where the program did")
	}
}

// Peers that do not answer the close frame get the drain time-out, and no more.
func TestDrain_SilentPeersDoNotDelayTheExit(t *testing.T) {
	t.Parallel()
	ctx := scenarioContext(t, time.Minute)
	n := startProcess(t, "--drain-timeout", "3s")
	binary := dialBinary(ctx, t, n, "silent")
	phone := dialPhone(ctx, t, n, "silent")
	meet(ctx, t, phone, binary, "hello")
	binary.Pause()
	phone.Pause()
	start := time.Now()
	n.signal(t, syscall.SIGTERM)
	if status := n.exit(t, 10*time.Second); !status.Exited() || status.ExitStatus() != 0 {
		t.Errorf("exit %d, signal %v; want 0", status.ExitStatus(), status.Signal())
	}
	if took := time.Since(start); took > 4*time.Second {
		t.Errorf("the program ended after %v, want 3 s and a little", took)
	}
}

func TestSecondSignalEndsAtOnce(t *testing.T) {
	ctx := scenarioContext(t, time.Minute)
	for _, second := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		n := startProcess(t)
		binary := dialBinary(ctx, t, n, "silent")
		binary.Pause() // it would hold up the drain
		n.signal(t, syscall.SIGINT)
		n.await(t, "event=(draining)")
		start := time.Now()
		n.signal(t, second)
		if status := n.exit(t, 5*time.Second); !status.Signaled() || status.Signal() != second {
			t.Errorf("exit %d, signal %v; want ended by %v", status.ExitStatus(), status.Signal(), second)
		}
		if took := time.Since(start); took > time.Second {
			t.Errorf("%v ended the program after %v, want at once", second, took)
		}
	}
}

func TestExitCodes(t *testing.T) {
	program := builtProgram.path
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	address := taken.Addr().String()
	for _, tt := range []struct {
		args []string
		env  []string
		want int
		line string // part of the one line, or of a line of the log
	}{
		{[]string{}, nil, 2, "--insecure-listen"},
		{[]string{"serve", "--nonsense"}, nil, 2, "-nonsense"},
		{[]string{"--insecure-listen", "8080"}, nil, 2, "--insecure-listen"},
		{[]string{"--insecure-listen", "127.0.0.1:0", "--grace", "soon"}, nil, 2, "--grace"},
		{[]string{"--insecure-listen", "127.0.0.1:0"}, []string{"PYRYCODE_RELAY_NONSENSE=1"}, 2, "PYRYCODE_RELAY_NONSENSE"},
		{[]string{"--insecure-listen", "127.0.0.1:0", "--metrics-listen", ":0"}, nil, 2, "--metrics-public"},
		{[]string{"--insecure-listen", address, "--metrics-listen", ""}, nil, 1, "--insecure-listen " + address},
		{[]string{"--insecure-listen", "127.0.0.1:0", "--metrics-listen", address}, nil, 1, "--metrics-listen " + address},
		{[]string{"--insecure-listen", "127.0.0.1:0", "--metrics-listen", "", "--nats-config", "/nonexistent.conf"}, nil, 1, "/nonexistent.conf"},
		{[]string{"version"}, nil, 0, "v0.0.0-deploy-test"},
	} {
		ctx, cancel := context.WithTimeout(t.Context(), scenarioWait)
		command := exec.CommandContext(ctx, program, tt.args...)
		command.Env = append(environ(nil), tt.env...)
		out, err := command.CombinedOutput()
		cancel()
		got := command.ProcessState.ExitCode()
		if got != tt.want || !strings.Contains(string(out), tt.line) {
			t.Errorf("%q: got exit %d (%v), want %d and %q in\n%s", tt.args, got, err, tt.want, tt.line, out)
		}
		if tt.want == 2 && !isOneLine(string(out)) {
			t.Errorf("%q: got %q, want one line", tt.args, out)
		}
	}
}
