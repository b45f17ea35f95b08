package main

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sys/unix"

	"github.com/pyrycode/pyrycode-relay/bus"
	"github.com/pyrycode/pyrycode-relay/gateway"
	"github.com/pyrycode/pyrycode-relay/registry"
)

// stopTime is what is kept of the drain time-out for the registry, after the
// connections have had the rest.
const stopTime = 2 * time.Second

// run is one relay node from its start until ctx ends, and the drain after that.
// Nothing of it is left when it returns. It is shared by main and by tests that
// run several nodes in one process.
func run(ctx context.Context, cfg config, log *slog.Logger) error {
	node := bus.NewNodeID(cfg.gatewayID)
	conn, err := bus.Dial(bus.ConnConfig{
		URL: cfg.natsURL, Creds: cfg.natsCreds, CA: cfg.natsCA, Cert: cfg.natsCert, Key: cfg.natsKey,
		ConfigFile: cfg.natsConfig, StoreDir: cfg.natsStoreDir,
	}, node, log)
	if err != nil {
		return err
	}
	defer conn.Close()

	reg := registry.New(bus.New(conn, node, busConfig(cfg), log), registryConfig(cfg), log)
	metrics := prometheus.NewRegistry()
	metrics.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	gw := gateway.New(reg, log, gateway.WithConfig(gatewayConfig(cfg, metrics)))

	servers, err := openListeners(cfg, gw.Handler(), metricsHandler(metrics), log)
	if err != nil {
		return err
	}
	defer servers.close()
	if err := reg.Start(); err != nil {
		return err
	}
	servers.serve()
	log.Info("starting", "node", string(node), "version", versionString(), "nats", natsKind(cfg))

	stopWatching := make(chan struct{})
	watching := make(chan error, 1)
	go func() { watching <- untilReady(ctx, stopWatching, reg, conn, cfg, log) }()
	var failure error
	watched := false
	select {
	case <-ctx.Done():
	case failure = <-servers.failed:
	case failure = <-watching:
		watched = true
		if failure == nil {
			select {
			case <-ctx.Done():
			case failure = <-servers.failed:
			}
		}
	}
	close(stopWatching)
	if !watched {
		failure = cmp.Or(failure, <-watching)
	}
	drain(cfg, reg, gw, servers, log)
	return failure
}

// untilReady logs the moment from which the node serves claims. It returns an
// error if it never can.
func untilReady(ctx context.Context, stop <-chan struct{}, reg *registry.Registry, conn *bus.Conn, cfg config, log *slog.Logger) error {
	ticker := time.NewTicker(50 * time.Millisecond)
	defer ticker.Stop()
	for {
		if reg.Ready() == nil {
			if most := conn.MaxPayload() - messageOverhead; int64(cfg.maxFrameBytes) > most {
				return fmt.Errorf("--max-frame-bytes %d: the NATS server takes at most %d; lower it, or raise max_payload there", cfg.maxFrameBytes, most)
			}
			log.Info("ready", "node", string(reg.Bus().Node()), "region", cfg.region)
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-stop:
			return nil
		case <-ticker.C:
		}
	}
}

// messageOverhead is what a frame may grow by on its way over NATS, in bytes: the
// link's header and the envelope, whose token may be as long as a request's
// headers and grow threefold by JSON.
const messageOverhead = bus.Headroom + 3*maxHeaderBytes + 1024

// drain takes the node out of service: no new connections, then no old ones, then
// its lease. It takes drainTimeout at most.
func drain(cfg config, reg *registry.Registry, gw *gateway.Gateway, servers *listeners, log *slog.Logger) {
	log.Info("draining")
	start := time.Now()
	reg.Drain()
	ctx, cancel := context.WithTimeout(context.Background(), cfg.drainTimeout)
	defer cancel()
	connections, cancel := context.WithTimeout(ctx, max(cfg.drainTimeout-stopTime, cfg.drainTimeout/2))
	defer cancel()
	gw.Shutdown(connections)
	servers.shutdown(connections)
	reg.Stop(ctx)
	log.Info("stopped", "took", time.Since(start).Round(time.Millisecond).String())
}

func busConfig(cfg config) bus.Config {
	return bus.Config{Window: cfg.linkWindow, Backlog: cfg.phoneBacklog}
}

func registryConfig(cfg config) registry.Config {
	return registry.Config{
		Region: cfg.region, Version: versionString(), KVPrefix: cfg.kvPrefix, KVReplicas: cfg.kvReplicas,
		Memory:   cfg.natsURL == "" && cfg.natsConfig == "" && cfg.natsStoreDir == "",
		LeaseTTL: cfg.leaseTTL, Grace: cfg.grace, ProbeTimeout: cfg.probeTimeout, MaxPhones: cfg.maxPhones,
	}
}

func gatewayConfig(cfg config, metrics prometheus.Registerer) gateway.Config {
	burst := cfg.upgradeBurst
	if burst == 0 {
		burst = -1 // off
	}
	return gateway.Config{
		Version: versionString(), MaxFrameBytes: cfg.maxFrameBytes, NoToken: !cfg.forwardToken,
		MaxConnections: maxConnections(cfg), UpgradeInterval: cfg.upgradeInterval, UpgradeBurst: burst,
		TrustedProxies: cfg.trustXForwardedFor,
		PingInterval:   cfg.pingInterval, PongTimeout: cfg.pongTimeout,
		WriteTimeout: cfg.writeTimeout, MessageTimeout: cfg.messageTimeout,
		Metrics: metrics,
	}
}

// maxConnections is the cap on connections: 80 % of the file descriptors unless
// the operator says otherwise, so that NATS and the disk never lack one.
func maxConnections(cfg config) int {
	if cfg.maxConnections > 0 {
		return cfg.maxConnections
	}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil || limit.Cur > 1<<30 {
		return 0
	}
	return int(limit.Cur) * 8 / 10 //nolint:gosec // at most 1<<30
}

// maxTCPConnections bounds what the public ports have open together: an eighth
// more than the WebSockets, which leaves a tenth of the file descriptors.
func maxTCPConnections(cfg config) int {
	n := maxConnections(cfg)
	return n + n/8
}

func metricsHandler(metrics *prometheus.Registry) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(metrics, promhttp.HandlerOpts{}))
	return mux
}

// natsKind says which NATS the node uses, without its address.
func natsKind(cfg config) string {
	switch {
	case cfg.natsURL != "":
		return "external"
	case cfg.natsConfig != "":
		return "embedded with " + cfg.natsConfig
	}
	return "embedded"
}
