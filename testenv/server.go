package testenv

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/url"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats-server/v2/server"
)

const (
	startTimeout = 20 * time.Second // for a server to listen, or a cluster to be whole; a loaded machine needs seconds

	// Listen ports of servers: below the ephemeral range, so that no client can
	// be given the port of a server that is down, nor connect to itself there.
	firstPort, lastPort = 20_000, 32_000

	lameDuckGrace    = 100 * time.Millisecond
	lameDuckDuration = time.Second
)

// ServerOptions describes a NATS server. The zero value is good.
type ServerOptions struct {
	// Name is the server's name, "testenv" by default.
	Name string
	// Memory makes Restart forget everything, as if nothing had been on disk.
	Memory bool
	// Proxied puts a fault proxy before the server, which URL then names: needed
	// for Isolate, and for Kill to be abrupt.
	Proxied bool
	// Detector looks through what clients tell the server: subjects, headers,
	// and the values of KV entries. Nil: nobody does.
	Detector *Detector
	// Configure may change what the server is started with, for instance its
	// users and permissions. It is called at each start.
	Configure func(*server.Options)
}

// Server is a nats-server with JetStream in this process, on 127.0.0.1, with
// the settings recommended for a relay. The caller must Close it. All methods
// may be called concurrently.
type Server struct {
	// Static after construction.
	opts        ServerOptions
	cluster     string // its name; "" for a server on its own
	dir         string // the JetStream store
	port, route int    // for clients and for other servers
	advertise   string // the route address told to other servers; "" means the real one
	peers       []*url.URL
	front       *link   // for clients; nil if not proxied
	links       []*link // front, and the routes from and to this server

	isolated, killed atomic.Bool
	running          atomic.Pointer[server.Server] // the latest; nil before the first start
	perPeer          atomic.Int32                  // route connections to each other server

	mu sync.Mutex // held while starting and stopping
}

// StartServer starts a server and returns once it accepts clients.
func StartServer(opts ServerOptions) (*Server, error) {
	s, err := newServer(opts)
	if err != nil {
		return nil, fmt.Errorf("start NATS server: %w", err)
	}
	if err := s.start(); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

func newServer(opts ServerOptions) (*Server, error) {
	if opts.Name == "" {
		opts.Name = "testenv"
	}
	dir, err := os.MkdirTemp("", "testenv-nats-")
	if err != nil {
		return nil, err
	}
	s := &Server{opts: opts, dir: dir}
	if s.port, err = freePort(); err == nil && opts.Proxied {
		s.front, err = newLink(loopback(s.port), s)
	}
	if err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

// URL returns the URL for clients, of the proxy if there is one. It outlives
// restarts.
func (s *Server) URL() string {
	if s.front == nil {
		return s.DirectURL()
	}
	return "nats://" + s.front.Addr()
}

// DirectURL returns the URL for clients past any proxy: for an observer whom no
// fault should reach.
func (s *Server) DirectURL() string { return "nats://" + loopback(s.port) }

// Name returns the server's name.
func (s *Server) Name() string { return s.opts.Name }

// Running reports whether the server runs, isolated or not.
func (s *Server) Running() bool {
	ns := s.running.Load()
	return ns != nil && ns.Running()
}

// Stop shuts the server down properly: it hands over what it leads and flushes
// what it has to send. It returns when the server is down.
func (s *Server) Stop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.shutdown()
}

// Kill ends the server as SIGKILL would, seen from outside: its connections are
// reset in mid-air and nobody hears a goodbye. That needs Proxied; otherwise Kill
// is Stop. It returns when the server is down.
func (s *Server) Kill() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.killed.Store(true)
	s.settle()
	s.shutdown()
}

// LameDuck makes the server evict its clients over about a second, after it has
// told them and handed over what it leads, and then stop. It returns when the
// server is down.
func (s *Server) LameDuck() {
	if ns := s.running.Load(); ns != nil {
		ns.LameDuckShutdown()
		ns.WaitForShutdown()
	}
}

// Restart starts a server that is down, on its old ports and with its old store.
// It returns once the server accepts clients.
func (s *Server) Restart() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.Running() {
		return fmt.Errorf("restart NATS server %s: it runs", s.opts.Name)
	}
	s.shutdown() // wait for the end of a lame duck
	if s.opts.Memory {
		if err := os.RemoveAll(s.dir); err != nil {
			return err
		}
	}
	s.killed.Store(false)
	s.settle()
	return s.start()
}

// Isolate holds all bytes between the server and its clients and peers, and
// closes nothing: the unfriendly network fault. It panics if not Proxied.
func (s *Server) Isolate() { s.setIsolated(true) }

// Heal undoes Isolate. What was held is delivered.
func (s *Server) Heal() { s.setIsolated(false) }

func (s *Server) setIsolated(isolated bool) {
	if s.front == nil {
		panic("testenv: only a Proxied server can be isolated")
	}
	s.isolated.Store(isolated)
	s.settle()
}

// Close stops the server and removes its store.
func (s *Server) Close() {
	s.Stop()
	for _, l := range s.links {
		l.Close()
	}
	os.RemoveAll(s.dir)
}

func (s *Server) shutdown() {
	if ns := s.running.Load(); ns != nil {
		ns.Shutdown()
		ns.WaitForShutdown()
	}
}

func (s *Server) settle() {
	for _, l := range s.links {
		l.settle()
	}
}

// start runs a server and waits until it listens.
func (s *Server) start() error {
	o := s.options()
	ns, err := server.NewServer(o) // completes o
	if err != nil {
		return fmt.Errorf("start NATS server %s: %w", s.opts.Name, err)
	}
	if s.opts.Detector != nil {
		ns.SetLoggerV2(newTap(s.opts.Detector), false, true, false)
	}
	s.perPeer.Store(int32(max(o.Cluster.PoolSize, 1) + len(o.Cluster.PinnedAccounts))) //nolint:gosec // a handful
	s.running.Store(ns)
	go ns.Start() // returns once everything listens
	if !ns.ReadyForConnections(startTimeout) {
		s.shutdown()
		return fmt.Errorf("start NATS server %s: not ready after %v", s.opts.Name, startTimeout)
	}
	return nil
}

func (s *Server) options() *server.Options {
	o := &server.Options{
		ServerName:          s.opts.Name,
		Host:                "127.0.0.1",
		Port:                s.port,
		NoLog:               true,
		NoSigs:              true,
		JetStream:           true,
		JetStreamMaxMemory:  1 << 30,
		JetStreamMaxStore:   1 << 30,
		StoreDir:            s.dir,
		WriteDeadline:       2 * time.Second, // this and the next two: architecture.md, NATS
		NoFastProducerStall: true,
		PingInterval:        5 * time.Second,
		LameDuckGracePeriod: lameDuckGrace,
		LameDuckDuration:    lameDuckDuration,
	}
	if s.cluster != "" {
		o.Cluster = server.ClusterOpts{
			Name:        s.cluster,
			Host:        "127.0.0.1",
			Port:        s.route,
			Advertise:   s.advertise,
			NoAdvertise: true, // a client knows the URLs it was given, and no way around a fault
		}
		o.Routes = s.peers
	}
	if s.opts.Configure != nil {
		s.opts.Configure(o)
	}
	return o
}

// link is a proxy that leads to a server, from clients or from another server.
// It follows the state of the servers at its ends.
type link struct {
	*Proxy
	ends []*Server
	mu   sync.Mutex // held by settle, so that the latest state is applied last
}

// newLink returns a link to target and adds it to the links of its ends.
func newLink(target string, ends ...*Server) (*link, error) {
	p, err := NewProxy(target)
	if err != nil {
		return nil, err
	}
	l := &link{Proxy: p, ends: ends}
	for _, s := range ends {
		s.links = append(s.links, l)
	}
	return l, nil
}

func (l *link) settle() {
	l.mu.Lock()
	defer l.mu.Unlock()
	var killed, isolated bool
	for _, s := range l.ends {
		killed = killed || s.killed.Load()
		isolated = isolated || s.isolated.Load()
	}
	if killed {
		l.Refuse()
		l.Cut()
	} else {
		l.Accept()
	}
	if isolated {
		l.Hold()
	} else {
		l.Resume()
	}
}

var portCursor atomic.Uint32

func init() { portCursor.Store(rand.Uint32N(lastPort - firstPort)) } //nolint:gosec // no secret

// freePort returns a port that nobody listens on, and never the same one twice.
func freePort() (int, error) {
	for range 1000 {
		port := firstPort + int(portCursor.Add(1)%(lastPort-firstPort))
		if ln, err := net.Listen("tcp", loopback(port)); err == nil {
			return port, ln.Close()
		}
	}
	return 0, errors.New("no free port on 127.0.0.1")
}

func loopback(port int) string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(port)) }
