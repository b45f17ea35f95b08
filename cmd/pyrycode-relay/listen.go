package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	stdlog "log"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/pires/go-proxyproto"

	"github.com/pyrycode/pyrycode-relay/bus"
)

// Limits of every listener against peers that are slow or send too much. A
// WebSocket is out of their reach: its upgrade clears the deadlines.
const (
	readHeaderTimeout = 5 * time.Second  // the PROXY header, the TLS handshake, then the request's header
	readTimeout       = 15 * time.Second // a whole request; above the 5 s in which an upgrade is answered
	writeTimeout      = 20 * time.Second // a whole answer
	idleTimeout       = 5 * time.Second  // between two requests; a health check needs no more
	maxHeaderBytes    = 128 << 10        // a server-id of 100 KB has to get as far as its 400 (protocol.md)
)

// listeners are the open ports of a node. The caller of openListeners calls
// serve once, then shutdown or close.
type listeners struct {
	// Set by openListeners, then read-only.
	log    *slog.Logger
	all    []*listener
	failed chan error // one slot for each of all
	limit  func(net.Listener) net.Listener

	serving sync.WaitGroup
}

// listener is one open port and the server for it.
type listener struct {
	name   string // insecure, https, http or metrics
	port   net.Listener
	server *http.Server
}

// openListeners binds every port that cfg asks for, handler being served on the
// public ones and metrics on its own. All or none are open when it returns; an
// error names flag and address. Nothing is accepted before serve.
func openListeners(cfg config, handler, metrics http.Handler, log *slog.Logger) (*listeners, error) {
	l := &listeners{log: log, limit: limitListeners(maxTCPConnections(cfg))}
	if err := l.open(cfg, handler, metrics); err != nil {
		l.close()
		return nil, err
	}
	l.failed = make(chan error, len(l.all))
	return l, nil
}

func (l *listeners) open(cfg config, handler, metrics http.Handler) error {
	if cfg.insecureListen != "" {
		if err := l.add("insecure", cfg.insecureListen, handler); err != nil {
			return fmt.Errorf("--insecure-listen %s: %w", cfg.insecureListen, err)
		}
	}
	if cfg.domain != "" {
		if err := l.openACME(cfg, handler); err != nil {
			return err
		}
	}
	if cfg.tlsCert != "" {
		files, err := openCertFiles(cfg.tlsCert, cfg.tlsKey, l.log)
		if err != nil {
			return fmt.Errorf("--tls-cert, --tls-key: %w", err)
		}
		if err := l.addTLS(cfg, newTLSConfig(files.certificate), handler); err != nil {
			return err
		}
	}
	if cfg.metricsListen != "" {
		if err := l.add("metrics", cfg.metricsListen, metrics); err != nil {
			return fmt.Errorf("--metrics-listen %s: %w", cfg.metricsListen, err)
		}
	}
	return nil
}

// openACME opens the listeners of a domain: the one for TLS, and the one on
// which the certificate authority asks for proof.
func (l *listeners) openACME(cfg config, handler http.Handler) error {
	if err := makePrivateDir(cfg.certCache); err != nil {
		return fmt.Errorf("--cert-cache %s: %w", cfg.certCache, err)
	}
	acme := newACME(cfg.domain, cfg.certCache, l.log)
	if err := l.addTLS(cfg, acme.tlsConfig(), onlyHost(cfg.domain, http.StatusMisdirectedRequest, handler)); err != nil {
		return err
	}
	if err := l.add("http", cfg.httpListen, acme.challengeHandler()); err != nil {
		return fmt.Errorf("--http-listen %s: %w", cfg.httpListen, err)
	}
	return nil
}

func (l *listeners) addTLS(cfg config, config *tls.Config, handler http.Handler) error {
	if err := l.add("https", cfg.httpsListen, handler); err != nil {
		return fmt.Errorf("--https-listen %s: %w", cfg.httpsListen, err)
	}
	https := l.all[len(l.all)-1]
	https.port = tls.NewListener(believeProxies(https.port, cfg.httpsProxyProtocol), config)
	return nil
}

func (l *listeners) add(name, addr string, handler http.Handler) error {
	// Heartbeats and the limits above find a dead peer; TCP's keep-alive is four more system
	// calls for each connection.
	listen := net.ListenConfig{KeepAlive: -1}
	port, err := listen.Listen(context.Background(), "tcp", addr)
	if err != nil {
		return withoutAddress(err)
	}
	if name != "metrics" {
		port = yieldingListener{l.limit(port)}
	}
	l.all = append(l.all, &listener{name, port, newServer(handler, l.log)})
	return nil
}

// yieldingListener lets whoever is connected go first: 10,000 that come back at once after
// a gateway's death are a queue in the kernel, not in front of every frame.
type yieldingListener struct{ net.Listener }

func (l yieldingListener) Accept() (net.Conn, error) {
	bus.Yield()
	return l.Listener.Accept()
}

// withoutAddress drops what the error of a listen says twice.
func withoutAddress(err error) error {
	if op, ok := errors.AsType[*net.OpError](err); ok {
		return op.Err
	}
	return err
}

// serve starts to accept, and logs each address with its port resolved.
func (l *listeners) serve() {
	for _, one := range l.all {
		l.log.Info("listening", "addr", one.port.Addr().String(), "listener", one.name)
		l.serving.Go(func() {
			if err := one.server.Serve(one.port); !errors.Is(err, http.ErrServerClosed) {
				l.failed <- fmt.Errorf("listener %s: %w", one.name, err)
			}
		})
	}
}

// shutdown stops accepting, lets requests end until ctx does, and waits for
// what serve started. It leaves WebSockets alone.
func (l *listeners) shutdown(ctx context.Context) {
	var servers sync.WaitGroup
	for _, one := range l.all {
		servers.Go(func() { _ = one.server.Shutdown(ctx) }) // an error is the end of ctx: close is next
	}
	servers.Wait()
	l.close()
}

// close stops accepting, cuts requests short, and waits for what serve started.
// It leaves WebSockets alone.
func (l *listeners) close() {
	for _, one := range l.all {
		_ = one.server.Close()
		_ = one.port.Close() // the server knows it only once it serves
	}
	l.serving.Wait()
}

func newServer(handler http.Handler, log *slog.Logger) *http.Server {
	http1 := new(http.Protocols)
	http1.SetHTTP1(true) // HTTP/2 has no WebSocket upgrade that anybody here speaks
	return &http.Server{
		Handler:           handler,
		Protocols:         http1,
		ReadHeaderTimeout: readHeaderTimeout,
		ReadTimeout:       readTimeout,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		ErrorLog:          stdlog.New(serverLog{log}, "", 0),
	}
}

// serverLog takes the lines of an http.Server. They quote requests, so only
// their kind is passed on; of a panic, the stack without the value.
type serverLog struct{ log *slog.Logger }

func (s serverLog) Write(line []byte) (int, error) {
	switch {
	case bytes.HasPrefix(line, []byte("http: panic serving")):
		_, stack, _ := bytes.Cut(line, []byte("\ngoroutine "))
		s.log.Error("http_panic", "stack", string(stack))
	case bytes.HasPrefix(line, []byte("http: TLS handshake error")):
		s.log.Debug("http_error", "kind", "tls_handshake")
	default:
		s.log.Debug("http_error", "kind", "other")
	}
	return len(line), nil
}

// believeProxies returns port with the client's address taken from the PROXY
// header of connections from the trusted prefixes, if they send one. Other
// connections are passed on untouched: a PROXY header from a stranger is no TLS
// handshake, and fails as such.
func believeProxies(port net.Listener, trusted []netip.Prefix) net.Listener {
	if len(trusted) == 0 {
		return port
	}
	return &proxyproto.Listener{
		Listener:          port,
		ReadHeaderTimeout: readHeaderTimeout,
		ConnPolicy: func(peer proxyproto.ConnPolicyOptions) (proxyproto.Policy, error) {
			if contains(trusted, peer.Upstream) {
				return proxyproto.USE, nil
			}
			return proxyproto.SKIP, nil
		},
	}
}

func contains(prefixes []netip.Prefix, addr net.Addr) bool {
	tcp, ok := addr.(*net.TCPAddr)
	if !ok {
		return false
	}
	ip := tcp.AddrPort().Addr().Unmap()
	for _, prefix := range prefixes {
		if prefix.Contains(ip) {
			return true
		}
	}
	return false
}

// onlyHost answers requests for another host than domain with status.
func onlyHost(domain string, status int, handler http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !isHost(r.Host, domain) {
			http.Error(w, http.StatusText(status), status)
			return
		}
		handler.ServeHTTP(w, r)
	})
}

// isHost reports whether a Host header, with or without a port, means domain.
func isHost(header, domain string) bool {
	host, _, err := net.SplitHostPort(header)
	if err != nil {
		host = header
	}
	return strings.EqualFold(strings.TrimSuffix(host, "."), domain)
}

// makePrivateDir makes sure that dir is there and nobody else can look into it.
func makePrivateDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	info, err := os.Stat(dir)
	if err != nil {
		return err
	}
	if !info.IsDir() {
		return errors.New("not a directory")
	}
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		return fmt.Errorf("mode %04o lets others read keys: chmod 0700 it", mode)
	}
	return nil
}
