package registry

import "time"

// Config is what the operator decides. The zero value of a field means its
// default.
type Config struct {
	Region  string // labels the node; no effect on decisions
	Version string // of this program, published with the lease

	// KVPrefix starts the buckets' names. Default pyrycode_relay.
	KVPrefix string
	// KVReplicas of the buckets when this node creates them. Default: 3 where the
	// cluster has three servers or more, else 1.
	KVReplicas int
	// Memory keeps the buckets in memory when this node creates them.
	Memory bool

	// LeaseTTL is how long a node that is not heard of counts as alive. Default
	// 20 s: the measured worst election (9 s) plus a renewal period fit into three
	// quarters of it.
	LeaseTTL time.Duration
	// Grace is how long a server-id stays claimed after its binary's connection
	// ended, in whole seconds (NATS truncates). Default 30 s.
	Grace time.Duration
	// ProbeTimeout is how long an incumbent has to answer a ping. Default 10 s.
	ProbeTimeout time.Duration
	// MaxPhones of one server-id over the whole cluster. Default 16.
	MaxPhones int
}

func (c Config) withDefaults() Config {
	def := func(d *time.Duration, v time.Duration) {
		if *d <= 0 {
			*d = v
		}
	}
	def(&c.LeaseTTL, 20*time.Second)
	def(&c.Grace, 30*time.Second)
	def(&c.ProbeTimeout, 10*time.Second)
	if c.KVPrefix == "" {
		c.KVPrefix = "pyrycode_relay"
	}
	if c.MaxPhones <= 0 {
		c.MaxPhones = 16
	}
	return c
}

// renewEvery is how often a node renews its lease.
func (c Config) renewEvery() time.Duration { return c.LeaseTTL / 5 }

// freshFor is how long a node may decide after its last acknowledged renewal.
func (c Config) freshFor() time.Duration { return c.LeaseTTL * 3 / 4 }

const (
	// decideTimeout bounds a claim without a probe, and a look-up: every upgrade is
	// answered within 5 s. A look-up needs deadAfter and a little, to find the holder
	// and to ask its node for the last time.
	decideTimeout = 4500 * time.Millisecond
	// parkTimeout bounds a claim that is parked after its 101 for another reason than
	// a probe under way.                               (protocol.md: Close codes)
	parkTimeout = 10 * time.Second
	// probeEvery is how long claims on one holding gather for one ping.
	probeEvery = 100 * time.Millisecond
	// answerTime is what the holder's node has beyond ProbeTimeout to say how the
	// probe went.
	answerTime = 500 * time.Millisecond
	// kvTimeout bounds one KV call, so that a slow replica leaves time for another.
	kvTimeout = 1500 * time.Millisecond
	// retryWait and retryWaitMax pace attempts that met an unknown outcome.
	retryWait    = 50 * time.Millisecond
	retryWaitMax = 400 * time.Millisecond

	// dropTimeout bounds giving the lease back: a drain ends within its time, and the
	// lease ends by itself.
	dropTimeout = 500 * time.Millisecond
	// leaseRetry is how soon a renewal that failed is tried again.
	leaseRetry = 500 * time.Millisecond
	// renewWait is how long those gather who want the lease renewed at once.
	renewWait = 100 * time.Millisecond

	// deadCheckWait lies between the two times that a claim must hear "no
	// responders" before it takes the holder's node for dead.
	deadCheckWait = 250 * time.Millisecond
	// deadAfter is how long a node must be without responders, unbroken, before
	// phones are told so: a living node that changes its NATS server is away for
	// less.
	deadAfter = 4 * time.Second
	// watchEvery and suspectEvery are how often a node that links lead to is asked
	// whether it is there, before and while it is silent. Phones of a node that was
	// killed are told within 5 s: after watchEvery + helloTimeout of the bus (400 ms; the
	// first HELLO may be swallowed) + deadAfter + suspectEvery = 4.8 s at most.
	watchEvery   = 300 * time.Millisecond
	suspectEvery = 100 * time.Millisecond

	// sweepEvery is how often this node compares what it holds with the KV.
	sweepEvery = 5 * time.Second
	// fullSweepEvery is how many sweeps it takes until one compares everything although
	// the KV seems to be what it was.
	fullSweepEvery = 120
	// sweepPause lies between two sweeps: what asks for one may come in crowds.
	sweepPause = 250 * time.Millisecond
	// sweepWorkers bounds the KV calls under way in a sweep.
	sweepWorkers = 16
	// checkTries is how often a check tries again when the entry changes under it.
	checkTries = 5
	// pageSize is how many keys a sweep reads at once, and pageWait lies between two reads:
	// they are not to stand in front of every frame. Where each takes farRead, as between
	// regions, it is farPage: JetStream answers at most 1,024.
	pageSize = 100
	pageWait = time.Millisecond
	farRead  = 50 * time.Millisecond
	farPage  = 1000
	// reapTime is how long a sweep looks for entries of dead nodes; the next one goes on.
	reapTime = 2 * time.Second
	// orphanFor is how long an entry that may have been left is looked for: a write
	// that timed out may be committed once a new leader is there.
	orphanFor = 30 * time.Second
	// markerTTL is how long the KV keeps the marker of a key that ended.
	markerTTL = time.Minute
)
