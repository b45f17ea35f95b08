package testenv

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

func startServer(t *testing.T, opts ServerOptions) *Server {
	t.Helper()
	s := must(StartServer(opts))(t)
	t.Cleanup(s.Close)
	return s
}

// connect returns a client that reconnects for ever.
func connect(t *testing.T, url string, opts ...nats.Option) *nats.Conn {
	t.Helper()
	opts = append([]nats.Option{
		nats.MaxReconnects(-1),
		nats.ReconnectWait(20 * time.Millisecond),
		nats.ReconnectJitter(0, 0),
	}, opts...)
	nc := must(nats.Connect(url, opts...))(t)
	t.Cleanup(nc.Close)
	return nc
}

// retry calls f until it succeeds, a second each time: a request that a server
// gets in the middle of an election is never answered.
func retry(t *testing.T, f func(ctx context.Context) error) {
	t.Helper()
	ctx := within(t, 40*time.Second)
	for {
		once, cancel := context.WithTimeout(ctx, time.Second)
		err := f(once)
		if err != nil {
			<-once.Done() // not faster if it failed at once
		}
		cancel()
		if err == nil {
			return
		}
		if ctx.Err() != nil {
			t.Fatal(err)
		}
	}
}

// bucket creates a bucket, or finds that it is there.
func bucket(t *testing.T, nc *nats.Conn, cfg jetstream.KeyValueConfig) (kv jetstream.KeyValue) {
	t.Helper()
	js := must(jetstream.New(nc))(t)
	retry(t, func(ctx context.Context) (err error) {
		kv, err = js.CreateOrUpdateKeyValue(ctx, cfg)
		return err
	})
	return kv
}

func put(t *testing.T, kv jetstream.KeyValue, key string) {
	t.Helper()
	retry(t, func(ctx context.Context) error {
		_, err := kv.PutString(ctx, key, "v")
		return err
	})
}

// wantKey also retries because a replica may answer before it has caught up.
func wantKey(t *testing.T, kv jetstream.KeyValue, key string) {
	t.Helper()
	retry(t, func(ctx context.Context) error {
		_, err := kv.Get(ctx, key)
		return err
	})
}

// waitFor waits for an event of a client.
func waitFor(t *testing.T, what string, event <-chan struct{}) {
	t.Helper()
	select {
	case <-event:
	case <-within(t, 20*time.Second).Done():
		t.Fatalf("%s: nothing happened", what)
	}
}

func TestServerKeepsStoreAcrossRestarts(t *testing.T) {
	for _, proxied := range []bool{false, true} {
		s := startServer(t, ServerOptions{Proxied: proxied})
		down, up := make(chan struct{}, 9), make(chan struct{}, 9)
		nc := connect(t, s.URL(),
			nats.DisconnectErrHandler(func(*nats.Conn, error) { down <- struct{}{} }),
			nats.ReconnectHandler(func(*nats.Conn) { up <- struct{}{} }))
		kv := bucket(t, nc, jetstream.KeyValueConfig{Bucket: "b"})
		ctx := within(t, 20*time.Second)
		for i, end := range []func(){s.Stop, s.Kill, s.LameDuck} {
			rev := must(kv.PutString(ctx, "k", "v"))(t)
			end()
			if s.Running() {
				t.Fatalf("end %d: runs", i)
			}
			waitFor(t, "disconnect", down)
			if err := s.Restart(); err != nil {
				t.Fatal(err)
			}
			if err := s.Restart(); err == nil {
				t.Error("restarted while it ran")
			}
			waitFor(t, "reconnect", up)
			if e, err := kv.Get(ctx, "k"); err != nil || e.Revision() != rev {
				t.Fatalf("end %d: got %v, %v; want revision %d", i, e, err, rev)
			}
		}
	}
}

func TestServerMemoryForgets(t *testing.T) {
	s := startServer(t, ServerOptions{Memory: true})
	up := make(chan struct{}, 1)
	nc := connect(t, s.URL(), nats.ReconnectHandler(func(*nats.Conn) { up <- struct{}{} }))
	bucket(t, nc, jetstream.KeyValueConfig{Bucket: "b"})
	s.Stop()
	if err := s.Restart(); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "reconnect", up)
	js := must(jetstream.New(nc))(t)
	if _, err := js.KeyValue(within(t, 10*time.Second), "b"); !errors.Is(err, jetstream.ErrBucketNotFound) {
		t.Errorf("bucket: %v; want none", err)
	}
}

func TestServerConfigure(t *testing.T) {
	s := startServer(t, ServerOptions{Name: "locked", Configure: func(o *server.Options) {
		o.Username, o.Password = "u", "p"
	}})
	if _, err := nats.Connect(s.URL()); !errors.Is(err, nats.ErrAuthorization) {
		t.Errorf("anonymous: %v", err)
	}
	nc := connect(t, s.URL(), nats.UserInfo("u", "p"))
	if got := nc.ConnectedServerName(); got != "locked" {
		t.Errorf("connected to %q", got)
	}
}

func TestServerIsolates(t *testing.T) {
	s := startServer(t, ServerOptions{Proxied: true})
	nc := connect(t, s.URL())
	sub := must(nc.SubscribeSync("x"))(t)
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	s.Isolate()
	observer := connect(t, s.DirectURL())
	if err := errors.Join(observer.Publish("x", []byte("held")), observer.Flush()); err != nil {
		t.Fatal(err)
	}
	if m, err := sub.NextMsg(50 * time.Millisecond); !errors.Is(err, nats.ErrTimeout) {
		t.Fatalf("isolated client got %v, %v", m, err)
	}
	s.Heal()
	if m, err := sub.NextMsg(10 * time.Second); err != nil || string(m.Data) != "held" {
		t.Fatalf("healed client got %v, %v", m, err)
	}
}
