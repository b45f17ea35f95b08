package testenv

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	markToken = "t0ken-of-a-test"
	markFrame = "fr4me-of-a-test"
)

// wantFind fails the test unless the detector has found the mark, in where.
func wantFind(t *testing.T, d *Detector, mark, where string) {
	t.Helper()
	if err := d.Err(); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("%q is in %s:", mark, where)) {
		t.Errorf("got %v, want %q found in %s", err, mark, where)
	}
}

func TestDetector_FindsMarkInLog(t *testing.T) {
	frame := []byte(`{"text":"` + markFrame + `"}`)
	for name, logs := range map[string]func(*slog.Logger){
		"message":           func(log *slog.Logger) { log.Info(markFrame) }, //nolint:sloglint // what should not be
		"attribute":         func(log *slog.Logger) { log.Info("dropped", "frame", string(frame)) },
		"quoted twice":      func(log *slog.Logger) { log.Info("dropped", "frame", fmt.Sprintf("%q", frame)) },
		"bytes":             func(log *slog.Logger) { log.Info("dropped", "frame", frame) },
		"printed bytes":     func(log *slog.Logger) { log.Info("dropped", "frame", fmt.Sprintf("%d", frame)) },
		"raw JSON":          func(log *slog.Logger) { log.Info("dropped", "frame", json.RawMessage(frame)) },
		"hex":               func(log *slog.Logger) { log.Info("dropped", "frame", fmt.Sprintf("%x", frame)) },
		"upper-case hex":    func(log *slog.Logger) { log.Info("dropped", "frame", fmt.Sprintf("%X", frame)) },
		"base64":            func(log *slog.Logger) { log.Info("dropped", "frame", base64.StdEncoding.EncodeToString(frame)) },
		"base64, 1 further": func(log *slog.Logger) { log.Info("dropped", "frame", base64.URLEncoding.EncodeToString(frame[1:])) },
		"base64, 2 further": func(log *slog.Logger) { log.Info("dropped", "frame", base64.StdEncoding.EncodeToString(frame[2:])) },
	} {
		t.Run(name, func(t *testing.T) {
			for _, handler := range []func(w io.Writer) slog.Handler{
				func(w io.Writer) slog.Handler { return slog.NewTextHandler(w, nil) },
				func(w io.Writer) slog.Handler { return slog.NewJSONHandler(w, nil) },
			} {
				d := NewDetector(markToken, markFrame)
				logs(slog.New(handler(d.Writer("log"))))
				wantFind(t, d, markFrame, "log")
			}
		})
	}
}

func TestDetector_FindsMarkAcrossWrites(t *testing.T) {
	line := "level=INFO msg=x token=" + markToken + "-7 a=b\nlevel=INFO\n"
	for cut := range len(line) {
		d := NewDetector(markToken)
		w, other := d.Writer("log"), d.Writer("another log")
		for _, part := range []string{line[:cut], line[cut:]} {
			if n, err := io.WriteString(w, part); n != len(part) || err != nil {
				t.Fatalf("wrote %d, %v, want %d", n, err, len(part))
			}
			fmt.Fprint(other, "something else")
		}
		wantFind(t, d, markToken, "log")
	}
	d := NewDetector(markToken)
	for _, b := range []byte(line) {
		_, _ = d.Writer("log").Write([]byte{b}) // another one each time
	}
	if err := d.Err(); err != nil {
		t.Errorf("found %v, which nobody wrote", err)
	}
}

func TestDetector_KeepsTheFirstFindOnly(t *testing.T) {
	d := NewDetector(markToken, markFrame)
	w := d.Writer("log")
	for i := range 1000 {
		fmt.Fprintf(w, "line=%d token=%s\n", i, markToken)
	}
	if got, want := d.Err().Error(), `the mark "`+markToken+`" is in log: …line=0 token=`+markToken+`…`; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if got := cap(w.(*detectorWriter).text); got > 1<<10 {
		t.Errorf("%d bytes are kept", got)
	}
}

func TestDetector_VerifyFailsTheRun(t *testing.T) {
	for _, tt := range []struct {
		writes  string
		returns int
		want    int
	}{
		{"all is well\n", 0, 0},
		{"all is well\n", 3, 3},
		{markToken + "\n", 0, 1},
		{markToken + "\n", 3, 3},
	} {
		d := NewDetector(markToken)
		got := d.Verify(func() int {
			fmt.Fprint(d.Writer("log"), tt.writes)
			return tt.returns
		})
		if got != tt.want {
			t.Errorf("run wrote %q and returned %d: got %d, want %d", tt.writes, tt.returns, got, tt.want)
		}
	}
}

// What clients tell a server is looked through as far as it names and stores
// something. The data of other messages is where frames belong.
func TestDetector_LooksThroughNATS(t *testing.T) {
	const lines, values = "NATS subjects and headers", "KV values"
	for name, tt := range map[string]struct {
		tell func(t *testing.T, nc *nats.Conn)
		want string // "": nothing is found
	}{
		"data":       {func(t *testing.T, nc *nats.Conn) { publish(t, nc, "s", markToken) }, ""},
		"subject":    {func(t *testing.T, nc *nats.Conn) { publish(t, nc, "a."+markToken+".b", "x") }, lines},
		"no data":    {func(t *testing.T, nc *nats.Conn) { publish(t, nc, "a."+markToken, "") }, lines},
		"subscribed": {func(t *testing.T, nc *nats.Conn) { must(nc.SubscribeSync("a." + markToken))(t) }, lines},
		"reply": {func(t *testing.T, nc *nats.Conn) {
			if err := nc.PublishRequest("s", markToken, []byte("x")); err != nil {
				t.Fatal(err)
			}
		}, lines},
		"header": {func(t *testing.T, nc *nats.Conn) {
			m := &nats.Msg{Subject: "s", Header: nats.Header{"X": {markToken}}, Data: []byte("x")}
			if err := nc.PublishMsg(m); err != nil {
				t.Fatal(err)
			}
		}, lines},
		"data under a header": {func(t *testing.T, nc *nats.Conn) {
			m := &nats.Msg{Subject: "s", Header: nats.Header{"X": {"y"}}, Data: []byte(markToken)}
			if err := nc.PublishMsg(m); err != nil {
				t.Fatal(err)
			}
		}, ""},
		"value": {func(t *testing.T, nc *nats.Conn) { publish(t, nc, "$KV.b.k", markToken) }, values},
		"value of a CAS write": {func(t *testing.T, nc *nats.Conn) {
			kv := bucket(t, nc, jetstream.KeyValueConfig{Bucket: "b"})
			must(kv.Create(t.Context(), "k", []byte(`{"token":"`+markToken+`"}`)))(t)
		}, values},
	} {
		t.Run(name, func(t *testing.T) {
			d := NewDetector(markToken)
			nc := connect(t, startServer(t, ServerOptions{Detector: d}).URL())
			tt.tell(t, nc)
			if err := nc.Flush(); err != nil { // the server has read it
				t.Fatal(err)
			}
			if tt.want != "" {
				wantFind(t, d, markToken, tt.want)
			} else if err := d.Err(); err != nil {
				t.Errorf("found %v, want nothing", err)
			}
		})
	}
}

func publish(t *testing.T, nc *nats.Conn, subject, data string) {
	t.Helper()
	if err := nc.Publish(subject, []byte(data)); err != nil {
		t.Fatal(err)
	}
}

// A detector is no subscriber: what nobody listens to still has no responders.
func TestDetector_AnswersForNobody(t *testing.T) {
	nc := connect(t, startServer(t, ServerOptions{Detector: NewDetector(markToken)}).URL())
	if _, err := nc.RequestWithContext(within(t, 10*time.Second), "nobody", nil); !errors.Is(err, nats.ErrNoResponders) {
		t.Errorf("got %v, want no responders", err)
	}
}

// In a cluster it sees what any client tells any server, after restarts too.
func TestDetector_LooksThroughCluster(t *testing.T) {
	d := NewDetector(markToken, markFrame)
	c := startCluster(t, ClusterOptions{Detector: d})
	publishTo := func(i int, subject string) {
		nc := connect(t, c.Servers[i].URL())
		publish(t, nc, subject, "x")
		if err := nc.FlushWithContext(within(t, 10*time.Second)); err != nil {
			t.Fatal(err)
		}
	}
	publishTo(1, markToken)
	wantFind(t, d, markToken, "NATS subjects and headers")
	c.Stop(2)
	if err := c.Restart(2); err != nil {
		t.Fatal(err)
	}
	publishTo(2, markFrame)
	wantFind(t, d, markFrame, "NATS subjects and headers")
}

func TestDetector_RefusesShortMark(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("a mark of 7 bytes was taken, want a panic")
		}
	}()
	NewDetector("7 bytes")
}
