package gateway

import (
	"net/netip"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Config is what the operator decides about sockets. The zero value of a field
// means its default, unless it says otherwise.
type Config struct {
	Version string // of this program, for /healthz

	// MaxFrameBytes is the longest message of a peer, fragments summed. Default
	// 262,144.
	MaxFrameBytes int
	// NoToken keeps the phones' tokens from the binaries. Default: each is handed
	// over once.
	NoToken bool
	// MaxConnections of this node, upgrades under way included. 0: no limit.
	MaxConnections int
	// UpgradeInterval and UpgradeBurst bound the upgrades of one address. Defaults
	// 6 s and 20; a burst below 0 means no limit.
	UpgradeInterval time.Duration
	UpgradeBurst    int
	// TrustedProxies may say who the client is, in X-Forwarded-For.
	TrustedProxies []netip.Prefix
	// PingInterval between pings to every peer, and PongTimeout for the answer, which
	// is rounded up to a thirtieth of PingInterval, and is three of these at least.
	// Default 30 s each.
	PingInterval, PongTimeout time.Duration
	// WriteTimeout for one write to a peer: a message, or some that are small. Default
	// 10 s.
	WriteTimeout time.Duration
	// MessageTimeout for a peer to finish a message that it has begun. Default
	// 30 s.
	MessageTimeout time.Duration
	// Metrics is where this gateway's metrics are registered, once: two gateways
	// cannot share it. Default: nowhere.
	Metrics prometheus.Registerer
}

func (c Config) withDefaults() Config {
	def := func(d *time.Duration, v time.Duration) {
		if *d <= 0 {
			*d = v
		}
	}
	def(&c.UpgradeInterval, 6*time.Second)
	def(&c.PingInterval, 30*time.Second)
	def(&c.PongTimeout, 30*time.Second)
	def(&c.WriteTimeout, 10*time.Second)
	def(&c.MessageTimeout, 30*time.Second)
	if c.UpgradeBurst == 0 {
		c.UpgradeBurst = 20
	}
	if c.MaxFrameBytes <= 0 {
		c.MaxFrameBytes = 256 << 10
	}
	return c
}

const (
	// readBuffer and writeBuffer are the library's bufio sizes in bytes, which every
	// connection has: room for a header, and for a close frame. What a system call
	// reads or writes is in larger buffers, which only busy connections have.
	readBuffer  = 64
	writeBuffer = 128

	// ownReadBuffer replaces readBuffer for a connection that is not plain TCP, and so
	// cannot share the larger ones.
	ownReadBuffer = 1 << 10

	// readSize is how many bytes one system call may read.
	readSize = 64 << 10

	// controlFrame is the length of the longest control frame (RFC 6455, 5.5).
	controlFrame = 2 + 125

	// backlogSlack is added, for each phone that a server-id may have, to what its
	// link may carry: the envelope and its token.
	backlogSlack = 64 << 10

	// noticeRoom is what the relay's own messages may take beyond that: close notices
	// of phones that came and went while their binary read nothing.
	noticeRoom = 1 << 20

	// batchSize is how many bytes leave in one write, if they are there: a hundred
	// small frames. A peer that takes nothing holds as many for its write deadline.
	batchSize = 32 << 10

	// messageOverhead is added to a message's length where queued bytes are counted.
	messageOverhead = 64

	// closeTimeout bounds what the library does to close: 5 s to write its frame, 5 s
	// for the peer's.
	closeTimeout = 11 * time.Second

	// dropPatience is how long a peer whose connection is dropped has to read what
	// was written last.
	dropPatience = time.Second

	// socketBuffer is how many bytes the kernel may hold for a peer, and from it: a
	// window, 2.5 MB/s over a round trip of 100 ms.
	socketBuffer = 256 << 10

	// usualMessage is how many bytes a peer's first message is expected to have.
	usualMessage = 300

	// stallTime is from when on the handling of a message counts as a pause of
	// reading: passing it on takes microseconds, waiting for credit much longer.
	stallTime = 10 * time.Millisecond

	// heartbeatSlots divide PingInterval: each tick pings the connections of one
	// slot, so that pings are spread and no connection has a timer of its own.
	heartbeatSlots = 30

	// thawTicks is how many ticks of the heartbeat a pong that is late has to be read
	// in, after a process that was stopped (SIGCONT, a machine that was paused) goes on.
	thawTicks = 2

	// parkTime is how long a binary that was just upgraded is kept at least although
	// the relay could not decide: closed at once, it would redial at once.
	parkTime = time.Second

	// claimBurst claims of one server-id pass at once on one node, and then one per
	// claimInterval. A binary whose connection flaps stays far below.
	claimBurst    = 30
	claimInterval = time.Second
	// contentionLog is how often a fight for one server-id is logged.
	contentionLog = time.Minute

	// earlyOverhead is added to the length of each message that waits for a claim to
	// be decided, so that a flood of tiny ones is bounded too.
	earlyOverhead = 64

	// retryAfter is what a 503 asks for, in seconds.
	retryAfter = 2

	// drainBatch connections are closed every drainPause when the gateway drains, or
	// more if that would take longer than drainSteps pauses: the others do not meet
	// all of them in one instant.
	drainBatch = 200
	drainPause = 50 * time.Millisecond
	drainSteps = 60
	// dropTime is what connections that were dropped have to clean up.
	dropTime = time.Second
)

// Option adds to a Gateway.
type Option func(*Gateway)

// WithConfig sets what the operator decides.
func WithConfig(c Config) Option { return func(g *Gateway) { g.cfg = c } }
