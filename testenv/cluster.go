package testenv

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats-server/v2/server"
)

// pollInterval is how often WaitReady looks: nats-server does not tell when its
// state changes.
const pollInterval = 5 * time.Millisecond

// ClusterOptions describes a NATS cluster. The zero value is good.
type ClusterOptions struct {
	// Name is the cluster's name, "testenv" by default. Servers are called
	// <name>-0, <name>-1, …
	Name string
	// Servers is how many, 3 by default and 2 at least.
	Servers int
	// Memory and Proxied are those of ServerOptions. A proxied cluster also has
	// a proxy on each route, one per direction of dialling.
	Memory, Proxied bool
	// Detector is that of ServerOptions, for all servers.
	Detector *Detector
	// Configure may change what a server (see its ServerName) is started with,
	// for instance its users and permissions. It is called at each start.
	Configure func(*server.Options)
}

// Cluster is a JetStream cluster of servers in this process, which can hold
// streams with as many replicas as it has servers. Servers do not tell clients
// about each other: a client uses the URLs that it was given. The caller must
// Close it. All methods may be called concurrently.
type Cluster struct {
	Servers []*Server // static

	nowhere *Proxy // refuses; nil if not proxied
}

// StartCluster starts a cluster and returns once WaitReady would.
func StartCluster(opts ClusterOptions) (*Cluster, error) {
	c := new(Cluster)
	err := c.build(opts)
	if err == nil {
		err = c.start()
	}
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("start NATS cluster: %w", err)
	}
	return c, nil
}

func (c *Cluster) build(opts ClusterOptions) error {
	if opts.Name == "" {
		opts.Name = "testenv"
	}
	if opts.Servers == 0 {
		opts.Servers = 3
	}
	if opts.Servers < 2 {
		return errors.New("a cluster needs 2 servers; see StartServer")
	}
	for i := range opts.Servers {
		s, err := newServer(ServerOptions{
			Name:      fmt.Sprintf("%s-%d", opts.Name, i),
			Memory:    opts.Memory,
			Proxied:   opts.Proxied,
			Detector:  opts.Detector,
			Configure: opts.Configure,
		})
		if err != nil {
			return err
		}
		c.Servers = append(c.Servers, s)
		s.cluster = opts.Name
		if s.route, err = freePort(); err != nil {
			return err
		}
	}
	if opts.Proxied {
		return c.connectThroughProxies()
	}
	for _, from := range c.Servers {
		for _, to := range c.Servers {
			if from != to {
				from.peers = append(from.peers, routeURL(loopback(to.route)))
			}
		}
	}
	return nil
}

// connectThroughProxies gives each server its own way to each other one, so that
// all bytes of one server can be held and no others. Gossip would create routes
// past these, hence all advertise an address that refuses.
func (c *Cluster) connectThroughProxies() (err error) {
	if c.nowhere, err = NewProxy(""); err != nil {
		return err
	}
	c.nowhere.Refuse()
	for _, from := range c.Servers {
		from.advertise = c.nowhere.Addr()
		for _, to := range c.Servers {
			if from == to {
				continue
			}
			l, err := newLink(loopback(to.route), from, to)
			if err != nil {
				return err
			}
			from.peers = append(from.peers, routeURL(l.Addr()))
		}
	}
	return nil
}

func routeURL(addr string) *url.URL { return &url.URL{Scheme: "nats-route", Host: addr} }

func (c *Cluster) start() error {
	// One after the other: two servers that dial each other at the same moment
	// close both routes, and the first election is then lost for seconds.
	for _, s := range c.Servers {
		if err := s.start(); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	return c.WaitReady(ctx)
}

// WaitReady waits until the cluster is whole as far as its servers run: all have
// all their routes, one is the JetStream meta leader and knows the state of all,
// and all have caught up with each of their streams. (Without that last one,
// stopping one server soon after restarting another can cost a stream its quorum
// for good.) A server that is isolated counts as running. Leaderships may still
// move after a fault: a request that arrives in that moment is never answered.
func (c *Cluster) WaitReady(ctx context.Context) error {
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for {
		missing := c.missing()
		if missing == "" {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("wait for NATS cluster: %w (%s)", context.Cause(ctx), missing)
		}
	}
}

// missing says what the cluster lacks to be ready, "" if nothing.
func (c *Cluster) missing() string {
	var running []*Server
	for _, s := range c.Servers {
		if s.Running() {
			running = append(running, s)
		}
	}
	leaders := 0
	for _, s := range running {
		ns := s.running.Load()
		if got, want := ns.NumRoutes(), (len(running)-1)*int(s.perPeer.Load()); got != want {
			return fmt.Sprintf("%s has %d of %d routes", s.Name(), got, want)
		}
		if h := ns.Healthz(new(server.HealthzOptions)); h.Error != "" {
			return s.Name() + ": " + h.Error
		}
		if ns.JetStreamIsLeader() {
			leaders++
			if len(ns.JetStreamClusterPeers()) < len(running) {
				return "the meta leader lacks peers"
			}
		}
	}
	if leaders != 1 {
		return fmt.Sprintf("%d meta leaders", leaders)
	}
	return ""
}

// URLs returns the URL of each server for clients, of its proxy if there is one.
func (c *Cluster) URLs() []string {
	urls := make([]string, len(c.Servers))
	for i, s := range c.Servers {
		urls[i] = s.URL()
	}
	return urls
}

// URL returns all URLs, comma-joined, as nats.Connect takes them.
func (c *Cluster) URL() string { return strings.Join(c.URLs(), ",") }

// Isolate holds all bytes from and to server i: see Server.Isolate.
func (c *Cluster) Isolate(i int) { c.Servers[i].Isolate() }

// Heal undoes Isolate.
func (c *Cluster) Heal(i int) { c.Servers[i].Heal() }

// Stop shuts server i down properly.
func (c *Cluster) Stop(i int) { c.Servers[i].Stop() }

// Kill ends server i abruptly: see Server.Kill.
func (c *Cluster) Kill(i int) { c.Servers[i].Kill() }

// Restart starts server i again. The rest of the cluster may not have noticed
// when it returns: see WaitReady.
func (c *Cluster) Restart(i int) error { return c.Servers[i].Restart() }

// Close stops all servers and removes their stores.
func (c *Cluster) Close() {
	var wg sync.WaitGroup
	for _, s := range c.Servers {
		wg.Go(s.Close)
	}
	wg.Wait()
	if c.nowhere != nil {
		c.nowhere.Close()
	}
}
