package bus

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// ConnConfig says which NATS a node uses: an external one (URL), or one embedded
// in this process (no URL), with a nats-server configuration file or without.
type ConnConfig struct {
	URL   string // comma-separated server URLs; empty: embedded
	Creds string // file of a NATS credential
	CA    string // PEM file that signs the servers' certificates
	Cert  string // PEM files of a client certificate
	Key   string

	ConfigFile string // of the embedded server: cluster, gateways, leaf nodes, TLS, accounts
	StoreDir   string // of the embedded server's JetStream; empty: memory
}

// Conn is a node's connection to NATS, and the server if that is embedded.
type Conn struct {
	nc         *nats.Conn
	js         jetstream.JetStream
	srv        *server.Server
	configured int    // servers in srv's cluster
	tmp        string // store directory that Close removes
	pending    int    // messages that may wait for the dispatch goroutine

	connected atomic.Bool
	first     chan struct{} // closed at the first connect

	mu        sync.Mutex
	disturbed []func()
}

// Dial connects node to NATS. With an external one it returns at once and goes on
// trying in the background for ever: Connected tells. The error names a setting
// that cannot work.
func Dial(cfg ConnConfig, node NodeID, log *slog.Logger) (*Conn, error) {
	c, log := &Conn{pending: subscriptionMessages, first: make(chan struct{})}, EventLogger(log)
	if cfg.Creds != "" {
		if _, err := os.Stat(cfg.Creds); err != nil { // NATS would look for it at each attempt, and not tell
			return nil, fmt.Errorf("NATS credential: %w", err)
		}
	}
	opts := c.options(node, log)
	servers := cfg.URL
	if cfg.URL == "" {
		if err := c.embed(cfg, log); err != nil {
			c.Close()
			return nil, err
		}
		servers = c.srv.ClientURL()
		opts = append(opts, nats.InProcessServer(c.srv))
	}
	opts = append(opts, credentials(cfg)...)
	nc, err := nats.Connect(servers, opts...)
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("connect to NATS: %w", redact(err))
	}
	c.nc = nc
	if nc.IsConnected() {
		<-c.first // its handler runs beside this
	}
	if c.js, err = jetstream.New(nc, jetstream.WithDefaultTimeout(jsTimeout)); err != nil {
		c.Close()
		return nil, fmt.Errorf("use JetStream: %w", err)
	}
	return c, nil
}

func (c *Conn) options(node NodeID, log *slog.Logger) []nats.Option {
	return []nats.Option{
		nats.Name("pyrycode-relay " + string(node)),
		nats.CustomInboxPrefix(inboxPrefix + string(node)),
		nats.RetryOnFailedConnect(true),
		nats.MaxReconnects(-1),
		nats.IgnoreAuthErrorAbort(), // a credential may be renewed or allowed later
		nats.ReconnectWait(reconnectWait),
		nats.ReconnectJitter(reconnectJitter, reconnectJitter),
		nats.PingInterval(natsPingInterval),
		nats.MaxPingsOutstanding(natsPings),
		nats.Timeout(natsDialTimeout),
		nats.FlusherTimeout(natsFlushTimeout),
		nats.ReconnectBufSize(-1), // links send again; an old buffer would replay stale frames
		nats.NoEcho(),
		nats.SkipSubjectValidation(), // tokenSubject and its like make valid ones
		nats.ConnectHandler(func(*nats.Conn) {
			c.connected.Store(true)
			log.Info("nats_connected")
			close(c.first)
		}),
		nats.DisconnectErrHandler(func(_ *nats.Conn, err error) {
			c.connected.Store(false)
			if err != nil {
				log.Warn("nats_disconnected", "error", redact(err))
			}
		}),
		nats.ReconnectHandler(func(*nats.Conn) {
			log.Info("nats_reconnected")
			c.tellDisturbed() // before anybody goes by what was true until then
			c.connected.Store(true)
		}),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) {
			log.Warn("nats_error", "error", redact(err))
			c.tellDisturbed()
		}),
		nats.LameDuckModeHandler(func(nc *nats.Conn) {
			log.Info("nats_lame_duck")
			_ = nc.ForceReconnect() // the server closes us anyway; this moment is as good as any
		}),
	}
}

func credentials(cfg ConnConfig) (opts []nats.Option) {
	if cfg.Creds != "" {
		opts = append(opts, nats.UserCredentials(cfg.Creds))
	}
	if cfg.CA != "" {
		opts = append(opts, nats.RootCAs(cfg.CA))
	}
	if cfg.Cert != "" {
		opts = append(opts, nats.ClientCert(cfg.Cert, cfg.Key))
	}
	return opts
}

// embed starts the server inside this process.
func (c *Conn) embed(cfg ConnConfig, log *slog.Logger) error {
	opts, err := c.serverOptions(cfg)
	if err != nil {
		return err
	}
	srv, err := server.NewServer(opts)
	if err != nil {
		return fmt.Errorf("embedded NATS server: %w", redact(err))
	}
	c.srv, c.configured = srv, clusterSize(opts)
	fatal := make(chan error, 1)
	srv.SetLoggerV2(natsLog{log, fatal}, false, false, false)
	srv.Start()
	for since := time.Now(); !srv.ReadyForConnections(embeddedPoll); {
		select {
		case err := <-fatal:
			return fmt.Errorf("embedded NATS server: %w", redact(err))
		default:
		}
		if time.Since(since) > embeddedReady {
			return errors.New("embedded NATS server: not ready in time; is a port of its configuration taken?")
		}
	}
	return nil
}

func (c *Conn) serverOptions(cfg ConnConfig) (*server.Options, error) {
	if cfg.ConfigFile != "" {
		opts, err := server.ProcessConfigFile(cfg.ConfigFile)
		if err != nil {
			return nil, fmt.Errorf("NATS configuration %s: %w", cfg.ConfigFile, redact(err))
		}
		if !opts.JetStream {
			return nil, fmt.Errorf("NATS configuration %s: JetStream is off; add a jetstream block, the registry lives in it", cfg.ConfigFile)
		}
		if cfg.StoreDir != "" {
			opts.StoreDir = cfg.StoreDir
		}
		opts.NoSigs = true
		return opts, nil
	}
	opts := &server.Options{
		ServerName: "embedded", DontListen: true, JetStream: true, StoreDir: cfg.StoreDir,
		JetStreamMaxMemory: embeddedMemory, JetStreamMaxStore: embeddedStore,
		MaxPayload: embeddedMaxPayload, NoSigs: true,
	}
	if opts.StoreDir == "" {
		dir, err := os.MkdirTemp("", "pyrycode-relay-nats-")
		if err != nil {
			return nil, fmt.Errorf("embedded NATS server: %w", err)
		}
		c.tmp, opts.StoreDir = dir, dir
	}
	return opts, nil
}

// Embedded reports whether the NATS server runs in this process.
func (c *Conn) Embedded() bool { return c.srv != nil }

// Connected reports whether the connection to NATS is up. It does not wait, as
// asking the NATS client would while that writes.
func (c *Conn) Connected() bool { return c.connected.Load() }

// MaxPayload is the largest message in bytes that the server takes; 0 before the
// first connect.
func (c *Conn) MaxPayload() int64 { return c.nc.MaxPayload() }

// JetStream is for the registry's buckets.
func (c *Conn) JetStream() jetstream.JetStream { return c.js }

// Subscribe implements Transport. It returns when the subscription is on its way to
// the server.
func (c *Conn) Subscribe(subject string, f func(*nats.Msg)) (stop func(), err error) {
	sub, err := c.nc.Subscribe(subject, f)
	if err != nil {
		return nil, err
	}
	if err := sub.SetPendingLimits(c.pending, subscriptionBytes); err != nil {
		return nil, err
	}
	done := make(chan struct{}) // f has run for the last time
	sub.SetClosedHandler(func(string) { close(done) })
	return func() {
		_ = sub.Unsubscribe() // fails only when the connection is closed
		<-done
	}, nil
}

// Publish implements Transport.
func (c *Conn) Publish(subject, replyTo string, data []byte) error {
	if replyTo == "" {
		return c.nc.Publish(subject, data)
	}
	return c.nc.PublishRequest(subject, replyTo, data)
}

// Request implements Transport; it also makes the JetStream calls that have no
// client method.
func (c *Conn) Request(ctx context.Context, subject string, data []byte) (*nats.Msg, error) {
	return c.RequestMsg(ctx, &nats.Msg{Subject: subject, Data: data})
}

// RequestMsg is Request with headers.
func (c *Conn) RequestMsg(ctx context.Context, msg *nats.Msg) (*nats.Msg, error) {
	answer, err := c.nc.RequestMsgWithContext(ctx, msg)
	if errors.Is(err, nats.ErrNoResponders) {
		return nil, ErrNoResponders
	}
	return answer, err
}

// RequestMany is a request with many answers, of which most may wait at a time. It passes
// each to take until that returns false. Errors as Request.
func (c *Conn) RequestMany(ctx context.Context, subject string, data []byte, most int, take func(*nats.Msg) bool) error {
	inbox := c.nc.NewRespInbox()
	answers := make(chan *nats.Msg, most)
	sub, err := c.nc.ChanSubscribe(inbox, answers) // a sync one has room for 64K
	if err != nil {
		return err
	}
	defer func() { _ = sub.Unsubscribe() }() // fails only when the connection is closed
	if err := c.nc.PublishRequest(subject, inbox, data); err != nil {
		return err
	}
	for {
		select {
		case msg := <-answers:
			if len(msg.Data) == 0 && msg.Header.Get("Status") == "503" {
				return ErrNoResponders
			}
			if !take(msg) {
				return nil
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Servers is how many NATS servers the cluster of the connection has, as far as
// this connection or the embedded server's configuration tells: at least 1.
func (c *Conn) Servers() int {
	if c.srv != nil {
		return c.configured
	}
	return max(1, len(c.nc.Servers()))
}

// clusterSize counts the servers that a configuration names: this one and every
// route that does not lead to itself.
func clusterSize(opts *server.Options) int {
	n := 1
	for _, r := range opts.Routes {
		if r.Host != net.JoinHostPort(opts.Cluster.Host, strconv.Itoa(opts.Cluster.Port)) {
			n++
		}
	}
	return n
}

// Close closes the connection and stops the embedded server.
func (c *Conn) Close() {
	if c.nc != nil {
		c.nc.Close()
	}
	if c.srv != nil {
		c.srv.Shutdown()
		c.srv.WaitForShutdown()
	}
	if c.tmp != "" {
		_ = os.RemoveAll(c.tmp) // a temporary directory
	}
}

// OnDisturbed implements Transport.
func (c *Conn) OnDisturbed(f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.disturbed = append(c.disturbed, f)
}

// tellDisturbed says that messages may have been lost.
func (c *Conn) tellDisturbed() {
	c.mu.Lock()
	fs := c.disturbed
	c.mu.Unlock()
	for _, f := range fs {
		f()
	}
}

// redact keeps what an error says and leaves out what may hold a password: from
// the start of the first URL, or of what stands before an @ without one, to the
// end of the word of the last @; and all of an error about the form of a URL.
func redact(err error) error {
	if e := (*url.Error)(nil); errors.As(err, &e) {
		return errors.New("malformed URL; in a user name or password, write characters other than letters and digits as %XX")
	}
	text := err.Error()
	end := strings.LastIndexByte(text, '@')
	if end < 0 {
		return errors.New(text)
	}
	start := strings.LastIndexAny(text[:strings.IndexByte(text, '@')], spaces) + 1
	if i := strings.Index(text, "://"); i >= 0 {
		start = min(start, strings.LastIndexAny(text[:i], spaces)+1)
	}
	if i := strings.IndexAny(text[end:], spaces); i >= 0 {
		return errors.New(text[:start] + "(url)" + text[end+i:])
	}
	return errors.New(text[:start] + "(url)")
}

const spaces = " \t\r\n"

// natsLog passes the embedded server's warnings and errors on, and the first one
// that the server says it cannot live with.
type natsLog struct {
	log   *slog.Logger
	fatal chan error
}

func (l natsLog) Noticef(string, ...any)         {}
func (l natsLog) Debugf(string, ...any)          {}
func (l natsLog) Tracef(string, ...any)          {}
func (l natsLog) Warnf(format string, v ...any)  { l.line(slog.LevelWarn, format, v) }
func (l natsLog) Errorf(format string, v ...any) { l.line(slog.LevelError, format, v) }
func (l natsLog) Fatalf(format string, v ...any) {
	l.line(slog.LevelError, format, v)
	select {
	case l.fatal <- fmt.Errorf(format, v...):
	default:
	}
}
func (l natsLog) line(v slog.Level, f string, a []any) {
	l.log.Log(context.Background(), v, "nats_server", "text", redact(fmt.Errorf(f, a...)).Error())
}
