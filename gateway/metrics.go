package gateway

import (
	"errors"
	"net/http"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/pyrycode/pyrycode-relay/registry"
)

// Label values. Every one is present from the start, and none comes from a peer.
type (
	endpoint string
	outcome  string
)

const (
	endpointServer endpoint = "server"
	endpointClient endpoint = "client"

	outcomeUpgraded    outcome = "upgraded"
	outcomeRateLimited outcome = "rate_limited" // 429
	outcomeFull        outcome = "full"         // 503, the cap on connections
	outcomeBadRequest  outcome = "bad_request"  // 400, a header is missing or bad
	outcomeHandshake   outcome = "handshake"    // not a WebSocket handshake
	outcomeUnavailable outcome = "unavailable"  // 503, the registry could not decide

	outcomeDone outcome = "" // a connection that was upgraded has ended; not counted

	failureContended = "contended" // 429, too many claims of one server-id

	dropUnknownConn = "unknown_conn"
	dropPushWake    = "push_wake"
)

var (
	endpoints = []endpoint{endpointServer, endpointClient}
	outcomes  = []outcome{outcomeUpgraded, outcomeRateLimited, outcomeFull, outcomeBadRequest, outcomeHandshake, outcomeUnavailable}
	failures  = []string{"no_server", "too_many_phones", "conflict", "undecided", "not_ready", failureContended}
	drops     = []string{
		dropUnknownConn, dropPushWake, string(errSyntax), string(errNotObject),
		string(errTrailing), string(errConnID), string(errCloseCode), string(errEmpty),
	}
)

const namespace = "pyrycode_relay"

type metrics struct {
	toBinary, toPhone prometheus.Counter
	upgrades          *prometheus.CounterVec
	registerFailures  *prometheus.CounterVec
	drops             *prometheus.CounterVec
}

func newMetrics(g *Gateway) *metrics {
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: namespace, Name: name, Help: help}, labels)
	}
	frames := counter("frames_forwarded_total", "Frames written to a peer of this gateway.", "direction")
	m := &metrics{
		toBinary:         frames.WithLabelValues("phone_to_binary"),
		toPhone:          frames.WithLabelValues("binary_to_phone"),
		upgrades:         counter("ws_upgrade_attempts_total", "Upgrade requests, by how they ended.", "endpoint", "outcome"),
		registerFailures: counter("register_failures_total", "Claims and attaches that the registry refused or could not decide.", "kind"),
		drops:            counter("envelopes_dropped_total", "Messages of binaries that went nowhere.", "kind"),
	}
	for _, e := range endpoints {
		for _, o := range outcomes {
			m.upgrades.WithLabelValues(string(e), string(o))
		}
	}
	for _, f := range failures {
		m.registerFailures.WithLabelValues(f)
	}
	for _, d := range drops {
		m.drops.WithLabelValues(d)
	}
	if g.cfg.Metrics != nil {
		g.cfg.Metrics.MustRegister(frames, m.upgrades, m.registerFailures, m.drops)
		registerGauges(g)
	}
	return m
}

func registerGauges(g *Gateway) {
	gauge := func(name, help string, value func() float64) {
		g.cfg.Metrics.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Namespace: namespace, Name: name, Help: help}, value))
	}
	counter := func(name, help string, value func() uint64) {
		g.cfg.Metrics.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{Namespace: namespace, Name: name, Help: help},
			func() float64 { return float64(value()) }))
	}
	gauge("connected_binaries", "Binaries that hold their server-id through this gateway, grace not counted.",
		func() float64 { return float64(g.held.Load()) })
	gauge("connected_phones", "Phones connected to this gateway.",
		func() float64 { return float64(g.phones.Load()) })
	g.cfg.Metrics.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Namespace: namespace, Name: "node_info", Help: "Always 1; the labels say what this node is.",
		ConstLabels: prometheus.Labels{"node": string(g.reg.Bus().Node()), "region": g.reg.Region(), "version": g.cfg.Version},
	}, func() float64 { return 1 }))
	gauge("ready", "1 while this gateway can decide claims.", func() float64 {
		if g.reg.Ready() != nil {
			return 0
		}
		return 1
	})
	counter("grace_expiries_total", "Grace windows that ended without the binary.", g.reg.GraceExpiries)
	counter("bus_malformed_total", "Messages on this node's subject that no relay of this version sends.", g.reg.Bus().Malformed)
	counter("bus_unpublished_total", "Messages that NATS did not take.", g.reg.Bus().Unpublished)
}

func (m *metrics) forwarded(to kind, frames int) {
	if to == kindBinary {
		m.toBinary.Add(float64(frames))
	} else {
		m.toPhone.Add(float64(frames))
	}
}

func (m *metrics) upgraded(e endpoint, o outcome) {
	m.upgrades.WithLabelValues(string(e), string(o)).Inc()
}
func (m *metrics) registerFailed(failure string) { m.registerFailures.WithLabelValues(failure).Inc() }
func (m *metrics) dropped(kind string)           { m.drops.WithLabelValues(kind).Inc() }

func endpointOf(k kind) endpoint {
	if k == kindBinary {
		return endpointServer
	}
	return endpointClient
}

// outcomeOf says how an upgrade failed.
func outcomeOf(err error) outcome {
	var r refusal
	switch {
	case errors.As(err, &r) && r.status == http.StatusTooManyRequests:
		return outcomeRateLimited
	case errors.As(err, &r):
		return outcomeUnavailable
	}
	return outcomeHandshake
}

func failureOf(err error) string {
	switch {
	case errors.Is(err, registry.ErrNoServer):
		return "no_server"
	case errors.Is(err, registry.ErrTooManyPhones):
		return "too_many_phones"
	case errors.Is(err, registry.ErrServerIDConflict):
		return "conflict"
	case errors.Is(err, registry.ErrNotReady):
		return "not_ready"
	}
	return "undecided"
}

func dropKind(err error) string {
	var m malformed
	if errors.As(err, &m) {
		return string(m)
	}
	return dropPushWake
}
