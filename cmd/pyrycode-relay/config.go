package main

import (
	"cmp"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
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

// setting is a value and where it was found: a flag or a variable.
type setting struct{ source, value string }

// parseEnviron returns the settings of environ by flag name.
func parseEnviron(options []option, environ []string) (map[string]setting, error) {
	known := make(map[string]string, len(options))
	for _, o := range options {
		known[envName(o.name)] = o.name
	}
	found := make(map[string]setting)
	for _, variable := range environ {
		name, value, _ := strings.Cut(variable, "=")
		if !strings.HasPrefix(name, envPrefix) || serviceLink.MatchString(variable) {
			continue
		}
		option, ok := known[name]
		if !ok {
			return nil, fmt.Errorf("unknown variable %q: unset it, or take one named after a flag, as %s for --nats-url", name, envName("nats-url"))
		}
		found[option] = setting{name, value}
	}
	return found, nil
}

func envName(flag string) string {
	return envPrefix + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}

// serviceLink matches what Kubernetes puts into the environment of every pod
// beside a Service called pyrycode-relay or pyrycode-relay-…: nobody's mistake.
var serviceLink = regexp.MustCompile(`^[^=]+_(SERVICE_HOST=|SERVICE_PORT(_[^=]+)?=|PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?=|PORT=(tcp|udp|sctp)://)`)

// parseArgs returns the settings of args by flag name.
func parseArgs(options []option, args []string) (map[string]setting, error) {
	found := make(map[string]setting)
	flags := flag.NewFlagSet("pyrycode-relay", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	for _, o := range options {
		record := func(value string) error {
			found[o.name] = setting{"--" + o.name, value}
			return nil
		}
		if o.isBool {
			flags.BoolFunc(o.name, o.usage, record)
		} else {
			flags.Func(o.name, o.usage, record)
		}
	}
	if err := parseFlags(flags, args); err != nil {
		return nil, err
	}
	return found, nil
}

// parseFlags parses args, none of which may be positional. Its error is one
// line, or flag.ErrHelp.
func parseFlags(flags *flag.FlagSet, args []string) error {
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		return err
	case err != nil:
		return fmt.Errorf("%w: %s -h lists the flags", err, flags.Name())
	case flags.NArg() > 0:
		return fmt.Errorf("unexpected argument %q: only flags may follow, and a false one is written --flag=false", redact(flags.Arg(0)))
	}
	return nil
}

// credentials is what precedes the host in a URL, and a little more.
var credentials = regexp.MustCompile(`(?s).*@`)

// redact makes a value that may be a URL fit for an error.
func redact(value string) string {
	return credentials.ReplaceAllString(value, "…@")
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

// The functions below make the set function of an option.

func text(p *string) func(string) error {
	return length(p, 0, 4*kib)
}

func length(p *string, least, most int) func(string) error {
	return func(s string) error {
		if len(s) < least || len(s) > most {
			return fmt.Errorf("want %d to %d bytes", least, most)
		}
		*p = s
		return nil
	}
}

// optional lets a flag be empty.
func optional(set func(string) error) func(string) error {
	return func(s string) error {
		if s == "" {
			return nil
		}
		return set(s)
	}
}

func address(p *string) func(string) error {
	return func(s string) error {
		_, port, err := net.SplitHostPort(s)
		if err == nil {
			_, err = strconv.ParseUint(port, 10, 16)
		}
		if err != nil {
			return errors.New("want an address with a port, e.g. 127.0.0.1:8080 or :8080")
		}
		*p = s
		return nil
	}
}

var hostName = regexp.MustCompile(`^([a-z0-9]([a-z0-9-]*[a-z0-9])?\.)+[a-z]([a-z0-9-]*[a-z0-9])?$`)

func domain(p *string) func(string) error {
	return func(s string) error {
		s = strings.ToLower(s)
		if !hostName.MatchString(s) {
			return errors.New("want one host name in ASCII, e.g. relay.example.com")
		}
		*p = s
		return nil
	}
}

func prefixes(p *[]netip.Prefix) func(string) error {
	return optional(func(s string) error {
		var list []netip.Prefix
		for cidr := range strings.SplitSeq(s, ",") {
			prefix, err := netip.ParsePrefix(strings.TrimSpace(cidr))
			if err != nil {
				return errors.New("want CIDRs separated by commas, e.g. 10.0.0.0/8,192.0.2.7/32")
			}
			list = append(list, prefix.Masked())
		}
		*p = list
		return nil
	})
}

func natsURLs(p *string) func(string) error {
	return func(s string) error {
		list := strings.Split(s, ",")
		for i, entry := range list {
			list[i] = strings.TrimSpace(entry)
			u, err := url.Parse(list[i])
			if err != nil || !slices.Contains([]string{"nats", "tls", "ws", "wss"}, u.Scheme) || u.Hostname() == "" {
				return errors.New("want URLs separated by commas, each nats, tls, ws or wss, e.g. nats://127.0.0.1:4222")
			}
		}
		*p = strings.Join(list, ",")
		return nil
	}
}

var bucketChars = regexp.MustCompile(`^[A-Za-z0-9_-]{1,64}$`)

func bucketName(p *string) func(string) error {
	return func(s string) error {
		if !bucketChars.MatchString(s) {
			return errors.New("want 1 to 64 of A-Z, a-z, 0-9, _ and -")
		}
		*p = s
		return nil
	}
}

func duration(p *time.Duration, least time.Duration) func(string) error {
	return func(s string) error {
		d, err := time.ParseDuration(s)
		if err != nil || d < least {
			return fmt.Errorf("want a duration of at least %v, e.g. 20s", least)
		}
		*p = d
		return nil
	}
}

// wholeSeconds is for durations that become a NATS TTL.
func wholeSeconds(p *time.Duration) func(string) error {
	return func(s string) error {
		d, err := time.ParseDuration(s)
		if err != nil || d < time.Second || d%time.Second != 0 {
			return errors.New("want whole seconds, at least 1s, e.g. 30s")
		}
		*p = d
		return nil
	}
}

func boolean(p *bool) func(string) error {
	return func(s string) error {
		b, err := strconv.ParseBool(s)
		if err != nil {
			return errors.New("want true or false")
		}
		*p = b
		return nil
	}
}

func integer(p *int, least, most int) func(string) error {
	return func(s string) error {
		n, err := strconv.Atoi(s)
		if err != nil || n < least || n > most {
			return fmt.Errorf("want a whole number from %d to %d", least, most)
		}
		*p = n
		return nil
	}
}

func replicas(p *int) func(string) error {
	return func(s string) error {
		n, err := strconv.Atoi(s)
		if err != nil || !slices.Contains([]int{0, 1, 3, 5}, n) {
			return errors.New("want 0 (by cluster size), 1, 3 or 5")
		}
		*p = n
		return nil
	}
}

// size takes bytes, or KiB or MiB with that suffix.
func size(p *int, least, most int) func(string) error {
	return func(s string) error {
		unit := 1
		if digits, ok := strings.CutSuffix(s, "KiB"); ok {
			s, unit = digits, kib
		} else if digits, ok := strings.CutSuffix(s, "MiB"); ok {
			s, unit = digits, mib
		}
		n, err := strconv.Atoi(s)
		if err != nil || n < 0 || n > most/unit || n*unit < least {
			return fmt.Errorf("want %d to %d bytes, e.g. 262144 or 256KiB", least, most)
		}
		*p = n * unit
		return nil
	}
}

func oneOf(p *string, values ...string) func(string) error {
	return func(s string) error {
		if !slices.Contains(values, s) {
			return fmt.Errorf("want one of %s", strings.Join(values, ", "))
		}
		*p = s
		return nil
	}
}

// printUsage writes the help of `serve`, which is that of the program.
func printUsage(w io.Writer, environ []string) {
	fmt.Fprint(w, `pyrycode-relay joins phones to the binary they belong to.

usage: pyrycode-relay [serve] [flags]
       pyrycode-relay smoke|status [flags]     (-h lists them)
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
