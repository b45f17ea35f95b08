package gateway

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net/http"
	"sync"
	"time"

	"github.com/pyrycode/pyrycode-relay/bus"
	"github.com/pyrycode/pyrycode-relay/registry"
)

// ServerHandler serves /v1/server for binaries of r's node: it checks the request,
// claims the server-id, and routes between the binary and its phones until the
// connection ends. The connection outlives the request.
//
//	(protocol.md: Life of a claim)
func ServerHandler(r *registry.Registry, logger *slog.Logger, opts ...Option) http.Handler {
	return http.HandlerFunc(New(r, logger, opts...).serveServer)
}

// binary is one binary connection.
type binary struct {
	conn
	serverID string
	version  string
	addr     string

	decision error         // of the registry before the upgrade: nil, or ErrHeld
	decided  chan struct{} // closed when the claim has succeeded or failed

	// Guarded by mu.
	mu        sync.Mutex
	phones    map[string]*bus.Link // by conn id: the phones that the binary has heard from; nil before the first
	gone      bool                 // the connection has ended
	counted   bool                 // in Gateway.held
	lost      bool                 // the server-id; it is not counted any more
	early     [][]byte             // messages that came before the claim was decided
	earlySize int

	// Owned by decide until decided is closed, then by the reading goroutine.
	warned map[string]struct{}
}

func (g *Gateway) serveServer(w http.ResponseWriter, r *http.Request) {
	leave, addr, ok := g.enter(w, r, endpointServer)
	if !ok {
		return
	}
	h, err := readBinaryHeaders(r.Header)
	if err != nil {
		leave(outcomeBadRequest)
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	b := &binary{serverID: h.serverID, version: logText(h.version), addr: addr, decided: make(chan struct{})}
	b.init(g, kindBinary, bus.NewConnID(h.serverID), func(int) {})
	b.out.limit = g.reg.MaxPhones() * (g.reg.Bus().Window() + g.cfg.MaxFrameBytes + backlogSlack)
	sock, err := upgrade(w, r, &b.conn, func() error {
		if err := g.contended(b); err != nil {
			return err
		}
		b.decision = b.claim(registry.WithoutProbe())
		if b.decision == nil || errors.Is(b.decision, registry.ErrHeld) {
			return nil
		}
		g.metrics.registerFailed(failureOf(b.decision))
		return refusalFor(b.decision)
	})
	if err != nil {
		b.ended(b.abandon())
		leave(outcomeOf(err))
		return
	}
	b.start(sock)
	g.add(&b.conn)
	go g.run(b, leave)
}

func (b *binary) base() *conn { return &b.conn }

func (b *binary) claim(opts ...registry.Option) error {
	return b.g.reg.ClaimServer(b.serverID, b, append(opts,
		registry.WithReceiver(b), registry.WithPing(b.ping), registry.OnEvict(b.evict),
		registry.WithVersion(b.version), registry.WithRemote(b.addr))...)
}

// serve implements peer.
func (b *binary) serve() {
	end := b.finishClaim()
	_ = b.readMessages(b)
	end()
}

// finishClaim decides the claim, beside the reader if that takes time. end awaits it.
func (b *binary) finishClaim() (end func()) {
	if b.decision == nil {
		b.decide(context.Background())
		close(b.decided)
		return func() {}
	}
	ctx, cancel := context.WithCancel(context.Background())
	b.tasks.Go(func() {
		defer close(b.decided)
		b.decide(ctx)
	})
	return func() {
		cancel()
		<-b.decided
	}
}

// begin implements sink.
func (b *binary) begin(size int) []byte { return bus.NewBuffer(size) }

// message implements sink. It handles a message, or keeps it until the claim is
// decided. It reads no further when much has been kept; before that, the binary's pings
// are answered.
//
//	(protocol.md: Life of a claim, 6)
func (b *binary) message(buf []byte) {
	defer bus.Free(buf)
	msg := bus.Frame(buf)
	select {
	case <-b.decided:
	default:
		if b.keep(msg) {
			return
		}
		<-b.decided
	}
	b.handle(msg)
}

func (b *binary) keep(msg []byte) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	size := b.earlySize + len(msg) + earlyOverhead
	if b.counted || b.lost || size > b.g.cfg.MaxFrameBytes {
		return false
	}
	b.early, b.earlySize = append(b.early, bytes.Clone(msg)), size
	return true
}

// hold notes that the binary holds its server-id, and handles what came before.
func (b *binary) hold() {
	for {
		b.mu.Lock()
		early := b.early
		b.early = nil
		if len(early) == 0 && !b.lost {
			b.counted = true
			b.g.held.Add(1)
		}
		b.mu.Unlock()
		if len(early) == 0 {
			return
		}
		for _, msg := range early {
			b.handle(msg)
		}
	}
}

// lose is the reverse of hold.
func (b *binary) lose() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.counted {
		b.g.held.Add(-1)
	}
	b.counted, b.lost = false, true
}

// ended implements peer: the grace begins, and the sessions of phones whose frames
// never reached the binary are in doubt.
func (b *binary) ended(left []message) {
	b.mu.Lock()
	b.gone = true
	b.mu.Unlock()
	for _, m := range left {
		if m.link != nil {
			m.link.Close(bus.ErrAway)
		}
	}
	b.lose()
	b.g.reg.ReleaseServer(b.serverID, b)
}

// decide finishes a claim that could not be decided before the upgrade, and closes
// the binary if it does not get its server-id.
func (b *binary) decide(ctx context.Context) {
	upgraded := time.Now()
	err := b.decision
	if err != nil {
		err = b.claim(registry.WithContext(ctx))
	}
	switch {
	case err == nil:
		b.hold()
		b.g.log.Info("server_claimed", "server_id", logServerID(b.serverID), "binary_version", b.version, "remote", b.addr)
		return
	case errors.Is(err, registry.ErrServerIDConflict):
		b.g.conflicted(b)
	default:
		select { // not at once, or it would redial at once, and so on
		case <-time.After(parkTime - time.Since(upgraded)):
		case <-ctx.Done():
		}
	}
	b.g.metrics.registerFailed(failureOf(err))
	b.closeAs(codeFor(err))
}

// handle passes one message of the binary on to the phone that it names.
func (b *binary) handle(msg []byte) {
	e, err := parseDown(msg)
	if err != nil {
		b.drop(dropKind(err))
		return
	}
	b.mu.Lock()
	l := b.phones[string(e.connID)]
	b.mu.Unlock()
	if l == nil {
		b.drop(dropUnknownConn)
		return
	}
	if e.frame != nil {
		_ = l.Offer(append(bus.NewBuffer(len(e.frame)), e.frame...)) // fails when the link has ended, and then End tells
	}
	if e.closeCode != 0 {
		l.Close(bus.CodeError(e.closeCode)) //nolint:gosec // parseDown: at most 65535
		b.forget(l)                         // its end is the binary's own doing
	}
}

func (b *binary) forget(l *bus.Link) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.phones[l.ConnID()] == l {
		delete(b.phones, l.ConnID())
	}
}

// drop counts a message that goes nowhere, and logs the first of each kind.
func (b *binary) drop(kind string) {
	b.g.metrics.dropped(kind)
	if _, ok := b.warned[kind]; ok {
		return
	}
	if b.warned == nil {
		b.warned = make(map[string]struct{})
	}
	b.warned[kind] = struct{}{}
	b.g.log.Warn("envelope_dropped", "server_id", logServerID(b.serverID), "kind", kind)
}

// Deliver implements bus.Receiver: one envelope of a phone.
func (b *binary) Deliver(l *bus.Link, buf []byte) {
	b.mu.Lock()
	gone := b.gone
	if !gone {
		if b.phones == nil {
			b.phones = make(map[string]*bus.Link)
		}
		b.phones[l.ConnID()] = l
	}
	b.mu.Unlock()
	err := bus.ErrClosed
	if !gone {
		err = b.out.put(message{buf, l})
	}
	switch {
	case errors.Is(err, bus.ErrBacklog):
		l.Fail(err) // the binary takes less than its phones send; it keeps the others
	case err != nil:
		l.Close(bus.ErrAway) // its session is in doubt
	}
	if l.Ended() {
		b.forget(l) // closed while this frame was on its way
	}
}

// End implements bus.Receiver: a phone has gone, and the binary is told, also of
// one that never sent a frame. It is not called for a phone that the binary itself
// asked to close.                         (protocol.md: The routing envelope)
func (b *binary) End(l *bus.Link, err error) {
	b.forget(l)
	_ = b.out.put(message{buf: closeNotice(l.ConnID(), noticeCode(err))}) // fails when the binary has gone too
}

// evict ends a binary that lost its server-id.
func (b *binary) evict(err error) {
	b.lose()
	b.closeAs(codeFor(err))
}
