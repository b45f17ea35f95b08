package gateway

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"math"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pyrycode/pyrycode-relay/bus"
	"github.com/pyrycode/pyrycode-relay/registry"
)

// Gateway holds the sockets of one node. All methods may be called concurrently.
type Gateway struct {
	// Static after New.
	reg        *registry.Registry
	log        *slog.Logger
	cfg        Config
	metrics    *metrics
	admission  admission
	contention contention
	started    time.Time

	held   atomic.Int64 // binaries that hold their server-id
	phones atomic.Int64 // phones that are attached

	// Guarded by mu.
	mu       sync.Mutex
	open     int // connections, upgrades under way included
	draining bool
	slots    [heartbeatSlots]map[*conn]struct{}
	lastSlot int
	beating  bool // heartbeatLoop runs
	emptied  chan struct{}
	running  sync.WaitGroup // as open; added to only while not draining
}

// New returns a gateway for the node of r. It starts nothing until a connection
// comes; Shutdown ends what is there then.
func New(r *registry.Registry, logger *slog.Logger, opts ...Option) *Gateway {
	g := &Gateway{reg: r, log: bus.EventLogger(logger), started: time.Now(), emptied: make(chan struct{}, 1)}
	for _, opt := range opts {
		opt(g)
	}
	g.cfg = g.cfg.withDefaults()
	g.admission = newAdmission(g.cfg.UpgradeInterval, g.cfg.UpgradeBurst)
	g.contention = newContention()
	g.metrics = newMetrics(g)
	for i := range g.slots {
		g.slots[i] = make(map[*conn]struct{})
	}
	return g
}

// Handler serves everything that the public listener has: /v1/server, /v1/client,
// /healthz and /readyz; anything else is 404.
func (g *Gateway) Handler() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path { // not a ServeMux, which would redirect //healthz
		case "/v1/server":
			g.serveServer(w, r)
		case "/v1/client":
			g.serveClient(w, r)
		case "/healthz":
			g.serveHealth(w, r)
		case "/readyz":
			g.serveReady(w, r)
		default:
			http.NotFound(w, r)
		}
	})
}

func (g *Gateway) serveHealth(w http.ResponseWriter, _ *http.Request) {
	writeJSON(w, http.StatusOK, struct {
		Status   string `json:"status"`
		Version  string `json:"version"`
		Binaries int64  `json:"connected_binaries"`
		Phones   int64  `json:"connected_phones"`
		Uptime   int64  `json:"uptime_seconds"`
		Node     string `json:"node"`
	}{"ok", g.cfg.Version, g.held.Load(), g.phones.Load(), int64(time.Since(g.started).Seconds()), string(g.reg.Bus().Node())})
}

func (g *Gateway) serveReady(w http.ResponseWriter, _ *http.Request) {
	type answer struct {
		Ready  bool   `json:"ready"`
		Reason string `json:"reason,omitempty"`
	}
	if err := g.reg.Ready(); err != nil {
		writeJSON(w, http.StatusServiceUnavailable, answer{Reason: err.Error()})
		return
	}
	writeJSON(w, http.StatusOK, answer{Ready: true})
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v) // fails when the peer has gone
}

// enter admits one upgrade: first the limit per address, then the cap on
// connections. If ok, the caller calls leave once, with how the upgrade ended, or
// with outcomeDone when the connection that came of it has.
func (g *Gateway) enter(w http.ResponseWriter, r *http.Request, e endpoint) (leave func(outcome), addr string, ok bool) {
	bus.Yield()
	client := clientAddr(r, g.cfg.TrustedProxies)
	if ok, wait := g.admission.allow(client); !ok {
		g.metrics.upgraded(e, outcomeRateLimited)
		w.Header().Set("Retry-After", strconv.Itoa(int(math.Ceil(wait.Seconds()))))
		http.Error(w, "too many upgrades from this address", http.StatusTooManyRequests)
		return nil, "", false
	}
	g.mu.Lock()
	full := g.cfg.MaxConnections > 0 && g.open >= g.cfg.MaxConnections
	draining := g.draining
	if !full && !draining {
		g.open++
		g.running.Add(1)
	}
	g.mu.Unlock()
	switch {
	case draining:
		g.metrics.upgraded(e, outcomeUnavailable)
		refuseUpgrade(w, refusal{http.StatusServiceUnavailable, "this gateway is shutting down"})
		return nil, "", false
	case full:
		g.metrics.upgraded(e, outcomeFull)
		refuseUpgrade(w, refusal{http.StatusServiceUnavailable, "this gateway is full"})
		return nil, "", false
	}
	return func(o outcome) {
		if o != outcomeDone {
			g.metrics.upgraded(e, o)
		}
		g.mu.Lock()
		g.open--
		if g.open == 0 && g.beating {
			select {
			case g.emptied <- struct{}{}:
			default:
			}
		}
		g.mu.Unlock()
		g.running.Done()
	}, client.String(), true
}

// refuseUpgrade answers with an HTTP status, which is what makes a binary back
// off.                                              (protocol.md: Close codes)
func refuseUpgrade(w http.ResponseWriter, r refusal) {
	w.Header().Set("Retry-After", strconv.Itoa(retryAfter))
	http.Error(w, r.text, r.status)
}

// refusalFor is the answer to an upgrade that the registry could not decide.
func refusalFor(err error) refusal {
	if errors.Is(err, registry.ErrNotReady) {
		return refusal{http.StatusServiceUnavailable, err.Error()}
	}
	return refusal{http.StatusServiceUnavailable, "the cluster could not decide in time"}
}

// add makes c a connection of this gateway: it gets heartbeats and takes part in
// Shutdown.
func (g *Gateway) add(c *conn) {
	g.metrics.upgraded(endpointOf(c.kind), outcomeUpgraded)
	g.mu.Lock()
	g.lastSlot = (g.lastSlot + 1) % heartbeatSlots
	c.slot = g.lastSlot
	g.slots[c.slot][c] = struct{}{}
	if !g.beating {
		g.beating = true
		go g.heartbeatLoop()
	}
	draining := g.draining
	g.mu.Unlock()
	if draining {
		c.closeAs(codeShutdown) // its upgrade was under way when Shutdown began
	}
}

// peer is a connection of either kind.
type peer interface {
	base() *conn
	// serve returns when the socket has ended.
	serve()
	// ended is told what was never written to the peer.
	ended(left []message)
}

// run serves p on a goroutine of its own, because an HTTP handler's stack never
// shrinks, and cleans up after it.
func (g *Gateway) run(p peer, leave func(outcome)) {
	p.serve()
	c := p.base()
	g.mu.Lock()
	delete(g.slots[c.slot], c)
	g.mu.Unlock()
	p.ended(c.end())
	leave(outcomeDone)
}

// all lists the connections.
func (g *Gateway) all() (conns []*conn) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, slot := range g.slots {
		for c := range slot {
			conns = append(conns, c)
		}
	}
	return conns
}

// Shutdown closes every connection with 1001 and waits until they have ended, at
// most until ctx does; then it drops what is left, and waits dropTime more. New
// upgrades are refused, and the registry, which has been told to drain before,
// decides none under way. A release that the KV does not answer may outlast it:
// Registry.Stop ends that.
func (g *Gateway) Shutdown(ctx context.Context) {
	g.mu.Lock()
	g.draining = true
	g.mu.Unlock()
	conns := g.all()
	batch := max(drainBatch, len(conns)/drainSteps)
	for i, c := range conns {
		c.closeAs(codeShutdown)
		if i%batch == batch-1 {
			select {
			case <-time.After(drainPause):
			case <-ctx.Done():
			}
		}
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		g.running.Wait()
	}()
	select {
	case <-ended:
		return
	case <-ctx.Done():
	}
	for _, c := range g.all() {
		c.sock.drop()
	}
	select {
	case <-ended:
	case <-time.After(dropTime):
	}
}
