package bus

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
)

// Handler is the authority that a Bus asks: the registry. Open, Ended, Moved and
// Taken run on the dispatch goroutine or on a connection's and must not block.
type Handler interface {
	// Open decides whether l, the binary's end of a link that a phone asks for,
	// may attach to the session it names. With grace the binary is away and no
	// frame may come yet. The error is one of errors.go.
	Open(l *Link) (recv Receiver, grace bool, err error)
	// Ended tells, once for each link that Open let in, that it has ended.
	Ended(l *Link)
	// Moved tells that l has lost its session and waits to be opened again.
	Moved(l *Link)
	// Alive reports whether this node holds session and its binary answers a ping
	// sent now. It may block until ctx ends.
	Alive(ctx context.Context, serverID string, session SessionID) bool
	// Taken tells that the KV names another session for serverID now.
	Taken(serverID string, session SessionID)
}

// Bus moves messages between this node and the others. All methods may be called
// concurrently.
type Bus struct {
	// Static after Start.
	node     NodeID
	cfg      Config
	versions Versions // that this node speaks
	conn     *Conn    // nil over another transport
	net      Transport
	log      *slog.Logger
	handler  Handler
	silence  func() // ends the subscription

	mu    sync.RWMutex
	links map[linkKey]linkEntry
	nodes map[NodeID]int // how many links lead to each other node

	// What the pump goroutine does next. Guarded by pumpMu.
	pumpMu  sync.Mutex
	ready   []*Link
	replies []envelope
	timed   map[*Link]struct{}
	wake    chan struct{}

	// Slices that the pump goroutine uses again, the first two empty. Owned by it.
	idle, ticked []*Link
	joined       []byte // a message of several frames

	ctx    context.Context // ends with the bus
	cancel context.CancelFunc
	tasks  sync.WaitGroup // one for each CHALLENGE

	stop     chan struct{} // ends pumpLoop, after the tasks
	stopPump func()
	pump     sync.WaitGroup

	backlog     atomic.Int64 // bytes that wait for phones, of all links
	malformed   atomic.Uint64
	unpublished atomic.Uint64
}

// Transport carries messages between nodes. Messages from one node to another
// arrive in the order of their publishing, or not at all. All methods may be called
// concurrently. Conn is the one in use; simulations have their own.
type Transport interface {
	// Subscribe calls f for each message to subject, one at a time, until stop has
	// returned.
	Subscribe(subject string, f func(*nats.Msg)) (stop func(), err error)
	// Publish sends a copy of data and does not wait. An error means that it is lost,
	// nil means nothing. replyTo may be empty.
	Publish(subject, replyTo string, data []byte) error
	// Request sends data and waits for an answer. The error is ErrNoResponders if
	// nobody subscribes to subject, a context error, or another.
	Request(ctx context.Context, subject string, data []byte) (*nats.Msg, error)
	// Connected reports whether messages can go out, as far as is known. It does not
	// block.
	Connected() bool
	// OnDisturbed has f called after messages may have been lost: when the connection is
	// back, before Connected says so.
	OnDisturbed(f func())
}

// envelope is a message with its address.
type envelope struct {
	subject string
	m       Message
}

// New returns the bus of node over conn. It starts nothing.
func New(conn *Conn, node NodeID, cfg Config, log *slog.Logger) *Bus {
	b := NewOver(conn, node, cfg, log)
	b.conn = conn
	return b
}

// NewOver returns the bus of node over a transport that is no NATS connection.
func NewOver(net Transport, node NodeID, cfg Config, log *slog.Logger) *Bus {
	ctx, cancel := context.WithCancel(context.Background())
	stop := make(chan struct{})
	return &Bus{
		node: node, cfg: cfg.withDefaults(), versions: spoken, net: net, log: EventLogger(log),
		links: make(map[linkKey]linkEntry),
		nodes: make(map[NodeID]int),
		timed: make(map[*Link]struct{}),
		wake:  make(chan struct{}, 1), joined: make([]byte, maxJoined),
		ctx: ctx, cancel: cancel,
		stop: stop, stopPump: sync.OnceFunc(func() { close(stop) }),
	}
}

// Node is this node's id.
func (b *Bus) Node() NodeID { return b.node }

// Conn is the NATS connection of the bus; nil if it runs over another transport.
func (b *Bus) Conn() *Conn { return b.conn }

// Versions are those of the link protocol that this node speaks.
func (b *Bus) Versions() Versions { return b.versions }

// Connected reports whether the transport is up.
func (b *Bus) Connected() bool { return b.net.Connected() }

// OnDisturbed has f called after messages may have been lost. f must not block.
func (b *Bus) OnDisturbed(f func()) { b.net.OnDisturbed(f) }

// Window is the link window in bytes, and how much a phone's frames may take
// while they wait for a binary that is away.
func (b *Bus) Window() int { return b.cfg.Window }

// Malformed is how many messages could not have come from a relay.
func (b *Bus) Malformed() uint64 { return b.malformed.Load() }

// Unpublished is how many messages NATS did not take, because the connection to
// it was down.
func (b *Bus) Unpublished() uint64 { return b.unpublished.Load() }

// Start subscribes to this node's subject and returns when the subscription is
// on its way to the server: from then on h is asked. Close ends what it started.
func (b *Bus) Start(h Handler) error {
	b.handler = h
	silence, err := b.net.Subscribe(nodeWildcard(b.node), b.dispatch)
	if err != nil {
		return fmt.Errorf("subscribe for node %s: %w", b.node, err)
	}
	b.silence = silence
	b.net.OnDisturbed(b.ProbeAll)
	b.pump.Go(b.pumpLoop)
	return nil
}

// Close ends the bus: the subscription, the pump, whatever waits for a ping, and
// every link that is left, with ErrLinkLost on this side. It sends what links
// have to say before, and does not close the NATS connection.
func (b *Bus) Close() {
	if b.silence != nil {
		b.silence()
	}
	b.cancel()
	b.tasks.Wait()
	b.stopPump()
	b.pump.Wait()
	for _, l := range b.linksTo(func(NodeID) bool { return true }) {
		l.forget(ErrLinkLost)
	}
}

// NewLink returns the phone's end of a link that is not bound yet: frames may
// be queued, none goes out before Open succeeds.
func (b *Bus) NewLink(serverID, connID string, recv Receiver) *Link {
	return b.newLink(phoneSide, serverID, connID, recv)
}

func (b *Bus) newLink(s side, serverID, connID string, recv Receiver) *Link {
	l := &Link{
		bus: b, side: s, recv: recv,
		serverID: serverID, token: EncodeToken(serverID), connID: connID,
		st: newLinkState(b.cfg),
	}
	l.writable.L = &l.mu
	return l
}

// Open binds l to session on node and asks the holder there, which may be this
// node. Errors: those of Handler.Open; ErrNoResponders; ErrClosed when l has
// ended meanwhile; a context error when no answer came, and then the holder may
// have accepted: it is told, or gives the link up by itself. After an error other
// than ErrClosed l may be opened again.
func (b *Bus) Open(ctx context.Context, l *Link, node NodeID, session SessionID) error {
	l.mu.Lock()
	if l.ended || l.bound {
		l.mu.Unlock()
		return ErrClosed
	}
	l.bindLocked(newLinkID(), node, session, topicServer)
	l.attempt++
	b.register(l.key(), l, node)
	m := Message{
		Kind: KindOpen, Link: l.id, Session: session, Seq: b.versions.offer(), Ack: l.attempt,
		Credit: l.st.granted, Payload: joinOpen(b.node, l.connID),
	}
	subject := l.subject
	l.mu.Unlock()

	answer, peer, err := b.askToOpen(ctx, l, subject, m)
	if err == nil && answer.Kind == KindRefuse {
		err = errorOf(answer.Reason, answer.Payload)
	}
	l.mu.Lock()
	ended := l.ended
	if err != nil {
		l.unbindLocked()
		l.mu.Unlock()
		if ended {
			return ErrClosed
		}
		return err
	}
	l.peer, l.version = peer, uint8(answer.Seq) //nolint:gosec // accept: a version
	if answer.Reason != flagGrace {
		l.st.open(answer.Credit)
	}
	l.st.confirm(l.missed)
	l.mu.Unlock()
	l.start()
	if peer != nil {
		peer.start()
	}
	if ended {
		return ErrClosed
	}
	return nil
}

// askToOpen gets the answer to m, an OPEN for l: ACCEPT or REFUSE. peer is the
// other end if it is on this node; the caller starts it.
func (b *Bus) askToOpen(ctx context.Context, l *Link, subject string, m Message) (answer Message, peer *Link, err error) {
	if l.Node() == b.node {
		answer, peer = b.accept(l.token, m, b.node, l)
		return answer, peer, nil
	}
	ctx, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	answer, err = b.request(ctx, subject, m)
	switch {
	case err != nil, answer.Kind == KindRefuse:
	case answer.Kind != KindAccept:
		err = fmt.Errorf("%w: answer %s to OPEN", errMalformed, answer.Kind)
	case !b.versions.agrees(answer.Seq):
		err = fmt.Errorf("%w: ACCEPT with a version that was not offered", errMalformed)
	}
	if err != nil && !errors.Is(err, ErrNoResponders) {
		m.Kind, m.Reason, m.Payload = KindReset, reasonUnknown, nil
		b.publish(subject, "", &m, nil) // if it is lost, the holder's PROBE finds nothing here
	}
	return answer, nil, err
}

// accept answers an OPEN for the server-id of token, from a phone of node from.
// other is the phone's end if that is this node. l is the binary's end, nil if
// refused; the caller starts it when the phone's end has the answer.
func (b *Bus) accept(token string, m Message, from NodeID, other *Link) (answer Message, l *Link) {
	answer = Message{Kind: KindRefuse, Link: m.Link, Session: m.Session}
	serverID, err := DecodeToken(token)
	_, connID, ok := splitOpen(m.Payload)
	if err != nil || !ok {
		answer.Reason, _ = reasonOf(ErrNoSession)
		return answer, nil
	}
	v := b.versions.Common(offered(m.Seq))
	if v == 0 {
		answer.Reason, _ = reasonOf(ErrVersion)
		return answer, nil
	}
	l = b.newLink(binarySide, serverID, connID, nil)
	l.bindLocked(m.Link, from, m.Session, topicPhone)
	l.version, l.attempt = v, m.Ack
	l.peer = other
	recv, grace, err := b.handler.Open(l)
	if err != nil {
		answer.Reason, answer.Payload = reasonOf(err)
		return answer, nil
	}
	answer.Kind, answer.Seq = KindAccept, uint64(v)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.recv = recv
	l.st.open(m.Credit)
	if grace {
		l.st.granted, l.st.window = 0, 0
		answer.Reason = flagGrace
	}
	answer.Credit = l.st.granted
	l.st.await(time.Now()) // for the first message of the phone's end
	b.register(l.key(), l, from)
	return answer, l
}

// Hello asks whether node is there: nil, ErrNoResponders, or a context error.
func (b *Bus) Hello(ctx context.Context, node NodeID) error {
	if node == b.node {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, helloTimeout)
	defer cancel()
	_, err := b.request(ctx, nodeSubject(node), Message{Kind: KindHello})
	return err
}

// Challenge asks node whether the binary of session answers a ping sent after
// this call. It blocks for the probe there. Without an error alive is what that node
// says; errors as Hello, and whatever else it answers.
func (b *Bus) Challenge(ctx context.Context, node NodeID, serverID string, session SessionID) (alive bool, err error) {
	if node == b.node {
		alive = b.handler.Alive(ctx, serverID, session)
		if !alive {
			err = ctx.Err() // a probe that was cut short proves nothing
		}
		return alive, err
	}
	m, err := b.request(ctx, tokenSubject(node, topicClaim, EncodeToken(serverID)), Message{Kind: KindChallenge, Session: session})
	if err == nil && m.Kind != KindAlive && m.Kind != KindGone {
		err = fmt.Errorf("%w: answer %s to CHALLENGE", errMalformed, m.Kind)
	}
	return m.Kind == KindAlive, err
}

// Taken tells node that session has been replaced. It is a hint: nothing depends
// on its arrival.
func (b *Bus) Taken(node NodeID, serverID string, session SessionID) {
	if node == b.node {
		b.handler.Taken(serverID, session)
		return
	}
	b.reply(tokenSubject(node, topicClaim, EncodeToken(serverID)), Message{Kind: KindTaken, Session: session})
}

// request sends m to another node and waits for the answer.
func (b *Bus) request(ctx context.Context, subject string, m Message) (Message, error) {
	answer, err := b.net.Request(ctx, subject, m.encode())
	if err != nil {
		return Message{}, err
	}
	return decode(answer.Data, b.versions)
}

// LinkedNodes lists the other nodes that links of this one lead to.
func (b *Bus) LinkedNodes() []NodeID {
	b.mu.RLock()
	defer b.mu.RUnlock()
	return slices.Collect(maps.Keys(b.nodes))
}

// EndNode ends every link to node, which is dead, with ErrNodeGone.
func (b *Bus) EndNode(node NodeID) {
	for _, l := range b.linksTo(func(n NodeID) bool { return n == node }) {
		l.forget(ErrNodeGone)
	}
}

func (b *Bus) linksTo(want func(NodeID) bool) (links []*Link) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	for _, e := range b.links {
		if want(e.node) {
			links = append(links, e.link)
		}
	}
	return links
}

// linkEntry is a link in the table, with the node that it leads to.
type linkEntry struct {
	link *Link
	node NodeID
}

func (b *Bus) find(k linkKey) *Link {
	b.mu.RLock()
	defer b.mu.RUnlock()
	return b.links[k].link
}

func (b *Bus) register(k linkKey, l *Link, node NodeID) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.links[k] = linkEntry{l, node}
	if node != b.node {
		b.nodes[node]++
	}
}

func (b *Bus) unregister(k linkKey, l *Link) {
	b.mu.Lock()
	defer b.mu.Unlock()
	e := b.links[k]
	if e.link != l {
		return
	}
	delete(b.links, k)
	if e.node == b.node {
		return
	}
	if b.nodes[e.node]--; b.nodes[e.node] == 0 {
		delete(b.nodes, e.node)
	}
}

// remove takes a link that has nothing left to say off the table.
func (b *Bus) remove(l *Link) {
	l.mu.Lock()
	k := l.key()
	l.countLocked()
	l.mu.Unlock()
	b.unregister(k, l)
}

// backlogLimit is how many bytes may wait for one phone now.
func (b *Bus) backlogLimit() uint64 {
	if b.backlog.Load() > int64(b.cfg.TotalBacklog) {
		return uint64(b.cfg.Window) //nolint:gosec // positive
	}
	return uint64(b.cfg.Backlog) //nolint:gosec // positive
}

// Backlog is how many bytes wait for phones, of all links of this node.
func (b *Bus) Backlog() int64 { return b.backlog.Load() }

// ProbeAll makes every link to another node ask where its other end is, and an end
// that is the only one left end visibly. It runs after the NATS connection was
// disturbed; the registry calls it when nodes may have taken each other for dead.
func (b *Bus) ProbeAll() {
	now := time.Now()
	for _, l := range b.linksTo(func(n NodeID) bool { return n != b.node }) {
		l.probe(now)
	}
}
