package bus

import "time"

// Every number of this room, with its unit and its reason.
const (
	// frameOverhead is added to a frame's length wherever bytes are counted, so
	// that a flood of tiny frames is bounded like one of large frames.
	frameOverhead = 64

	// ackDelay lets an ack ride on data that goes back.
	ackDelay = 20 * time.Millisecond

	// probeInterval is how long DATA stays unacknowledged before the sender asks
	// how far the receiver is. Far above the worst round trip between regions plus
	// ackDelay, so that a healthy link is never asked.
	probeInterval = time.Second

	// lossBurst is how many bytes a link sends again at once after a loss: a few
	// small frames, or one large one. It doubles with each ack.
	lossBurst = 4 << 10

	// thawGap is how overdue a probe must be for its link to conclude that nobody has
	// looked at the clock: the process was stopped.
	thawGap = 2 * probeInterval

	// idleAsks is how often an idle link asks, probeInterval apart, whether its other
	// end is still there after the NATS connection was lost: the new connection's
	// interest may take a moment to be known everywhere.
	idleAsks = 3

	// tickInterval is how often links that wait for something are looked at. An
	// idle link waits for nothing and is not looked at.
	tickInterval = 20 * time.Millisecond

	// resetTries bounds how often a RESET is repeated, one probeInterval apart: a
	// node that is silent for so long has been found dead by its lease.
	resetTries = 60

	// holdTimeout is how long a phone's first frame waits for a binary that is away:
	// well under the 10 s that a phone waits for its first answer.
	//                                          (protocol.md: Life of a claim, 3)
	holdTimeout = 8 * time.Second

	// pauseTimeout is how long Send may block: nothing of a phone's socket is read
	// meanwhile, its pings neither, and shipped phones wait 20 and 30 s for a pong.
	pauseTimeout = 15 * time.Second

	// pumpBatch is how many bytes one link may publish before the next has its
	// turn, so that 4 MiB for one phone do not delay 200 bytes for another.
	pumpBatch = 64 << 10

	// maxPart is the largest frame that is joined with others in one message, and
	// maxJoined bounds that message with its header: small beside a turn, and each frame
	// is copied once more on either side.
	maxPart   = 4 << 10
	maxJoined = 16 << 10

	// openTimeout bounds one OPEN request; an answer on a LAN takes 0.2 ms, and a
	// round trip between regions a few hundred.
	openTimeout = time.Second

	// helloTimeout is how long a node has to say that it is there. A HELLO right
	// after a node's death may be swallowed without an answer, and a claim that waits
	// for it must stay well under a second.
	helloTimeout = 400 * time.Millisecond

	// subscriptionMessages and subscriptionBytes bound what waits between the NATS
	// connection and the dispatch goroutine, which never blocks: room for the
	// windows of a thousand busy links. Over it NATS drops, and links retransmit.
	subscriptionMessages = 1 << 20
	subscriptionBytes    = 256 << 20
)

// The NATS connection.            (architecture.md: NATS; nats-measured.md 2.6)
const (
	reconnectWait   = 100 * time.Millisecond
	reconnectJitter = 100 * time.Millisecond
	// A dead path is noticed after natsPingInterval × (natsPings + 1): the default
	// of 2 minutes × 3 would be longer than any lease.
	natsPingInterval = 3 * time.Second
	natsPings        = 2
	natsDialTimeout  = 2 * time.Second
	natsFlushTimeout = time.Second
	// jsTimeout bounds a JetStream call whose context has no deadline.
	jsTimeout = 2 * time.Second

	// embeddedReady bounds the embedded server's start; it takes 5 ms.
	embeddedReady = 10 * time.Second
	// embeddedPoll is how often its start is asked whether it has failed.
	embeddedPoll = 100 * time.Millisecond
	// embeddedMemory and embeddedStore bound the embedded server's JetStream: an
	// entry takes 0.6 KB, so a million binaries fit.
	embeddedMemory = 1 << 30
	embeddedStore  = 4 << 30
	// embeddedMaxPayload is NATS' default: the largest frame, its envelope and
	// Headroom fit.
	embeddedMaxPayload = 1 << 20
)

// Config is what the operator decides about links. The zero value of a field
// means its default.
type Config struct {
	// Window is how many bytes one direction of a link may have on the way, plus
	// one frame. Default 256 KiB: costs nothing on a LAN (nats-measured.md 1.6).
	Window int
	// Backlog is how many bytes may wait for one phone before its link is ended
	// with ErrBacklog. Default 4 MiB.
	Backlog int
	// TotalBacklog is how many bytes may wait for all phones together before only a
	// window may wait for each. Default 1 GiB.
	TotalBacklog int
	// LinkTimeout is how long data may stay unacknowledged, twice as long while frames
	// of the other end come. Default 10 s.
	LinkTimeout time.Duration
}

func (c Config) withDefaults() Config {
	if c.Window <= 0 {
		c.Window = 256 << 10
	}
	if c.Backlog <= 0 {
		c.Backlog = 4 << 20
	}
	if c.TotalBacklog <= 0 {
		c.TotalBacklog = 1 << 30
	}
	if c.LinkTimeout <= 0 {
		c.LinkTimeout = 10 * time.Second
	}
	return c
}
