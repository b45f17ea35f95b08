package main

import (
	"bytes"
	"errors"
	"flag"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

// flagNames are those of the table that operators read.
var flagNames = []string{
	"insecure-listen",
	"domain", "cert-cache", "https-listen", "http-listen",
	"tls-cert", "tls-key",
	"https-proxy-protocol", "trust-x-forwarded-for",
	"nats-url",
	"nats-creds", "nats-ca", "nats-cert", "nats-key",
	"nats-config",
	"nats-store-dir",
	"gateway-id", "region",
	"kv-replicas", "kv-prefix",
	"lease-ttl",
	"grace", "probe-timeout",
	"forward-token",
	"max-frame-bytes", "max-phones", "phone-backlog",
	"max-connections",
	"upgrade-interval", "upgrade-burst",
	"ping-interval", "pong-timeout", "write-timeout", "message-timeout",
	"link-window",
	"drain-timeout",
	"metrics-listen", "metrics-public",
	"log-format", "log-level",
}

func TestEveryDocumentedFlagExists(t *testing.T) {
	var got []string
	for _, o := range new(config).options("", "") {
		got = append(got, o.name)
	}
	if !slices.Equal(got, flagNames) {
		t.Errorf("got flags %q, want %q", got, flagNames)
	}
}

func TestUsage_ShowsEveryFlag(t *testing.T) {
	var help bytes.Buffer
	printUsage(&help, []string{"HOME=/home/relay"})
	for _, name := range append(flagNames, "/home/relay/.pyrycode-relay/certs") {
		if !strings.Contains(help.String(), name+" ") {
			t.Errorf("help does not mention %s", name)
		}
	}
}

// defaultConfig is what a node gets that is told nothing but --insecure-listen :0.
func defaultConfig() config {
	return config{
		insecureListen:  ":0",
		certCache:       "/home/relay/.pyrycode-relay/certs",
		httpsListen:     ":443",
		httpListen:      ":80",
		gatewayID:       "relay-1",
		kvPrefix:        "pyrycode_relay",
		leaseTTL:        20 * time.Second,
		grace:           30 * time.Second,
		probeTimeout:    10 * time.Second,
		forwardToken:    true,
		maxFrameBytes:   262144,
		maxPhones:       16,
		phoneBacklog:    4194304,
		upgradeInterval: 6 * time.Second,
		upgradeBurst:    20,
		pingInterval:    30 * time.Second,
		pongTimeout:     30 * time.Second,
		writeTimeout:    10 * time.Second,
		messageTimeout:  30 * time.Second,
		linkWindow:      256 << 10,
		drainTimeout:    10 * time.Second,
		metricsListen:   "127.0.0.1:9090",
		logFormat:       "text",
		logLevel:        "info",
	}
}

var testEnviron = []string{"HOME=/home/relay", "PYRYCODE_RELAY_GATEWAY_ID=relay-1", "PYRYCODE_RELAY_INSECURE_LISTEN=:0"}

func TestParseConfig(t *testing.T) {
	for _, tt := range []struct {
		args string // separated by spaces
		env  string
		want func(*config)
	}{
		{"", "", func(*config) {}},
		{"--insecure-listen=", "PYRYCODE_RELAY_DOMAIN=Relay.Example.COM", func(c *config) { c.insecureListen, c.domain = "", "relay.example.com" }},
		{"--domain relay.example.com --cert-cache certs --https-listen :8443 --http-listen [::1]:0", "", func(c *config) {
			c.domain, c.certCache, c.httpsListen, c.httpListen = "relay.example.com", "certs", ":8443", "[::1]:0"
		}},
		{"--tls-cert c.pem --tls-key k.pem --https-proxy-protocol 10.1.2.3/8,::1/128", "", func(c *config) {
			c.tlsCert, c.tlsKey = "c.pem", "k.pem"
			c.httpsProxyProtocol = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("::1/128")}
		}},
		{"", "PYRYCODE_RELAY_TRUST_X_FORWARDED_FOR=192.0.2.7/32, 10.0.0.0/8", func(c *config) {
			c.trustXForwardedFor = []netip.Prefix{netip.MustParsePrefix("192.0.2.7/32"), netip.MustParsePrefix("10.0.0.0/8")}
		}},
		{"--nats-creds relay.creds --nats-ca ca.pem --nats-cert c.pem --nats-key k.pem", "PYRYCODE_RELAY_NATS_URL=nats://u:p@a:4222, tls://b", func(c *config) {
			c.natsURL, c.natsCreds, c.natsCA, c.natsCert, c.natsKey = "nats://u:p@a:4222,tls://b", "relay.creds", "ca.pem", "c.pem", "k.pem"
		}},
		{"--nats-config nats.conf --nats-store-dir /data", "", func(c *config) { c.natsConfig, c.natsStoreDir = "nats.conf", "/data" }},
		{"-gateway-id a -region eu --kv-replicas 3 --kv-prefix my-relay", "PYRYCODE_RELAY_REGION=us", func(c *config) {
			c.gatewayID, c.region, c.kvReplicas, c.kvPrefix = "a", "eu", 3, "my-relay"
		}},
		{"--lease-ttl 3s --grace 1s --probe-timeout 250ms --forward-token=false", "", func(c *config) {
			c.leaseTTL, c.grace, c.probeTimeout, c.forwardToken = 3*time.Second, time.Second, 250*time.Millisecond, false
		}},
		{"--forward-token", "PYRYCODE_RELAY_FORWARD_TOKEN=false", func(*config) {}},
		{"--max-frame-bytes 1024 --max-phones 1 --phone-backlog 1MiB --max-connections 5", "", func(c *config) {
			c.maxFrameBytes, c.maxPhones, c.phoneBacklog, c.maxConnections = 1024, 1, 1<<20, 5
		}},
		{"--upgrade-interval 1s --upgrade-burst 0", "", func(c *config) { c.upgradeInterval, c.upgradeBurst = time.Second, 0 }},
		{"--ping-interval 1s --pong-timeout 2s --write-timeout 3s --message-timeout 4s --drain-timeout 5s", "", func(c *config) {
			c.pingInterval, c.pongTimeout, c.writeTimeout = time.Second, 2*time.Second, 3*time.Second
			c.messageTimeout, c.drainTimeout = 4*time.Second, 5*time.Second
		}},
		{"--link-window 2MiB", "PYRYCODE_RELAY_LINK_WINDOW=65536", func(c *config) { c.linkWindow = 2 << 20 }},
		{"", "PYRYCODE_RELAY_LINK_WINDOW=65536", func(c *config) { c.linkWindow = 65536 }},
		{"--metrics-listen localhost:1", "", func(c *config) { c.metricsListen = "localhost:1" }},
		{"--metrics-listen [::1]:1", "", func(c *config) { c.metricsListen = "[::1]:1" }},
		{"--metrics-listen :1 --metrics-public", "", func(c *config) { c.metricsListen, c.metricsPublic = ":1", true }},
		{"", "PYRYCODE_RELAY_METRICS_LISTEN=", func(c *config) { c.metricsListen = "" }},
		{"--log-format json --log-level debug", "", func(c *config) { c.logFormat, c.logLevel = "json", "debug" }},

		// Left in the environment by Kubernetes.
		{"", "PYRYCODE_RELAY_SERVICE_HOST=10.0.0.1", func(*config) {}},
		{"", "PYRYCODE_RELAY_SERVICE_PORT_HTTP=8080", func(*config) {}},
		{"", "PYRYCODE_RELAY_PORT=tcp://10.0.0.1:8080", func(*config) {}},
		{"", "PYRYCODE_RELAY_METRICS_PORT_9090_TCP_ADDR=10.0.0.1", func(*config) {}},
	} {
		want := defaultConfig()
		tt.want(&want)
		got, err := parseConfig(strings.Fields(tt.args), append(slices.Clone(testEnviron), tt.env))
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("args %q, variable %q:\ngot  %+v, error %v\nwant %+v", tt.args, tt.env, got, err, want)
		}
	}
}

func TestParseConfig_Refuses(t *testing.T) {
	for _, tt := range []struct {
		args string
		env  string
		want []string // parts of the error
	}{
		{"--nonsense 1", "", []string{"-nonsense", "-h lists the flags"}},
		{"--grace", "", []string{"-grace", "needs an argument"}},
		{"--metrics-public false", "", []string{`"false"`, "--flag=false"}},
		{"", "PYRYCODE_RELAY_NATS_URI=x", []string{"PYRYCODE_RELAY_NATS_URI", "PYRYCODE_RELAY_NATS_URL"}},
		{"", "PYRYCODE_RELAY_PORT=8080", []string{"PYRYCODE_RELAY_PORT"}},
		{"", "PYRYCODE_RELAY_GRACE=soon", []string{`PYRYCODE_RELAY_GRACE "soon"`, "whole seconds"}},

		{"--insecure-listen=", "", []string{"--insecure-listen", "--domain", "--tls-cert"}},
		{"--insecure-listen 8080", "", []string{`--insecure-listen "8080"`, "a port, e.g."}},
		{"--insecure-listen :http", "", []string{"--insecure-listen"}},
		{"--insecure-listen localhost", "", []string{"--insecure-listen"}},
		{"--insecure-listen :65536", "", []string{"--insecure-listen"}},
		{"--https-listen=", "", []string{"--https-listen"}},
		{"--http-listen x", "", []string{"--http-listen"}},
		{"--domain localhost", "", []string{"--domain", "relay.example.com"}},
		{"--domain https://relay.example.com", "", []string{"--domain"}},
		{"--domain relay.example.com:443", "", []string{"--domain"}},
		{"--domain 192.0.2.7", "", []string{"--domain"}},
		{"--domain relay.example.com --cert-cache=", "", []string{"--cert-cache", "HOME"}},
		{"--domain relay.example.com --tls-cert c --tls-key k", "", []string{"--domain", "--tls-cert"}},
		{"--tls-cert c", "", []string{"--tls-cert", "--tls-key"}},
		{"--tls-key k", "", []string{"--tls-cert", "--tls-key"}},
		{"--https-proxy-protocol 10.0.0.0/8", "", []string{"--https-proxy-protocol", "--domain"}},
		{"--https-proxy-protocol 10.0.0.1", "", []string{"--https-proxy-protocol", "CIDRs"}},
		{"--trust-x-forwarded-for 10.0.0.0/8,", "", []string{"--trust-x-forwarded-for"}},

		{"--nats-url 127.0.0.1:4222", "", []string{"--nats-url", "nats://"}},
		{"--nats-url http://127.0.0.1:4222", "", []string{"--nats-url"}},
		{"--nats-url nats://", "", []string{"--nats-url"}},
		{"--nats-url nats://a,", "", []string{"--nats-url"}},
		{"--nats-url nats://a --nats-config f", "", []string{"--nats-url", "--nats-config"}},
		{"--nats-url nats://a --nats-store-dir d", "", []string{"--nats-url", "--nats-store-dir"}},
		{"--nats-creds f", "", []string{"--nats-creds", "--nats-url"}},
		{"--nats-ca f", "", []string{"--nats-ca", "--nats-url"}},
		{"--nats-url nats://a --nats-cert f", "", []string{"--nats-cert", "--nats-key"}},

		{"--gateway-id=", "", []string{"--gateway-id", "1 to 64 bytes"}},
		{"--gateway-id " + strings.Repeat("x", 65), "", []string{"--gateway-id"}},
		{"--kv-replicas 2", "", []string{"--kv-replicas", "1, 3 or 5"}},
		{"--kv-prefix a.b", "", []string{"--kv-prefix"}},
		{"--kv-prefix=", "", []string{"--kv-prefix"}},
		{"--lease-ttl 2999ms", "", []string{"--lease-ttl", "at least 3s"}},
		{"--grace 0s", "", []string{"--grace"}},
		{"--grace 1500ms", "", []string{"--grace", "whole seconds"}},
		{"--probe-timeout 10", "", []string{"--probe-timeout", "e.g. 20s"}},
		{"--ping-interval -1s", "", []string{"--ping-interval"}},
		{"--drain-timeout 0", "", []string{"--drain-timeout"}},
		{"--upgrade-interval 0s", "", []string{"--upgrade-interval"}},
		{"--upgrade-burst -1", "", []string{"--upgrade-burst"}},
		{"--forward-token=maybe", "", []string{"--forward-token", "true or false"}},
		{"--max-frame-bytes 1023", "", []string{"--max-frame-bytes", "1024 to 786432"}},
		{"--max-frame-bytes 786433", "", []string{"--max-frame-bytes"}},
		{"--max-phones 0", "", []string{"--max-phones"}},
		{"--phone-backlog 0", "", []string{"--phone-backlog"}},
		{"--max-connections -1", "", []string{"--max-connections"}},
		{"--link-window 256KB", "", []string{"--link-window", "256KiB"}},
		{"--link-window -1KiB", "", []string{"--link-window"}},
		{"--link-window 9223372036854775807KiB", "", []string{"--link-window"}},

		{"--metrics-listen :9090", "", []string{"--metrics-listen", "--metrics-public"}},
		{"--metrics-listen 192.0.2.7:9090", "", []string{"--metrics-listen", "--metrics-public"}},
		{"--metrics-listen 127.0.0.1", "", []string{"--metrics-listen"}},
		{"--log-format xml", "", []string{"--log-format", "text, json"}},
		{"--log-level loud", "", []string{"--log-level", "debug, info, warn, error"}},
	} {
		_, err := parseConfig(strings.Fields(tt.args), append(slices.Clone(testEnviron), tt.env))
		if err == nil {
			t.Errorf("args %q, variable %q: got no error", tt.args, tt.env)
			continue
		}
		for _, part := range append(tt.want, "") {
			if !strings.Contains(err.Error(), part) || strings.Contains(err.Error(), "\n") {
				t.Errorf("args %q, variable %q: got error %q, want one line with %q", tt.args, tt.env, err, part)
			}
		}
	}
}

func TestParseConfig_KeepsSecrets(t *testing.T) {
	for _, args := range [][]string{
		{"--nats-url", "http://user:secret@nats.example.com"},
		{"--nats-url", "nats://secret@a:4222,nats://user:secret@ b"},
		{"--nats-url", "nats://user:secret%zz@a"},
		{"--nats-url", "user:secret@a:4222"},
		{"--nats-url", "\nsecret@a"},
		{"--insecure-listen", "nats://secret@a:4222"},
		{"nats://secret@a:4222"},
	} {
		_, err := parseConfig(args, testEnviron)
		if err == nil || strings.Contains(err.Error(), "secret") {
			t.Errorf("%q: got error %v, want one without the secret", args, err)
		}
	}
	_, err := parseConfig(nil, append(slices.Clone(testEnviron), "PYRYCODE_RELAY_NATS_PASSWORD=secret"))
	if err == nil || strings.Contains(err.Error(), "secret") {
		t.Errorf("unknown variable: got error %v, want one without its value", err)
	}
}

func TestParseConfig_Help(t *testing.T) {
	for _, arg := range []string{"-h", "--help"} {
		if _, err := parseConfig([]string{"--grace", "3s", arg}, testEnviron); !errors.Is(err, flag.ErrHelp) {
			t.Errorf("%s: got error %v, want %v", arg, err, flag.ErrHelp)
		}
	}
}
