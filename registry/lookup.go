package registry

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/pyrycode/pyrycode-relay/bus"
)

// phone is one phone connection of this node.
type phone struct {
	serverID string
	conn     Conn
	link     *bus.Link
}

// RegisterPhone attaches conn, a phone, to the binary of serverID, on whatever
// node that is. It returns nil when the holder has accepted; ErrNoServer,
// ErrTooManyPhones; ErrUndecided if nobody could tell in 4.5 s; ErrNotReady while
// this node decides nothing. On nil the caller owes an UnregisterPhone.
//
//	(protocol.md: Close codes; architecture.md: Look-up and attach)
func (r *Registry) RegisterPhone(serverID string, conn Conn, opts ...Option) error {
	o := optionsFor(conn, opts)
	p := &phone{serverID: serverID, conn: conn, link: o.link}
	if p.link == nil {
		p.link = r.bus.NewLink(serverID, conn.ConnID(), o.recv)
	}
	r.addPhone(p)
	if err := r.attach(o.ctx, p); err != nil {
		r.removePhone(p)
		p.link.Close(bus.CodeError(0))
		return err
	}
	return nil
}

// UnregisterPhone tells that a phone's connection has ended. Its link is closed
// if the caller has not done so.
func (r *Registry) UnregisterPhone(serverID, connID string) {
	r.mu.Lock()
	p := r.phones[serverID][connID]
	r.mu.Unlock()
	if p == nil {
		return
	}
	r.removePhone(p)
	p.link.Close(bus.CodeError(goingAway))
}

// goingAway is the close code of a phone whose own is not known.
const goingAway = 1001

func (r *Registry) addPhone(p *phone) {
	r.mu.Lock()
	defer r.mu.Unlock()
	of := r.phones[p.serverID]
	if of == nil {
		of = make(map[string]*phone)
		r.phones[p.serverID] = of
	}
	of[p.conn.ConnID()] = p
}

func (r *Registry) removePhone(p *phone) {
	r.mu.Lock()
	defer r.mu.Unlock()
	of := r.phones[p.serverID]
	if of[p.conn.ConnID()] == p {
		delete(of, p.conn.ConnID())
	}
	if len(of) == 0 {
		delete(r.phones, p.serverID)
	}
}

// attach binds p's link to the current session, wherever it is. It tries until
// the holder answered or nobody holds the server-id, at most decideTimeout.
func (r *Registry) attach(ctx context.Context, p *phone) error {
	ctx, cancel := context.WithTimeout(ctx, decideTimeout)
	defer cancel()
	a := attempt{r: r, p: p}
	for wait := retryWait; ; wait = min(2*wait, retryWaitMax) {
		if err := r.Ready(); err != nil {
			return err
		}
		done, err := a.try(ctx)
		if done {
			return err
		}
		if !pause(ctx, a.pace(wait)) {
			return fmt.Errorf("%w: %w", ErrUndecided, a.err)
		}
	}
}

// attempt is one phone's way to the holder, and what it has learnt on it.
type attempt struct {
	r *Registry
	p *phone

	refused bus.SessionID // the holder itself says that it does not hold this one
	silent  bus.NodeID    // a node without responders
	silence silence       // of that node
	err     error
}

// pace is wait, or less if the silence of a node proves something before.
func (a *attempt) pace(wait time.Duration) time.Duration {
	if a.silent == "" {
		return wait
	}
	return min(wait, max(retryWait, time.Until(a.silence.since.Add(deadAfter))))
}

// try looks up the holder and asks it. done says that err (or nil) is the answer.
func (a *attempt) try(ctx context.Context) (done bool, err error) {
	found, err := a.lookUp(ctx)
	switch {
	case errors.Is(err, ErrNoServer):
		return true, err
	case err != nil:
		a.err, a.silent = err, "" // nobody was asked, so no silence is unbroken
		return false, nil
	}
	asked := time.Now()
	err = a.r.bus.Open(ctx, a.p.link, found.Node, found.Session)
	silent := a.silent
	a.err, a.silent = err, ""
	switch {
	case err == nil:
		return true, nil
	case errors.Is(err, bus.ErrTooManyPhones):
		return true, ErrTooManyPhones
	case errors.Is(err, bus.ErrClosed):
		return true, ErrClosed // the phone has gone meanwhile
	case errors.Is(err, bus.ErrNoSession):
		a.refused = found.Session
	case errors.Is(err, bus.ErrNoResponders):
		if silent != found.Node {
			a.silence = silence{}
		}
		a.silent = found.Node
		if a.silence.proves(a.r, asked) {
			return true, ErrNoServer
		}
	}
	return false, nil
}

// lookUp finds the entry of the server-id. A replica's word is enough to go and
// ask the holder; that nobody holds it takes the leader's. A node that has just been
// cut off, or whose NATS connection was disturbed, asks the leader only.
func (a *attempt) lookUp(ctx context.Context) (entry, error) {
	r, key := a.r, bus.EncodeToken(a.p.serverID)
	swept := r.swept()
	if h := r.localHolding(a.p.serverID); h != nil && swept {
		return entry{Node: r.bus.Node(), Session: h.session}, nil
	}
	if a.err == nil && swept {
		if rec, err := r.presence.get(ctx, key); err == nil {
			if e, ok := entryOf(rec); ok {
				return e, nil
			}
		}
	}
	rec, err := r.presence.getLeader(ctx, key)
	if err != nil {
		return entry{}, err
	}
	e, ok := entryOf(rec)
	if err := r.Ready(); err != nil {
		return entry{}, err // what was read may be old
	}
	switch {
	case !ok:
		if h := r.localHolding(a.p.serverID); h != nil && r.stateOf(h) == held {
			return entry{Node: r.bus.Node(), Session: h.session}, nil // it is here, and the next sweep writes it again
		}
		return entry{}, ErrNoServer
	case e.Session == a.refused:
		return entry{}, ErrNoServer // the holder itself says so
	case a.silent == e.Node && r.leaseGone(ctx, e.Node):
		return entry{}, ErrNoServer // its node is dead
	}
	return e, nil
}

func (r *Registry) localHolding(serverID string) *holding {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.current[serverID]
}

// Open implements bus.Handler: the attach table of the holder decides. A phone whose
// node did not hear the answer asks again, and must not find itself in the way.
func (r *Registry) Open(l *bus.Link) (bus.Receiver, bool, error) {
	recv, inGrace, before, err := r.open(l)
	if before != nil {
		before.Close(bus.ErrLinkLost)
	}
	return recv, inGrace, err
}

// open is Open without the close of before, an earlier attempt of the same phone that
// is off the table.
func (r *Registry) open(l *bus.Link) (recv bus.Receiver, inGrace bool, before *bus.Link, err error) {
	session := l.Session()
	r.mu.Lock()
	defer r.mu.Unlock()
	h := r.sessions[session]
	switch {
	case r.stopped: // its sessions are in their grace, and it does not know who takes them
		return nil, false, nil, bus.ErrNodeGone
	case h == nil || h.serverID != l.ServerID() || h.state == over:
		return nil, false, nil, bus.ErrNoSession
	}
	for other := range h.links {
		switch {
		case other.ConnID() != l.ConnID():
		case !l.After(other):
			return nil, false, nil, bus.ErrNoSession // it came late: the phone has asked again since
		default:
			before = other
			delete(h.links, other)
		}
	}
	if len(h.links) >= r.cfg.MaxPhones {
		return nil, false, before, bus.ErrTooManyPhones
	}
	inGrace = h.state == grace
	if h.links == nil {
		h.links = make(map[*bus.Link]bool)
	}
	h.links[l] = inGrace
	return h.opts.recv, inGrace, before, nil
}

// Ended implements bus.Handler.
func (r *Registry) Ended(l *bus.Link) {
	session := l.Session()
	r.mu.Lock()
	defer r.mu.Unlock()
	if h := r.sessions[session]; h != nil {
		delete(h.links, l)
	}
}

// Moved implements bus.Handler: a phone that waited for its binary looks for the
// connection that it came back on.
func (r *Registry) Moved(l *bus.Link) {
	r.mu.Lock()
	p := r.phones[l.ServerID()][l.ConnID()]
	r.mu.Unlock()
	if p == nil || p.link != l {
		return
	}
	r.spawn(func() {
		if err := r.attach(r.ctx, p); err != nil && !errors.Is(err, ErrClosed) {
			l.Fail(moveError(err))
		}
	})
}

// moveError is what a phone is told whose move failed.
func moveError(err error) error {
	switch {
	case errors.Is(err, ErrNoServer):
		return bus.ErrNoSession
	case errors.Is(err, ErrTooManyPhones):
		return bus.ErrTooManyPhones
	}
	return bus.ErrLinkLost
}
