package main

// Never in any log, error, metric label, subject, KV value or crash output: a
// token, a frame's content, a full header set.          (protocol.md: Log events)

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/pyrycode/pyrycode-relay/testenv"
)

func TestNothingSecretLeaks(t *testing.T) {
	t.Parallel()
	ctx := scenarioContext(t, time.Minute)
	s := secrets{token: "tOkEn" + rand.Text(), payload: "pAyLoAd" + rand.Text(), header: "hEaDeR" + rand.Text()}
	detector := testenv.NewDetector(s.token, s.payload, s.header)
	server, err := testenv.StartServer(testenv.ServerOptions{Detector: detector})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(server.Close)
	flags := []string{"--nats-url", server.URL(), "--max-phones", "2", "--probe-timeout", "3s", "--grace", "3s"}
	nodes := [2]*node{startProcess(t, flags...), startProcess(t, flags...)}

	for i, n := range nodes {
		s.everythingHappens(ctx, t, n, nodes[1-i])
	}

	for i, n := range nodes {
		_, metrics := fetch(t, n.metrics+"/metrics")
		fmt.Fprintln(detector.Writer(fmt.Sprintf("/metrics of node %d", i+1)), metrics)
		for _, path := range []string{"/healthz", "/readyz"} {
			_, body := fetch(t, n.http+path)
			fmt.Fprintln(detector.Writer(path), body)
		}
	}
	fmt.Fprintln(detector.Writer("the KV"), dumpStreams(ctx, t, server.URL()))
	for i, n := range nodes { // some at work in the crash
		serverID := randomUUID()
		b := dialBinary(ctx, t, n, serverID)
		meet(ctx, t, s.dialPhone(ctx, t, nodes[1-i], serverID), b, s.payload)
	}
	for _, n := range nodes {
		n.signal(t, syscall.SIGQUIT)
		<-n.ended
	}
	for i, n := range nodes {
		log := n.log.String()
		fmt.Fprintln(detector.Writer(fmt.Sprintf("the log and the crash output of node %d", i+1)), log)
		// It proves nothing unless all of this happened.
		for _, want := range []string{
			"phone_registered", "phone_unregistered", "phone_register_no_server", "server_claimed", "server_id_conflict",
			"server_id_takeover", "server_released", "envelope_dropped", "goroutine 1 gp=", "gateway.(*conn)",
		} {
			if !strings.Contains(log, want) {
				t.Errorf("log of node %d has no %q", i+1, want)
			}
		}
	}
	if err := detector.Err(); err != nil {
		t.Error(err)
	}
}

// secrets are what must not be found anywhere.
type secrets struct{ token, payload, header string }

// everythingHappens plays what the wire contract knows, good and bad, with the
// secrets wherever a peer has the choice.
func (s secrets) everythingHappens(ctx context.Context, t *testing.T, near, far *node) {
	t.Helper()
	serverID := randomUUID()
	frame := []byte(`{"text":"` + s.payload + `"}`)
	binary := dialBinary(ctx, t, near, serverID)
	phones := []*testenv.Phone{s.dialPhone(ctx, t, near, serverID), s.dialPhone(ctx, t, far, serverID)}
	for _, phone := range phones {
		connID := meet(ctx, t, phone, binary, s.payload)
		if err := binary.Send(ctx, connID, frame); err != nil {
			t.Fatal(err)
		}
	}

	// Refusals, before the upgrade and after.
	wantEnd(ctx, t, "one phone too many", s.dialPhone(ctx, t, far, serverID), 4429, "too many phones for server-id")
	wantEnd(ctx, t, "a phone without a binary", s.dialPhone(ctx, t, near, randomUUID()), 4404, "no server with that id")
	wantEnd(ctx, t, "a second binary", dialBinary(ctx, t, far, serverID), 4409, "server-id already claimed")
	for _, request := range []string{
		"GET /v1/client HTTP/1.1\r\nHost: relay\r\nX-Pyrycode-Token: " + s.token + "\r\nX-Other: " + s.header + "\r\n\r\n",
		"GET /v1/client?token=" + s.token + " HTTP/1.1\r\nHost: relay\r\nX-Pyrycode-Server: " + strings.Repeat(s.header, 20) + "\r\n\r\n",
		"GET /" + s.token + " HTTP/1.1\r\nHost: relay\r\nAuthorization: Bearer " + s.token + "\r\n\r\n",
		"POST /v1/server HTTP/1.1\r\nHost: relay\r\nContent-Length: " + fmt.Sprint(len(s.payload)) + "\r\n\r\n" + s.payload,
		"GET /v1/client HTTP/1.1\r\nHost: relay\r\nX-Pyrycode-Token " + s.token + "\r\n\r\n",
		s.payload + " " + s.token + "\r\n\r\n",
		"GET / HTTP/9.9\r\n" + s.header + "\r\n\r\n",
	} {
		sendRaw(ctx, t, near, request)
	}

	// What goes nowhere.
	for _, message := range []string{
		`"` + s.payload + `"`, string(frame) + s.payload, `{"conn_id":"` + s.payload + `","frame":"` + s.payload + `"}`,
		`{"conn_id":7,"frame":"` + s.payload + `"}`, `{"conn_id":"x","close_code":70000,"frame":"` + s.payload + `"}`,
		`{"conn_id":"` + s.payload + `"}`, `{"frame":"` + s.payload + `"}`, s.payload,
		`{"push_wake":{"platform":"fcm","token":"` + s.token + `"}}`,
	} {
		if err := binary.SendRaw(ctx, []byte(message)); err != nil {
			t.Fatal(err)
		}
	}

	// Every end of a phone.
	if err := phones[0].Close(4000, s.payload); err != nil {
		t.Fatal(err)
	}
	noJSON := s.replace(ctx, t, near, serverID, binary)
	meet(ctx, t, noJSON, binary, s.payload)
	if err := noJSON.Send(ctx, []byte(`{"text":"`+s.payload)); err != nil {
		t.Fatal(err)
	}
	wantEnd(ctx, t, "a phone that sends no JSON", noJSON, 1007, "frame is not valid JSON")
	tooBig := s.replace(ctx, t, near, serverID, binary)
	meet(ctx, t, tooBig, binary, s.payload)
	_ = tooBig.Send(ctx, []byte(`"`+strings.Repeat(s.payload, 300_000/len(s.payload))+`"`)) // may be closed meanwhile
	if got, err := tooBig.Closed(ctx); err != nil || got.Code != 1009 {
		t.Errorf("a phone that sends too much: got %v (%v), want 1009", got, err)
	}
	directed := s.replace(ctx, t, near, serverID, binary)
	connID := meet(ctx, t, directed, binary, s.payload)
	if err := binary.SendClose(ctx, connID, 4001, frame); err != nil {
		t.Fatal(err)
	}
	wantEnd(ctx, t, "a phone that its binary closes", directed, 4001, "")

	// The binary changes: by takeover, and after it has been away.
	binary.Pause()
	taker := dialBinary(ctx, t, far, serverID)
	if got, err := phones[1].Closed(ctx); err != nil || got.Code != 4404 {
		t.Errorf("a phone of a binary that was displaced: got %v (%v), want 4404", got, err)
	}
	binary.Unpause()
	inDoubt := s.dialPhone(ctx, t, near, serverID)
	meet(ctx, t, inDoubt, taker, s.payload)
	taker.Drop()
	far.await(t, "event=(server_released)")
	_ = inDoubt.Send(ctx, frame)
	if got, err := inDoubt.Closed(ctx); err != nil || got.Code != 4404 {
		t.Errorf("a phone that sends while its binary is away: got %v (%v), want 4404", got, err)
	}
	waiting := s.dialPhone(ctx, t, near, serverID)
	if err := waiting.Send(ctx, frame); err != nil {
		t.Fatal(err)
	}
	if got, err := waiting.Closed(ctx); err != nil { // the grace ends, or its frame has waited long enough
		t.Errorf("a phone that waits for a binary: got %v (%v), want it closed", got, err)
	}
}

// replace dials a phone when the place of one that left is free.
func (s secrets) replace(ctx context.Context, t *testing.T, n *node, serverID string, binary *testenv.Binary) *testenv.Phone {
	t.Helper()
	for {
		e, err := binary.NextEnvelope(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if e.HasClose {
			return s.dialPhone(ctx, t, n, serverID)
		}
	}
}

func (s secrets) dialPhone(ctx context.Context, t *testing.T, n *node, serverID string) *testenv.Phone {
	t.Helper()
	p, err := testenv.DialPhone(ctx, n.url, testenv.PhoneOptions{
		ServerID: serverID, Token: s.token, DeviceName: "phone", UserAgent: s.header,
		Header: http.Header{"X-Other": {s.header}, "Cookie": {s.header}},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Drop)
	return p
}

// sendRaw sends any bytes and waits until the node has answered or hung up.
func sendRaw(ctx context.Context, t *testing.T, n *node, request string) {
	t.Helper()
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", strings.TrimPrefix(n.http, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, request); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Read(make([]byte, 1)); err != nil && !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
}

// dumpStreams returns every message of every stream, which are the two buckets.
func dumpStreams(ctx context.Context, t *testing.T, url string) string {
	t.Helper()
	nc, err := nats.Connect(url)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	var dump strings.Builder
	list := js.ListStreams(ctx)
	for info := range list.Info() {
		names = append(names, info.Config.Name)
		stream, err := js.Stream(ctx, info.Config.Name)
		if err != nil {
			t.Fatal(err)
		}
		for seq := info.State.FirstSeq; seq <= info.State.LastSeq; seq++ {
			if m, err := stream.GetMsg(ctx, seq); err == nil { // others have been written over
				fmt.Fprintln(&dump, m.Subject, m.Header, string(m.Data))
			}
		}
	}
	if err := list.Err(); err != nil {
		t.Fatal(err)
	}
	slices.Sort(names)
	if want := []string{"KV_pyrycode_relay_nodes", "KV_pyrycode_relay_presence"}; !slices.Equal(names, want) {
		t.Fatalf("streams %q, want %q", names, want)
	}
	if !strings.Contains(dump.String(), `"state"`) {
		t.Fatalf("no lease among the entries:\n%s", &dump)
	}
	return dump.String()
}
