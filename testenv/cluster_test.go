package testenv

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

func startCluster(t *testing.T, opts ClusterOptions) *Cluster {
	t.Helper()
	c := must(StartCluster(opts))(t)
	t.Cleanup(c.Close)
	return c
}

var r3 = jetstream.KeyValueConfig{Bucket: "b", Replicas: 3, Storage: jetstream.MemoryStorage}

func TestClusterHoldsThreeReplicas(t *testing.T) {
	for _, proxied := range []bool{false, true} {
		t.Run(fmt.Sprintf("proxied=%v", proxied), func(t *testing.T) {
			c := startCluster(t, ClusterOptions{Proxied: proxied})
			kv := bucket(t, connect(t, c.URL()), r3)
			status := must(kv.Status(within(t, 10*time.Second)))(t)
			if got := len(status.(*jetstream.KeyValueBucketStatus).StreamInfo().Cluster.Replicas); got != 2 {
				t.Errorf("%d followers; want 2", got)
			}
			for i, url := range c.URLs() {
				nc := connect(t, url)
				if got := nc.ConnectedServerName(); got != c.Servers[i].Name() {
					t.Errorf("%s is %q; want %q", url, got, c.Servers[i].Name())
				}
				if got := nc.DiscoveredServers(); len(got) > 0 {
					t.Errorf("server %d told of %v: a way around the proxies", i, got)
				}
			}
		})
	}
}

// No byte goes to or from the isolated server: not through its clients, nor
// through routes, whoever dialled those. An observer connects past the proxy.
func TestIsolatedServerHearsNothingUntilHealed(t *testing.T) {
	c := startCluster(t, ClusterOptions{Proxied: true})
	publisher := connect(t, c.URLs()[0])
	var subs []*nats.Subscription
	for _, url := range []string{c.URLs()[1], c.URLs()[2], c.Servers[2].DirectURL()} {
		nc := connect(t, url)
		subs = append(subs, must(nc.SubscribeSync("x"))(t))
		if err := nc.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	send := func(s string) {
		t.Helper()
		if err := errors.Join(publisher.Publish("x", []byte(s)), publisher.Flush()); err != nil {
			t.Fatal(err)
		}
	}
	wantMsg := func(sub *nats.Subscription, want string) {
		t.Helper()
		if m, err := sub.NextMsg(10 * time.Second); err != nil || string(m.Data) != want {
			t.Fatalf("got %v, %v; want %s", m, err, want)
		}
	}
	// Interest may still be on its way: publish until all have heard once.
	for _, sub := range subs {
		for {
			send("before")
			if _, err := sub.NextMsg(100 * time.Millisecond); err == nil {
				break
			}
		}
	}
	drain := func(sub *nats.Subscription, last string) {
		t.Helper()
		for {
			m, err := sub.NextMsg(10 * time.Second)
			if err != nil {
				t.Fatal(err)
			}
			if string(m.Data) == last {
				return
			}
		}
	}
	send("mark")
	for _, sub := range subs {
		drain(sub, "mark")
	}

	c.Isolate(2)
	send("held")
	wantMsg(subs[0], "held")
	for _, sub := range subs[1:] {
		if m, err := sub.NextMsg(50 * time.Millisecond); !errors.Is(err, nats.ErrTimeout) {
			t.Fatalf("behind the isolated server: %v, %v", m, err)
		}
	}
	c.Heal(2)
	for _, sub := range subs[1:] {
		wantMsg(sub, "held")
	}
	if err := c.WaitReady(within(t, 30*time.Second)); err != nil {
		t.Error(err)
	}
}

// The others notice a server that stays isolated, and take it back.
func TestClusterIsWholeAfterLongIsolation(t *testing.T) {
	if testing.Short() {
		t.Skip("waits until nats-server's pings give up, 10 to 15 s")
	}
	c := startCluster(t, ClusterOptions{Proxied: true})
	kv := bucket(t, connect(t, c.URLs()[0]+","+c.URLs()[1]), r3)
	c.Isolate(2)
	put(t, kv, "during") // two of three are a quorum
	ctx := within(t, 60*time.Second)
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for c.missing() == "" || c.Servers[0].running.Load().NumRemotes() > 1 {
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatal("the isolated server was not noticed")
		}
	}
	c.Heal(2)
	if err := c.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	back := bucket(t, connect(t, c.URLs()[2]), r3)
	put(t, back, "after")
	wantKey(t, back, "during")
}

func TestClusterSurvivesEachServer(t *testing.T) {
	c := startCluster(t, ClusterOptions{Proxied: true})
	kv := bucket(t, connect(t, c.URL()), r3)
	ctx := within(t, 2*time.Minute)
	for i, end := range []func(int){c.Stop, c.Kill, func(i int) { c.Servers[i].LameDuck() }} {
		end(i)
		key := fmt.Sprint("without-", i)
		put(t, kv, key)
		if err := c.Restart(i); err != nil {
			t.Fatal(err)
		}
		if err := c.WaitReady(ctx); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 3 {
		wantKey(t, kv, fmt.Sprint("without-", i))
	}
}

func TestClusterWaitReadyTellsWhatIsMissing(t *testing.T) {
	c := startCluster(t, ClusterOptions{Servers: 2})
	c.Stop(0)
	c.Stop(1)
	if err := c.WaitReady(within(t, 20*time.Millisecond)); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("ready with nothing running: %v", err)
	}
	if _, err := StartCluster(ClusterOptions{Servers: 1}); err == nil {
		t.Error("a cluster of one started")
	}
}
