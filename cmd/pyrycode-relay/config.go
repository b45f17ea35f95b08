package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"
)

const envPrefix = "PYRYCODE_RELAY_"

// config is what an operator asked for: one field per flag of `serve`, checked
// and with defaults filled in. Read-only after parseConfig.
type config struct {
	// Listeners. An empty address, domain or file means off.
	insecureListen     string
	domain             string // lower case
	certCache          string
	httpsListen        string
	httpListen         string
	tlsCert            string
	tlsKey             string
	httpsProxyProtocol []netip.Prefix // peers whose PROXY header is believed
	trustXForwardedFor []netip.Prefix // peers whose X-Forwarded-For is believed

	// NATS. An empty natsURL means the embedded server.
	natsURL      string // comma-separated; may hold credentials: never print it
	natsCreds    string
	natsCA       string
	natsCert     string
	natsKey      string
	natsConfig   string
	natsStoreDir string // empty: memory

	// The node and its claims.
	gatewayID    string
	region       string
	kvReplicas   int // 0: by cluster size
	kvPrefix     string
	leaseTTL     time.Duration
	grace        time.Duration // whole seconds
	probeTimeout time.Duration
	forwardToken bool

	// Limits. Sizes are bytes.
	maxFrameBytes   int
	maxPhones       int
	phoneBacklog    int
	maxConnections  int // 0: 80 % of the file descriptor limit
	upgradeInterval time.Duration
	upgradeBurst    int // 0: no limit
	pingInterval    time.Duration
	pongTimeout     time.Duration
	writeTimeout    time.Duration
	messageTimeout  time.Duration
	linkWindow      int
	drainTimeout    time.Duration

	// What an operator sees of it.
	metricsListen string // empty: off
	metricsPublic bool
	logFormat     string // text or json
	logLevel      string // debug, info, warn or error
}

const (
	kib = 1 << 10
	mib = 1 << 20

	minLeaseTTL  = 3 * time.Second  // a fifth of it has to fit a KV write
	minDuration  = time.Millisecond // less is a forgotten unit
	maxFrameSize = 768 * kib        // by default a NATS message is 1 MiB at most, wrapping included
	maxSize      = 1 << 30          // more is a typing mistake
	maxLabel     = 64               // bytes of a gateway id or region
	maxCount     = 1<<31 - 1        // fits an int anywhere
)

// option is one flag of `serve`.
type option struct {
	name   string
	def    string // as an operator would type it
	usage  string
	isBool bool               // --name alone means --name=true
	set    func(string) error // stores the value; its error says what would be right, and never repeats the value
}

// options is the table of all flags; setting one stores it in c.
func (c *config) options(certCache, hostname string) []option {
	return []option{
		{name: "insecure-listen", usage: "address for plain HTTP, e.g. :8080; for development or behind a TLS proxy", set: optional(address(&c.insecureListen))},
		{name: "domain", usage: "host name to serve by TLS, with a certificate from ACME", set: optional(domain(&c.domain))},
		{name: "cert-cache", def: certCache, usage: "directory for ACME certificates, mode 0700", set: text(&c.certCache)},
		{name: "https-listen", def: ":443", usage: "address for TLS", set: address(&c.httpsListen)},
		{name: "http-listen", def: ":80", usage: "address for ACME challenges", set: address(&c.httpListen)},
		{name: "tls-cert", usage: "file with the TLS certificate chain, instead of --domain; reloaded when it changes", set: text(&c.tlsCert)},
		{name: "tls-key", usage: "file with the key for --tls-cert", set: text(&c.tlsKey)},
		{name: "https-proxy-protocol", usage: "CIDRs of load balancers whose PROXY protocol header is believed", set: prefixes(&c.httpsProxyProtocol)},
		{name: "trust-x-forwarded-for", usage: "CIDRs of proxies whose X-Forwarded-For is believed", set: prefixes(&c.trustXForwardedFor)},

		{name: "nats-url", usage: "external NATS servers, comma-separated; none: embedded server", set: optional(natsURLs(&c.natsURL))},
		{name: "nats-creds", usage: "credentials file for --nats-url", set: text(&c.natsCreds)},
		{name: "nats-ca", usage: "file with the CA certificates for --nats-url", set: text(&c.natsCA)},
		{name: "nats-cert", usage: "client certificate file for --nats-url", set: text(&c.natsCert)},
		{name: "nats-key", usage: "file with the key for --nats-cert", set: text(&c.natsKey)},
		{name: "nats-config", usage: "nats-server configuration file for the embedded server", set: text(&c.natsConfig)},
		{name: "nats-store-dir", usage: "JetStream directory of the embedded server; none: memory", set: text(&c.natsStoreDir)},

		{name: "gateway-id", def: hostname, usage: "name of this node in logs and in the cluster", set: length(&c.gatewayID, 1, maxLabel)},
		{name: "region", usage: "label of this node in logs and metrics", set: length(&c.region, 0, maxLabel)},
		{name: "kv-replicas", def: "0", usage: "replicas of the KV buckets: 1, 3 or 5; 0: by cluster size", set: replicas(&c.kvReplicas)},
		{name: "kv-prefix", def: "pyrycode_relay", usage: "first part of the KV bucket names", set: bucketName(&c.kvPrefix)},
		{name: "lease-ttl", def: "20s", usage: "how long a silent node is taken for alive; the same on all nodes", set: duration(&c.leaseTTL, minLeaseTTL)},
		{name: "grace", def: "30s", usage: "how long a server-id stays claimed after its binary has gone", set: wholeSeconds(&c.grace)},
		{name: "probe-timeout", def: "10s", usage: "how long a challenged binary has to answer a ping", set: duration(&c.probeTimeout, minDuration)},
		{name: "forward-token", def: "true", usage: "hand the token of a phone to its binary", isBool: true, set: boolean(&c.forwardToken)},

		{name: "max-frame-bytes", def: "262144", usage: "largest message of a peer", set: size(&c.maxFrameBytes, kib, maxFrameSize)},
		{name: "max-phones", def: "16", usage: "phones per server-id; the same on all nodes", set: integer(&c.maxPhones, 1, maxCount)},
		{name: "phone-backlog", def: "4194304", usage: "bytes that may wait for a phone that reads slowly", set: size(&c.phoneBacklog, kib, maxSize)},
		{name: "max-connections", def: "0", usage: "connections of this node; 0: 80 % of the file descriptor limit", set: integer(&c.maxConnections, 0, maxCount)},
		{name: "upgrade-interval", def: "6s", usage: "one upgrade per address in this time", set: duration(&c.upgradeInterval, minDuration)},
		{name: "upgrade-burst", def: "20", usage: "upgrades per address at once; 0: no limit", set: integer(&c.upgradeBurst, 0, maxCount)},
		{name: "ping-interval", def: "30s", usage: "time between WebSocket pings", set: duration(&c.pingInterval, minDuration)},
		{name: "pong-timeout", def: "30s", usage: "how long a pong may take", set: duration(&c.pongTimeout, minDuration)},
		{name: "write-timeout", def: "10s", usage: "how long writing one message may take", set: duration(&c.writeTimeout, minDuration)},
		{name: "message-timeout", def: "30s", usage: "how long a message may take to arrive once begun", set: duration(&c.messageTimeout, minDuration)},
		{name: "link-window", def: "256KiB", usage: "bytes in flight between two nodes for one phone and direction", set: size(&c.linkWindow, kib, maxSize)},
		{name: "drain-timeout", def: "10s", usage: "how long a shutdown may take", set: duration(&c.drainTimeout, minDuration)},

		{name: "metrics-listen", def: "127.0.0.1:9090", usage: "loopback address for /metrics; empty: off", set: optional(address(&c.metricsListen))},
		{name: "metrics-public", def: "false", usage: "let --metrics-listen be any address", isBool: true, set: boolean(&c.metricsPublic)},
		{name: "log-format", def: "text", usage: "text or json", set: oneOf(&c.logFormat, "text", "json")},
		{name: "log-level", def: "info", usage: "debug, info, warn or error", set: oneOf(&c.logLevel, "debug", "info", "warn", "error")},
	}
}

// parseConfig reads the flags in args and the variables in environ (as of
// os.Environ): flag beats variable beats default. Its error is one line that
// names the culprit and says what would be right; it is flag.ErrHelp if args
// ask for help.
func parseConfig(args, environ []string) (config, error) {
	var c config
	options := c.options(defaults(environ))
	given, err := parseEnviron(options, environ)
	if err != nil {
		return config{}, err
	}
	flags, err := parseArgs(options, args)
	if err != nil {
		return config{}, err
	}
	maps.Copy(given, flags)
	for _, o := range options {
		s, ok := given[o.name]
		if !ok {
			s = setting{"--" + o.name, o.def}
		}
		if err := o.set(s.value); err != nil {
			return config{}, fmt.Errorf("%s %q: %w", s.source, redact(s.value), err)
		}
	}
	if err := c.validate(); err != nil {
		return config{}, err
	}
	return c, nil
}

// defaults returns the defaults that differ between machines. One is empty if
// the machine cannot tell; the flag has to be given then, if it matters.
func defaults(environ []string) (certCache, hostname string) {
	for _, variable := range environ {
		if home, ok := strings.CutPrefix(variable, "HOME="); ok && home != "" {
			certCache = filepath.Join(home, ".pyrycode-relay", "certs")
		}
	}
	hostname, _ = os.Hostname()
	return certCache, hostname
}

// validate checks what no flag shows by itself.
func (c *config) validate() error {
	return cmp.Or(c.validateListeners(), c.validateNATS())
}

func (c *config) validateListeners() error {
	switch {
	case (c.tlsCert == "") != (c.tlsKey == ""):
		return errors.New("--tls-cert and --tls-key need each other: give both or none")
	case c.domain != "" && c.tlsCert != "":
		return errors.New("--domain excludes --tls-cert: take certificates from ACME or from files")
	case c.insecureListen == "" && !c.servesTLS():
		return errors.New("nothing to listen on: give --insecure-listen (plain HTTP, e.g. :8080), --domain, or --tls-cert with --tls-key")
	case len(c.httpsProxyProtocol) > 0 && !c.servesTLS():
		return errors.New("--https-proxy-protocol is for TLS: give --domain, or --tls-cert with --tls-key, too")
	case c.domain != "" && c.certCache == "":
		return errors.New("--domain needs a directory for certificates: give --cert-cache or set HOME")
	case c.metricsListen != "" && !c.metricsPublic && !isLoopback(c.metricsListen):
		return fmt.Errorf("--metrics-listen %q: want a loopback address, e.g. 127.0.0.1:9090, or --metrics-public as well", c.metricsListen)
	}
	return nil
}

// servesTLS reports whether there is a TLS listener.
func (c *config) servesTLS() bool { return c.domain != "" || c.tlsCert != "" }

func (c *config) validateNATS() error {
	switch {
	case c.natsURL != "" && c.natsConfig != "":
		return errors.New("--nats-url excludes --nats-config: NATS is external or embedded")
	case c.natsURL != "" && c.natsStoreDir != "":
		return errors.New("--nats-url excludes --nats-store-dir: NATS is external or embedded")
	case c.natsURL == "" && cmp.Or(c.natsCreds, c.natsCA, c.natsCert, c.natsKey) != "":
		return errors.New("--nats-creds, --nats-ca, --nats-cert and --nats-key need --nats-url: the embedded server takes none of them")
	case (c.natsCert == "") != (c.natsKey == ""):
		return errors.New("--nats-cert and --nats-key need each other: give both or none")
	}
	return nil
}

// isLoopback reports whether only this machine can reach a listen address.
func isLoopback(addr string) bool {
	host, _, _ := net.SplitHostPort(addr)
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.IsLoopback()
}

// printUsage writes the help of `serve`, which is that of the program.
func printUsage(w io.Writer, environ []string) {
	fmt.Fprint(w, `pyrycode-relay joins phones to the binary they belong to.

usage: pyrycode-relay [serve] [flags]
       pyrycode-relay smoke|status|bench [flags]     (-h lists them)
       pyrycode-relay version

Every flag is also an environment variable: --nats-url is PYRYCODE_RELAY_NATS_URL.
Flag beats variable beats default. --insecure-listen, --domain, or --tls-cert with
--tls-key is required.

`)
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "FLAG\tDEFAULT\tMEANING")
	for _, o := range new(config).options(defaults(environ)) {
		fmt.Fprintf(table, "--%s\t%s\t%s\n", o.name, o.def, o.usage)
	}
	table.Flush()
}
