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
	// Ended tells, once for each link that was opened, that it has ended.
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
	node    NodeID
	cfg     Config
	conn    *Conn
	log     *slog.Logger
	handler Handler
	sub     *nats.Subscription

	mu    sync.RWMutex
	links map[linkKey]linkEntry
	nodes map[NodeID]int // how many links lead to each other node

	// What the pump goroutine does next. Guarded by pumpMu.
	pumpMu  sync.Mutex
	ready   []*Link
	replies []envelope
	timed   map[*Link]struct{}
	wake    chan struct{}

	ctx    context.Context // ends with the bus
	cancel context.CancelFunc
	tasks  sync.WaitGroup

	malformed   atomic.Uint64
	unpublished atomic.Uint64
}

// envelope is a message with its address.
type envelope struct {
	subject string
	m       Message
}

// New returns the bus of node over conn. It starts nothing.
func New(conn *Conn, node NodeID, cfg Config, log *slog.Logger) *Bus {
	ctx, cancel := context.WithCancel(context.Background())
	return &Bus{
		node: node, cfg: cfg.withDefaults(), conn: conn, log: EventLogger(log),
		links: make(map[linkKey]linkEntry),
		nodes: make(map[NodeID]int),
		timed: make(map[*Link]struct{}),
		wake:  make(chan struct{}, 1),
		ctx:   ctx, cancel: cancel,
	}
}

// Node is this node's id.
func (b *Bus) Node() NodeID { return b.node }

// Conn is the NATS connection of the bus.
func (b *Bus) Conn() *Conn { return b.conn }

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
	sub, err := b.conn.nc.Subscribe(nodeWildcard(b.node), b.dispatch)
	if err != nil {
		return fmt.Errorf("subscribe for node %s: %w", b.node, err)
	}
	if err := sub.SetPendingLimits(subscriptionMessages, subscriptionBytes); err != nil {
		return fmt.Errorf("subscribe for node %s: %w", b.node, err)
	}
	b.sub = sub
	b.conn.onDisturbed(b.probeAll)
	b.tasks.Go(b.pumpLoop)
	return nil
}

// Close ends the bus: the subscription, the pump and whatever waits for a ping.
// It does not close the NATS connection.
func (b *Bus) Close() {
	b.cancel()
	if b.sub != nil {
		_ = b.sub.Unsubscribe() // fails only when the connection is closed
	}
	b.tasks.Wait()
}

// NewLink returns the phone's end of a link that is not bound yet: frames may
// be queued, none goes out before Open succeeds.
func (b *Bus) NewLink(serverID, connID string, recv Receiver) *Link {
	return b.newLink(newLinkID(), phoneSide, serverID, connID, recv)
}

func (b *Bus) newLink(id LinkID, s side, serverID, connID string, recv Receiver) *Link {
	l := &Link{
		bus: b, id: id, side: s, recv: recv,
		serverID: serverID, token: EncodeToken(serverID), connID: connID,
		st: newLinkState(b.cfg),
	}
	l.writable.L = &l.mu
	return l
}

// Open binds l to session on node and asks the holder there, which may be this
// node. Errors: those of Handler.Open; ErrNoResponders; ErrClosed when l has
// ended meanwhile; a context error when no answer came, and then the holder may
// have accepted: it gives the link up by itself.
func (b *Bus) Open(ctx context.Context, l *Link, node NodeID, session SessionID) error {
	l.mu.Lock()
	if l.ended || l.bound {
		l.mu.Unlock()
		return ErrClosed
	}
	l.bindLocked(node, session, topicServer)
	key := l.key()
	l.mu.Unlock()
	b.register(key, l, node)

	credit, grace, err := b.askToOpen(ctx, l, node, session)
	if err != nil {
		l.mu.Lock()
		l.bound, l.peer, l.node = false, nil, ""
		l.mu.Unlock()
		b.unregister(key)
		return err
	}
	l.mu.Lock()
	if !grace {
		l.st.open(credit)
	}
	l.st.ackNow = true // tells the holder that this end knows
	l.mu.Unlock()
	l.kick()
	return nil
}

func (b *Bus) askToOpen(ctx context.Context, l *Link, node NodeID, session SessionID) (credit uint64, grace bool, err error) {
	m := Message{Kind: KindOpen, Link: l.id, Session: session, Credit: uint64(b.cfg.Window), Payload: joinOpen(b.node, l.connID)} //nolint:gosec // positive
	if node == b.node {
		return openAnswer(b.accept(l.token, m, node, l))
	}
	ctx, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	answer, err := b.request(ctx, l.subject, m)
	if err != nil {
		return 0, false, err
	}
	return openAnswer(answer)
}

func openAnswer(m Message) (credit uint64, grace bool, err error) {
	switch m.Kind {
	case KindAccept:
		return m.Credit, m.Reason == flagGrace, nil
	case KindRefuse:
		return 0, false, errorOf(m.Reason, m.Payload)
	}
	return 0, false, fmt.Errorf("%w: answer %s to OPEN", errMalformed, m.Kind)
}

// accept answers an OPEN for the server-id of token, from a phone of node from.
// other is the phone's end if that is this node.
func (b *Bus) accept(token string, m Message, from NodeID, other *Link) Message {
	refuse := func(err error) Message {
		reason, payload := reasonOf(err)
		return Message{Kind: KindRefuse, Reason: reason, Link: m.Link, Session: m.Session, Payload: payload}
	}
	serverID, err := DecodeToken(token)
	_, connID, ok := splitOpen(m.Payload)
	if err != nil || !ok {
		return refuse(ErrNoSession)
	}
	accepted := Message{Kind: KindAccept, Link: m.Link, Session: m.Session}
	if l := b.find(linkKey{id: m.Link, session: m.Session, side: binarySide}); l != nil {
		l.mu.Lock() // the answer to the first request was lost
		defer l.mu.Unlock()
		accepted.Credit = l.st.granted
		return accepted
	}
	l := b.newLink(m.Link, binarySide, serverID, connID, nil)
	l.bindLocked(from, m.Session, topicPhone)
	l.peer = other
	if other != nil {
		other.mu.Lock()
		other.peer = l
		other.mu.Unlock()
	}
	recv, grace, err := b.handler.Open(l)
	if err != nil {
		return refuse(err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.recv = recv
	l.st.open(m.Credit)
	if grace {
		l.st.granted, l.st.window = 0, 0
		accepted.Reason = flagGrace
	}
	accepted.Credit = l.st.granted
	l.st.awaitConfirm(time.Now())
	b.register(l.key(), l, from)
	l.watchLocked()
	return accepted
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
// this call. It blocks for the probe there. Errors as Hello.
func (b *Bus) Challenge(ctx context.Context, node NodeID, serverID string, session SessionID) (alive bool, err error) {
	if node == b.node {
		return b.handler.Alive(ctx, serverID, session), nil
	}
	m, err := b.request(ctx, tokenSubject(node, topicClaim, EncodeToken(serverID)), Message{Kind: KindChallenge, Session: session})
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
	msg := nats.NewMsg(subject)
	msg.Data = m.encode()
	answer, err := b.conn.nc.RequestMsgWithContext(ctx, msg)
	switch {
	case errors.Is(err, nats.ErrNoResponders):
		return Message{}, ErrNoResponders
	case err != nil:
		return Message{}, err
	}
	return decode(answer.Data)
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

func (b *Bus) unregister(k linkKey) {
	b.mu.Lock()
	defer b.mu.Unlock()
	e, ok := b.links[k]
	if !ok {
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
	l.mu.Unlock()
	b.unregister(k)
}

// probeAll makes every link to another node ask where its other end is. It runs
// after the NATS connection was disturbed.
func (b *Bus) probeAll() {
	now := time.Now()
	for _, l := range b.linksTo(func(n NodeID) bool { return n != b.node }) {
		l.probe(now)
	}
}
