package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// open opens the listeners of cfg, and serves handler, "public" by default.
func open(t *testing.T, cfg config, handler http.Handler) (l *listeners, log *bytes.Buffer) {
	t.Helper()
	if handler == nil {
		handler = say("public")
	}
	log = new(bytes.Buffer)
	l, err := openListeners(cfg, handler, say("metrics"), newLogger(log, "text", "info", "relay-1"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.close)
	l.serve()
	return l, log
}

func say(text string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, text) })
}

// sayRemote answers with the address that the request came from.
var sayRemote = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, r.RemoteAddr) })

// addr returns the resolved address of a listener.
func (l *listeners) addr(t *testing.T, name string) string {
	t.Helper()
	for _, one := range l.all {
		if one.name == name {
			return one.port.Addr().String()
		}
	}
	t.Fatalf("no listener %s", name)
	return ""
}

// exchange sends a request for / with a Host header over conn.
func exchange(t *testing.T, conn net.Conn, host string) (status int, body string) {
	t.Helper()
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(5 * time.Second))
	fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: %s\r\n\r\n", host)
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

func dialTCP(t *testing.T, addr string) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

// tlsOver makes conn a TLS connection, and trusts any certificate.
func tlsOver(conn net.Conn) *tls.Conn {
	return tls.Client(conn, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2", "http/1.1"}})
}

func TestListeners_EachServesItsOwn(t *testing.T) {
	cert := newCertPair(t, "relay.test")
	l, log := open(t, config{
		insecureListen: "127.0.0.1:0",
		tlsCert:        cert.certFile, tlsKey: cert.keyFile, httpsListen: "127.0.0.1:0",
		metricsListen: "127.0.0.1:0",
	}, nil)
	for name, want := range map[string]string{"insecure": "public", "https": "public", "metrics": "metrics"} {
		conn := dialTCP(t, l.addr(t, name))
		if name == "https" {
			conn = tlsOver(conn)
		}
		if status, body := exchange(t, conn, "any"); status != 200 || body != want {
			t.Errorf("%s: got %d %q, want 200 %q", name, status, body, want)
		}
		line := fmt.Sprintf("level=INFO gateway=relay-1 event=listening addr=%s listener=%s\n", l.addr(t, name), name)
		if !strings.Contains(log.String(), line) {
			t.Errorf("got log:\n%swant a line with %q", log, line)
		}
	}
}

func TestListeners_AllOrNone(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	free := freeAddr(t)
	_, err = openListeners(config{insecureListen: free, metricsListen: taken.Addr().String()}, nil, nil, slog.New(slog.DiscardHandler))
	want := "--metrics-listen " + taken.Addr().String() + ": "
	if err == nil || !strings.HasPrefix(err.Error(), want) || !strings.Contains(err.Error(), "in use") {
		t.Fatalf("got error %v, want %q and the reason", err, want)
	}
	again, err := net.Listen("tcp", free)
	if err != nil {
		t.Fatalf("the first port is still open: %v", err)
	}
	again.Close()
}

// freeAddr returns an address on which nobody listens.
func freeAddr(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().String()
}

func TestListeners_ShutdownLetsARequestEnd(t *testing.T) {
	begun, finish := make(chan struct{}), make(chan struct{})
	l, _ := open(t, config{insecureListen: "127.0.0.1:0"}, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		close(begun)
		<-finish
		io.WriteString(w, "done")
	}))
	addr := l.addr(t, "insecure")
	down := make(chan struct{})
	go func() {
		defer close(down)
		<-begun
		go func() {
			waitRefused(addr)
			close(finish)
		}()
		l.shutdown(t.Context())
	}()
	if status, body := exchange(t, dialTCP(t, addr), "any"); status != 200 || body != "done" {
		t.Errorf("got %d %q, want 200 done", status, body)
	}
	<-down
	select {
	case err := <-l.failed:
		t.Errorf("got failure %v, want none", err)
	default:
	}
}

// waitRefused waits until nobody listens at addr.
func waitRefused(addr string) {
	for {
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			return
		}
		conn.Close()
	}
}

func TestListeners_ShutdownEndsWithItsContext(t *testing.T) {
	begun := make(chan struct{})
	l, _ := open(t, config{insecureListen: "127.0.0.1:0"}, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		close(begun)
		<-r.Context().Done() // when the connection is cut
	}))
	conn := dialTCP(t, l.addr(t, "insecure"))
	defer conn.Close()
	fmt.Fprint(conn, "GET / HTTP/1.1\r\nHost: any\r\n\r\n")
	<-begun
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	l.shutdown(ctx)
	if _, err := conn.Read(make([]byte, 1)); err == nil {
		t.Error("got an answer, want the connection cut")
	}
}

func TestListeners_ReportFailure(t *testing.T) {
	l, _ := open(t, config{insecureListen: "127.0.0.1:0"}, nil)
	l.all[0].port.Close()
	if err := <-l.failed; !strings.Contains(err.Error(), "listener insecure: ") {
		t.Errorf("got failure %v, want one of the listener", err)
	}
}

func TestHTTPS_NoHTTP2NoOldTLS(t *testing.T) {
	cert := newCertPair(t, "relay.test")
	l, _ := open(t, config{tlsCert: cert.certFile, tlsKey: cert.keyFile, httpsListen: "127.0.0.1:0"}, nil)
	conn := tlsOver(dialTCP(t, l.addr(t, "https")))
	defer conn.Close()
	if err := conn.Handshake(); err != nil {
		t.Fatal(err)
	}
	if got := conn.ConnectionState().NegotiatedProtocol; got != "http/1.1" {
		t.Errorf("got protocol %q, want http/1.1", got)
	}
	old := tls.Client(dialTCP(t, l.addr(t, "https")), &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11})
	defer old.Close()
	if err := old.Handshake(); err == nil {
		t.Error("TLS 1.1 was accepted")
	}
}

func TestHTTPS_BrokenFiles(t *testing.T) {
	cert := newCertPair(t, "relay.test")
	for _, cfg := range []config{
		{tlsCert: cert.certFile, tlsKey: cert.certFile},
		{tlsCert: "absent.pem", tlsKey: cert.keyFile},
	} {
		cfg.httpsListen = "127.0.0.1:0"
		_, err := openListeners(cfg, nil, nil, slog.New(slog.DiscardHandler))
		if err == nil || !strings.Contains(err.Error(), "--tls-cert") {
			t.Errorf("got error %v, want one that names the flag", err)
		}
	}
}

func TestProxyProtocol(t *testing.T) {
	const header = "PROXY TCP4 203.0.113.9 192.0.2.1 40000 443\r\n"
	for name, tt := range map[string]struct {
		trusted string
		header  string
		want    string // client address; empty: no TLS
	}{
		"trusted with header":     {"127.0.0.0/8", header, "203.0.113.9:40000"},
		"trusted, client unknown": {"127.0.0.0/8", "PROXY UNKNOWN\r\n", "127.0.0.1"},
		"trusted without header":  {"127.0.0.0/8", "", "127.0.0.1"},
		"stranger with header":    {"192.0.2.0/24", header, ""},
		"stranger without header": {"192.0.2.0/24", "", "127.0.0.1"},
		"off":                     {"", header, ""},
	} {
		t.Run(name, func(t *testing.T) {
			cert := newCertPair(t, "relay.test")
			cfg := config{tlsCert: cert.certFile, tlsKey: cert.keyFile, httpsListen: "127.0.0.1:0"}
			if tt.trusted != "" {
				cfg.httpsProxyProtocol = []netip.Prefix{netip.MustParsePrefix(tt.trusted)}
			}
			l, _ := open(t, cfg, sayRemote)
			raw := dialTCP(t, l.addr(t, "https"))
			if _, err := io.WriteString(raw, tt.header); err != nil {
				t.Fatal(err)
			}
			conn := tlsOver(raw)
			if err := conn.Handshake(); err != nil || tt.want == "" {
				conn.Close()
				if (err != nil) != (tt.want == "") {
					t.Errorf("got handshake error %v, want client address %q", err, tt.want)
				}
				return
			}
			if status, body := exchange(t, conn, "any"); status != 200 || !strings.HasPrefix(body, tt.want) {
				t.Errorf("got %d %q, want client address %s", status, body, tt.want)
			}
		})
	}
}

func TestContains_IPv4InIPv6(t *testing.T) {
	trusted := []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}
	addr := &net.TCPAddr{IP: net.ParseIP("::ffff:10.1.2.3"), Port: 1}
	if !contains(trusted, addr) {
		t.Errorf("%v is not in %v", addr, trusted)
	}
}

func TestOnlyHost(t *testing.T) {
	handler := onlyHost("relay.example.com", http.StatusMisdirectedRequest, say("public"))
	for host, want := range map[string]int{
		"relay.example.com":      200,
		"RELAY.example.com:8443": 200,
		"relay.example.com.":     200,
		"www.relay.example.com":  421,
		"example.com":            421,
		"192.0.2.7":              421,
		"[::1]:443":              421,
		"":                       421,
	} {
		r := httptest.NewRequest("GET", "/", nil)
		r.Host = host
		w := httptest.NewRecorder()
		if handler.ServeHTTP(w, r); w.Code != want {
			t.Errorf("Host %q: got %d, want %d", host, w.Code, want)
		}
	}
}

func TestSlowOrLongHeader(t *testing.T) {
	server := newServer(say("public"), slog.New(slog.DiscardHandler))
	if server.ReadHeaderTimeout <= 0 || server.ReadTimeout <= 0 || server.WriteTimeout <= 0 || server.IdleTimeout <= 0 {
		t.Errorf("a slow peer is waited for without end: %+v", server)
	}
	l, _ := open(t, config{insecureListen: "127.0.0.1:0"}, nil)
	conn := dialTCP(t, l.addr(t, "insecure"))
	// Written beside the reading: the answer comes before the end of it.
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: any\r\nX-Long: %s\r\n\r\n", strings.Repeat("x", 1<<20))
	}()
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil || resp.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
		t.Errorf("got %v, error %v; want 431", resp, err)
	}
	conn.Close()
	<-sent
}

func TestServerLog_KeepsRequestsOut(t *testing.T) {
	var log bytes.Buffer
	server := newServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		panic(r.Header.Get("X-Pyrycode-Token"))
	}), newLogger(&log, "text", "debug", "relay-1"))
	client, conn := net.Pipe()
	ln := &oneConn{conn: make(chan net.Conn, 1), closed: make(chan struct{})}
	ln.conn <- conn
	served := make(chan error)
	go func() { served <- server.Serve(ln) }()
	fmt.Fprint(client, "GET / HTTP/1.1\r\nHost: any\r\nX-Pyrycode-Token: secret\r\n\r\n")
	_, _ = client.Read(make([]byte, 1)) // returns when the handler has ended
	server.Close()
	if err := <-served; !errors.Is(err, http.ErrServerClosed) {
		t.Error(err)
	}
	server.ErrorLog.Print("http: TLS handshake error from 192.0.2.7:1: secret")
	server.ErrorLog.Print("secret")
	for _, want := range []string{"level=ERROR gateway=relay-1 event=http_panic", "TestServerLog", "kind=tls_handshake", "kind=other"} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("got log:\n%swant %q in it", &log, want)
		}
	}
	if strings.Contains(log.String(), "secret") {
		t.Errorf("the log quotes the request:\n%s", &log)
	}
}

// oneConn is a listener with one connection.
type oneConn struct {
	conn   chan net.Conn
	closed chan struct{}
}

func (l *oneConn) Accept() (net.Conn, error) {
	select {
	case conn := <-l.conn:
		return conn, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *oneConn) Close() error   { close(l.closed); return nil }
func (l *oneConn) Addr() net.Addr { return &net.TCPAddr{} }

func TestMakePrivateDir(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "b")
	for range 2 { // made, then found
		if err := makePrivateDir(dir); err != nil {
			t.Fatal(err)
		}
	}
	info, err := os.Stat(dir)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode().Perm() != 0o700 {
		t.Errorf("got mode %v, want 0700", info.Mode())
	}
	for _, mode := range []os.FileMode{0o750, 0o701, 0o755} {
		if err := os.Chmod(dir, mode); err != nil {
			t.Fatal(err)
		}
		if err := makePrivateDir(dir); err == nil || !strings.Contains(err.Error(), "chmod 0700") {
			t.Errorf("mode %v: got error %v, want one that says chmod 0700", mode, err)
		}
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := makePrivateDir(file); err == nil {
		t.Error("a file was taken for a directory")
	}
}
