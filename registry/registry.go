package registry

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/pyrycode/pyrycode-relay/bus"
)

// Conn is a connection as the registry sees it. ConnID is unique; Send queues one
// message and does not block; Close ends the connection.
type Conn interface {
	ConnID() string
	Send([]byte) error
	Close()
}

// Registry says who holds whom: over the cluster through the KV, and for this
// node through its tables. All methods may be called concurrently.
type Registry struct {
	// Static after New.
	bus      *bus.Bus
	cfg      Config
	log      *slog.Logger
	nodes    kv
	presence kv

	lease    lease
	renewNow chan struct{}
	sweepNow chan struct{}
	tasks    sync.WaitGroup
	ctx      context.Context // ends with the registry; for what outlives a call
	cancel   context.CancelFunc

	graceExpiries atomic.Uint64
	// A claim had better look before it writes: the latest one found an entry in its way that
	// nobody is behind, and after a node's death all do.
	lookFirst atomic.Bool

	// Guarded by mu, which is never held across a call of bus, a connection or the
	// KV. Lock order: mu comes last.
	mu       sync.Mutex
	current  map[string]*holding          // by server-id: what this node holds, or held and keeps in grace
	sessions map[bus.SessionID]*holding   // these, and claims under way
	phones   map[string]map[string]*phone // by server-id and conn id: phones attached through this node
	// What claims want to know about other nodes, and what is being asked.
	nextAsking, nowAsking map[bus.NodeID]*asking
	orphans               map[bus.SessionID]orphan // entries that this node may have left in the KV
	trouble               troubleState
	stopped               bool // nothing is spawned any more

	// Owned by sweepLoop.
	known   map[bus.NodeID]nodeEntry // nodes that had a lease at the latest sweep
	sweeps  uint64                   // so far
	settled version                  // of the presence bucket when it agreed with all holdings; zero: that is not known
	reapAt  time.Time                // when entries of dead nodes are to be looked for; zero: there are none
	reaping scan                     // for them
}

// orphan is an entry to remove: a claim whose outcome was unknown, or a grace
// that ended while the KV did not answer.
type orphan struct {
	serverID string
	until    time.Time // it is looked for
}

// New returns the registry of the node of b, with its buckets on the NATS
// connection of b. It starts nothing.
func New(b *bus.Bus, cfg Config, log *slog.Logger) *Registry {
	cfg = cfg.withDefaults()
	storage := jetstream.FileStorage
	if cfg.Memory {
		storage = jetstream.MemoryStorage
	}
	bucketOf := func(name string, ttl time.Duration) *bucket {
		return &bucket{conn: b.Conn(), name: cfg.KVPrefix + name, ttl: ttl, storage: storage, replicas: cfg.KVReplicas}
	}
	return newOver(b, cfg, log, bucketOf("_nodes", cfg.LeaseTTL), bucketOf("_presence", 0))
}

func newOver(b *bus.Bus, cfg Config, log *slog.Logger, nodes, presence kv) *Registry {
	ctx, cancel := context.WithCancel(context.Background())
	return &Registry{
		bus: b, cfg: cfg, nodes: nodes, presence: presence, log: bus.EventLogger(log),
		renewNow: make(chan struct{}, 1), sweepNow: make(chan struct{}, 1),
		ctx: ctx, cancel: cancel,
		current:    make(map[string]*holding),
		sessions:   make(map[bus.SessionID]*holding),
		phones:     make(map[string]map[string]*phone),
		nextAsking: make(map[bus.NodeID]*asking), nowAsking: make(map[bus.NodeID]*asking),
		orphans: make(map[bus.SessionID]orphan),
		reapAt:  time.Now(), // whoever ran here before may have left entries
	}
}

// Bus is what the registry's links run over.
func (r *Registry) Bus() *bus.Bus { return r.bus }

// Grace is how long a server-id stays claimed without a connection.
func (r *Registry) Grace() time.Duration { return r.cfg.Grace }

// ProbeTimeout is how long an incumbent has to answer a ping.
func (r *Registry) ProbeTimeout() time.Duration { return r.cfg.ProbeTimeout }

// MaxPhones is how many phones a server-id may have.
func (r *Registry) MaxPhones() int { return r.cfg.MaxPhones }

// Region labels this node.
func (r *Registry) Region() string { return r.cfg.Region }

// GraceExpiries counts the grace windows of this node that ended without a
// binary.
func (r *Registry) GraceExpiries() uint64 { return r.graceExpiries.Load() }

// Start subscribes this node and begins to keep its lease. It returns at once;
// Ready tells when the node can decide. Stop ends what it started.
func (r *Registry) Start() error {
	if err := r.bus.Start(r); err != nil {
		return err
	}
	r.bus.OnDisturbed(r.doubt) // it was not told what happened meanwhile
	r.tasks.Go(func() { r.leaseLoop(r.ctx) })
	r.tasks.Go(func() { r.sweepLoop(r.ctx) })
	r.tasks.Go(func() { r.watchLoop(r.ctx) })
	return nil
}

// Drain makes Ready fail and tells the other nodes that this one is leaving.
func (r *Registry) Drain() {
	r.lease.mu.Lock()
	r.lease.draining = true
	r.lease.mu.Unlock()
	nudge(r.renewNow)
}

// Stop ends the links that lead to binaries of this node, so that their phones
// look elsewhere, gives the lease back and ends what Start started. Connections
// have been released by then. It returns when all that is done or ctx ends.
func (r *Registry) Stop(ctx context.Context) {
	r.mu.Lock()
	r.stopped = true
	left := make([]*holding, 0, len(r.current))
	for _, h := range r.current {
		left = append(left, h)
	}
	r.mu.Unlock()
	for _, h := range left {
		r.endHolding(h, bus.ErrNodeGone)
	}
	r.cancel()
	r.tasks.Wait()
	r.dropLease(ctx)
	r.bus.Close()
}

// dropLease gives the lease back, so that nobody waits for its end. A NATS that is
// silent holds it up for dropTimeout.
func (r *Registry) dropLease(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, dropTimeout)
	defer cancel()
	r.lease.mu.Lock()
	rev := r.lease.revision
	r.lease.mu.Unlock()
	if rev == 0 {
		return
	}
	key := string(r.bus.Node())
	err := r.nodes.remove(ctx, key, rev)
	for errors.Is(err, errUnknown) && pause(ctx, retryWait) { // the bucket may have no leader for a moment
		err = r.nodes.remove(ctx, key, rev)
	}
	if errors.Is(err, errLost) { // to a renewal that Stop has cut short, or to the first try
		var there record
		if there, err = r.nodes.getLeader(ctx, key); err == nil && there.exists {
			err = r.nodes.remove(ctx, key, there.revision)
		}
	}
	if err != nil {
		r.log.Debug("lease_not_removed", "error", err.Error()) // it ends by itself
	}
}

// createBuckets makes the buckets where they are missing, and notes if one does not
// fit this node.
func (r *Registry) createBuckets(ctx context.Context) error {
	if !r.bus.Connected() {
		return errors.New("not connected to NATS")
	}
	for _, b := range []kv{r.nodes, r.presence} {
		ctx, cancel := context.WithTimeout(ctx, kvTimeout) // some requests are never answered when several nodes create at once
		err := b.create(ctx)
		cancel()
		if errors.Is(err, errMisfit) {
			r.setMisfit(err)
		}
		if err != nil {
			return err
		}
	}
	r.setMisfit(nil)
	return nil
}

func (r *Registry) setMisfit(err error) {
	r.lease.mu.Lock()
	defer r.lease.mu.Unlock()
	r.lease.misfit = err
}

// PhonesFor returns the phones of serverID that are attached through this node.
func (r *Registry) PhonesFor(serverID string) []Conn {
	r.mu.Lock()
	defer r.mu.Unlock()
	conns := make([]Conn, 0, len(r.phones[serverID]))
	for _, p := range r.phones[serverID] {
		conns = append(conns, p.conn)
	}
	return conns
}

// spawn runs f on a goroutine that Stop waits for, unless Stop has begun.
func (r *Registry) spawn(f func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.stopped {
		r.tasks.Go(f)
	}
}

func nudge(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// drain takes back a nudge that what follows answers anyway.
func drain(c chan struct{}) {
	select {
	case <-c:
	default:
	}
}

// troubleState keeps a lasting trouble from being logged at every attempt.
type troubleState struct{ logged, loggedStale bool }

// troubleOnce reports whether trouble of this kind has not been logged yet.
func (r *Registry) troubleOnce(stale bool) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	first := !r.trouble.logged || stale && !r.trouble.loggedStale
	r.trouble.logged, r.trouble.loggedStale = true, r.trouble.loggedStale || stale
	return first
}

func (r *Registry) troubleOver() {
	r.mu.Lock()
	was := r.trouble
	r.trouble = troubleState{}
	r.mu.Unlock()
	if was.logged {
		r.log.Info("lease_renewed")
	}
}
