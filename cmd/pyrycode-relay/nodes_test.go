package main

// Scenarios over several nodes in this process. Each is a promise of protocol.md.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pyrycode/pyrycode-relay/testenv"
)

func TestSmokeAcrossNodes(t *testing.T) {
	t.Parallel() // an election is mostly waiting
	t.Run("one node with NATS inside", func(t *testing.T) {
		smokeBetween(t, startNode(t))
	})
	t.Run("two nodes beside one NATS server", func(t *testing.T) {
		flags := besideOneNATS(t)
		smokeBetween(t, startNode(t, flags...), startNode(t, flags...))
	})
	t.Run("three nodes that are their own NATS cluster", func(t *testing.T) {
		var nodes []*node
		for i, config := range threeRelayConfigs(t) { // none is ready before another one is there
			n := launchNode(t, "--nats-config", config, "--gateway-id", fmt.Sprintf("relay-%d", i+1))
			n.await(t, "event=(starting) ")
			nodes = append(nodes, n)
		}
		for _, n := range nodes {
			n.awaitReady(t)
		}
		smokeBetween(t, nodes...)
	})
}

// smokeBetween runs smoke with the binary on each node and the phone on each.
func smokeBetween(t *testing.T, nodes ...*node) {
	t.Helper()
	var smokes sync.WaitGroup // side by side: a smoke waits most of the time
	defer smokes.Wait()
	for _, binary := range nodes {
		for _, phone := range nodes {
			smokes.Go(func() {
				code, out, errOut := invoke(t, "smoke", "--url", binary.url, "--url2", phone.url)
				if code != 0 || errOut != "" {
					t.Errorf("binary at %s, phone at %s: exit %d, want 0\n%s%s", binary.url, phone.url, code, out, errOut)
				}
			})
		}
	}
}

// threeRelayConfigs writes the files of deploy/three-relays with other ports and
// directories, so that tests can run beside each other.
func threeRelayConfigs(t *testing.T) (files [3]string) {
	t.Helper()
	ports := freePorts(t, 6)
	pairs := []string{"/tmp/pyrycode-relay", t.TempDir()}
	for i := range files {
		pairs = append(pairs,
			fmt.Sprintf("127.0.0.1:422%d", i+1), fmt.Sprintf("127.0.0.1:%d", ports[i]),
			fmt.Sprintf("127.0.0.1:622%d", i+1), fmt.Sprintf("127.0.0.1:%d", ports[3+i]))
	}
	elsewhere := strings.NewReplacer(pairs...)
	for i := range files {
		name := fmt.Sprintf("relay-%d.conf", i+1)
		files[i] = filepath.Join(t.TempDir(), name)
		writeConfig(t, files[i], []byte(elsewhere.Replace(string(readShipped(t, "deploy/three-relays/"+name)))))
	}
	return files
}

// Two phones and a binary on three nodes send as fast as they can, in both
// directions at once: no gap, no duplicate, no reordering, every byte the same.
func TestThreeNodes_HundredThousandFramesEachWay(t *testing.T) {
	const perPhone = 50_000
	ctx := scenarioContext(t, 2*time.Minute)
	flags := besideThreeNATS(t)
	// A binary that sends all it has at once outruns a phone: its frames wait. And
	// no pings: the peers' library breaks a connection whose pong waits for 5 s behind
	// what it sends itself.
	room := []string{"--phone-backlog", "64MiB", "--ping-interval", "10h"}
	nodes := [3]*node{}
	for i := range nodes {
		nodes[i] = startNode(t, append(flags[i], room...)...)
	}
	serverID := randomUUID()
	binary := dialBinary(ctx, t, nodes[2], serverID)
	phones := [2]*testenv.Phone{}
	connIDs := [2]string{}
	for i := range phones {
		phones[i] = dialPhone(ctx, t, nodes[i], serverID)
		connIDs[i] = meet(ctx, t, phones[i], binary, fmt.Sprint("hello ", i))
	}

	start := time.Now()
	errs := make(chan error, 6)
	for i, phone := range phones {
		go func() { errs <- sendNumbered(ctx, perPhone, up, i, phone.Send) }()
		go func() { errs <- phoneReceives(ctx, phone, i, perPhone) }()
	}
	go func() { errs <- binarySends(ctx, binary, connIDs, perPhone) }()
	go func() { errs <- binaryReceives(ctx, binary, connIDs, perPhone) }()
	for range cap(errs) {
		if err := <-errs; err != nil {
			for i, p := range phones {
				t.Logf("phone %d%s", i, phoneEnd(p))
			}
			t.Fatal(err)
		}
	}
	took := time.Since(start)
	t.Logf("%d frames each way in %v: %.0f frames/s", 2*perPhone, took.Round(time.Millisecond), 4*perPhone/took.Seconds())
}

type direction string

const (
	up   direction = "up"
	down direction = "down"
)

// numberedFrame is frame n of one phone and direction: JSON of changing length
// that no encoder would write, told apart from any other by its bytes.
func numberedFrame(buf []byte, d direction, phone, n int) []byte {
	buf = fmt.Appendf(buf[:0], `{"n" :%d, "to":"%s %d", "_":"`, n, d, phone)
	for range n * 7919 % 4 { // 0 to 3 times 60 bytes
		buf = append(buf, `\u0041\/<&> höyry 蒸気 12345678901234567890.0 --------- `...)
	}
	return append(buf, `"}`...)
}

func sendNumbered(ctx context.Context, count int, d direction, phone int, send func(context.Context, []byte) error) error {
	var buf []byte
	for n := range count {
		buf = numberedFrame(buf, d, phone, n)
		if err := send(ctx, buf); err != nil {
			return fmt.Errorf("send frame %d %s, phone %d: %w", n, d, phone, err)
		}
	}
	return nil
}

func binarySends(ctx context.Context, binary *testenv.Binary, connIDs [2]string, count int) error {
	var frame []byte
	for n := range count {
		for i, connID := range connIDs {
			frame = numberedFrame(frame, down, i, n)
			if err := binary.Send(ctx, connID, frame); err != nil {
				return fmt.Errorf("send frame %d down, phone %d: %w", n, i, err)
			}
		}
	}
	return nil
}

func phoneReceives(ctx context.Context, phone *testenv.Phone, i, count int) error {
	var want []byte
	for n := range count {
		want = numberedFrame(want, down, i, n)
		got, err := phone.Next(ctx)
		if err != nil {
			return fmt.Errorf("phone %d, frame %d: %w", i, n, err)
		}
		if !bytes.Equal(got, want) {
			return fmt.Errorf("phone %d, frame %d: got %s, want %s", i, n, got, want)
		}
	}
	return nil
}

// binaryReceives compares whole envelopes: they are the frames' bytes between
// two constant pieces.
func binaryReceives(ctx context.Context, binary *testenv.Binary, connIDs [2]string, count int) error {
	var next [2]int
	var frame, want []byte
	for range 2 * count {
		got, err := binary.Next(ctx)
		if err != nil {
			return fmt.Errorf("the binary after frames %d: %w", next, err)
		}
		i := 0
		if bytes.Contains(got[:min(len(got), 100)], []byte(connIDs[1])) {
			i = 1
		}
		frame = numberedFrame(frame, up, i, next[i])
		want = fmt.Appendf(want[:0], `{"conn_id":"%s","frame":%s}`, connIDs[i], frame)
		if !bytes.Equal(got, want) {
			return fmt.Errorf("the binary, phone %d, frame %d: got %s, want %s", i, next[i], got, want)
		}
		next[i]++
	}
	return nil
}

// Whoever comes first has the server-id, and nobody else has it for a moment. Of
// the others none is told anything but 4409 or 503. In every other round the
// server-id is new, in the rest it is in its grace.
func TestThirtyBinariesOneID_FiftyRounds(t *testing.T) {
	const rounds, claimants = 50, 30
	ctx := scenarioContext(t, 2*time.Minute)
	var nodes []*node
	for _, flags := range besideThreeNATS(t) {
		nodes = append(nodes, startNode(t, flags...))
	}
	answers := make(map[string]int)
	var serverID string
	for round := range rounds {
		if round%2 == 0 {
			serverID = randomUUID()
		}
		winner, told := claimAtOnce(ctx, t, nodes, serverID, claimants)
		for answer, n := range told {
			answers[answer] += n
		}
		if winner == nil {
			t.Fatalf("round %d: no single winner; the others were told %v", round, told)
		}
		phone := dialPhone(ctx, t, nodes[round%len(nodes)], serverID)
		meet(ctx, t, phone, winner, fmt.Sprint("round ", round))
		phone.Drop()
		if err := winner.Close(1000, ""); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("the losers were told: %v", answers)
	for answer := range answers {
		if answer != "4409 server-id already claimed" && answer != "503" {
			t.Errorf("losers were told %q %d times, want nothing but 4409 and 503", answer, answers[answer])
		}
	}
}

// claimAtOnce has count binaries claim serverID over all nodes. It returns the one
// that was left when all others had been told something, nil if not exactly one
// was, and how many were told what.
func claimAtOnce(ctx context.Context, t *testing.T, nodes []*node, serverID string, count int) (winner *testenv.Binary, told map[string]int) {
	t.Helper()
	type outcome struct {
		binary *testenv.Binary // of an upgrade
		told   string
	}
	outcomes := make(chan outcome, 2*count)
	start := make(chan struct{})
	for i := range count {
		go func() {
			<-start
			b, err := testenv.DialBinary(ctx, nodes[i%len(nodes)].url, testenv.BinaryOptions{ServerID: serverID})
			var refused *testenv.RefusedError
			switch {
			case errors.As(err, &refused):
				outcomes <- outcome{told: fmt.Sprint(refused.Status)}
			case err != nil:
				outcomes <- outcome{told: err.Error()}
			default:
				t.Cleanup(b.Drop)
				outcomes <- outcome{binary: b}
				info, err := b.Closed(ctx)
				if err == nil {
					outcomes <- outcome{told: fmt.Sprint(info.Code, " ", info.Reason)}
				}
			}
		}()
	}
	close(start)
	told = make(map[string]int)
	var upgraded []*testenv.Binary
	answered := 0
	for answered < count-1 {
		select {
		case o := <-outcomes:
			if o.binary != nil {
				upgraded = append(upgraded, o.binary)
			} else {
				told[o.told]++
				answered++
			}
		case <-ctx.Done():
			t.Fatalf("%d of %d answered: %v", answered, count, told)
		}
	}
	for {
		for _, b := range upgraded {
			select {
			case <-b.Done():
			default:
				return b, told
			}
		}
		select { // the dial of the last one may not have returned yet
		case o := <-outcomes:
			if o.binary == nil {
				told[o.told]++
				return nil, told
			}
			upgraded = append(upgraded, o.binary)
		case <-ctx.Done():
			return nil, told
		}
	}
}

// From the instant that a binary's upgrade is answered, no phone on any node is
// told that there is no server.
func TestWinnerIsFoundAtOnce(t *testing.T) {
	const ids, atOnce = 1000, 8
	ctx := scenarioContext(t, 2*time.Minute)
	var nodes []*node
	for _, flags := range besideThreeNATS(t) {
		nodes = append(nodes, startNode(t, flags...))
	}
	var workers sync.WaitGroup
	numbers := make(chan int)
	for range atOnce {
		workers.Go(func() {
			for n := range numbers {
				if err := claimAndFind(ctx, nodes[n%3], nodes[n/3%3]); err != nil {
					t.Errorf("id %d, binary on node %d, phone on node %d: %v", n, n%3+1, n/3%3+1, err)
				}
			}
		})
	}
	for n := range ids {
		numbers <- n
	}
	close(numbers)
	workers.Wait()
}

func claimAndFind(ctx context.Context, forBinary, forPhone *node) error {
	serverID := randomUUID()
	b, err := testenv.DialBinary(ctx, forBinary.url, testenv.BinaryOptions{ServerID: serverID})
	if err != nil {
		return err
	}
	defer b.Drop()
	p, err := testenv.DialPhone(ctx, forPhone.url, testenv.PhoneOptions{ServerID: serverID})
	if err != nil {
		return err
	}
	defer p.Drop()
	_, err = exchangeFrames(ctx, p, b, serverID)
	return err
}

func TestMetrics_OnTheirOwnListenerOnly(t *testing.T) {
	n := startNode(t)
	for _, tt := range []struct {
		address string
		want    int
	}{
		{n.http + "/metrics", 404},
		{n.http + "/metrics/", 404},
		{n.http + "/healthz", 200},
		{n.http + "/readyz", 200},
		{n.http + "/", 404},
		{n.metrics + "/metrics", 200},
		{n.metrics + "/", 404},
		{n.metrics + "/healthz", 404},
		{n.metrics + "/v1/client", 404},
		{n.metrics + "/v1/server", 404},
	} {
		if got, _ := fetch(t, tt.address); got != tt.want {
			t.Errorf("%s: got %d, want %d", tt.address, got, tt.want)
		}
	}
	_, text := fetch(t, n.metrics+"/metrics")
	for _, want := range []string{
		"pyrycode_relay_connected_binaries 0\n",
		"pyrycode_relay_connected_phones 0\n",
		`pyrycode_relay_frames_forwarded_total{direction="phone_to_binary"} 0` + "\n",
		`pyrycode_relay_frames_forwarded_total{direction="binary_to_phone"} 0` + "\n",
		`pyrycode_relay_ws_upgrade_attempts_total{endpoint="client",outcome="upgraded"} 0` + "\n",
		`pyrycode_relay_ws_upgrade_attempts_total{endpoint="server",outcome="rate_limited"} 0` + "\n",
		`pyrycode_relay_register_failures_total{kind="no_server"} 0` + "\n",
		"pyrycode_relay_grace_expiries_total 0\n",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("/metrics of a fresh node has no line %q", want)
		}
	}
}

func fetch(t *testing.T, address string) (status int, body string) {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, address, nil)
	if err != nil {
		t.Fatal(err)
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return response.StatusCode, string(text)
}

// Frames that need no NATS go on without it; nothing new is decided meanwhile, and
// everything is as before when it is back.
func TestNATSOutage_SessionsOfOneNodeGoOn(t *testing.T) {
	t.Parallel()
	ctx := scenarioContext(t, time.Minute)
	server, err := testenv.StartServer(testenv.ServerOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(server.Close)
	n := startNode(t, "--nats-url", server.URL(), "--lease-ttl", "3s")
	serverID := randomUUID()
	binary := dialBinary(ctx, t, n, serverID)
	phone := dialPhone(ctx, t, n, serverID)
	meet(ctx, t, phone, binary, "before")

	logged := len(n.log.String())
	server.Stop()
	n.awaitAfter(t, logged, "event=(nats_disconnected)")
	meet(ctx, t, phone, binary, "at once")
	n.awaitAfter(t, logged, "event=(lease_not_renewed) deciding=false")
	meet(ctx, t, phone, binary, "without a lease")
	if status, body := fetch(t, n.http+"/readyz"); status != 503 || !strings.Contains(body, "NATS") {
		t.Errorf("/readyz: got %d %s, want 503 with the reason", status, body)
	}
	_, err = testenv.DialPhone(ctx, n.url, testenv.PhoneOptions{ServerID: serverID})
	if refused := new(testenv.RefusedError); !errors.As(err, &refused) || refused.Status != 503 || refused.Header.Get("Retry-After") == "" {
		t.Errorf("a phone that dials meanwhile: got %v, want 503 with Retry-After", err)
	}

	if err := server.Restart(); err != nil {
		t.Fatal(err)
	}
	n.awaitAfter(t, logged, "event=(lease_renewed)")
	meet(ctx, t, phone, binary, "after")
	meet(ctx, t, dialPhone(ctx, t, n, serverID), binary, "a new phone")
}
