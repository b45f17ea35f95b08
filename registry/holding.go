package registry

import (
	"context"
	"errors"
	"time"

	"github.com/pyrycode/pyrycode-relay/bus"
)

// holding is one binary connection of this node, from its claim to the end of its
// grace. States and what moves between them:
//
//	claiming → held     the KV names its session
//	claiming → over     the claim failed
//	held     → grace    its connection ended
//	held     → over     another session was seen in the KV: its binary is closed
//	grace    → over     another session, or the time is up: its phones are told
type holding struct {
	// Static after construction.
	serverID string
	session  bus.SessionID
	conn     Conn
	opts     options

	// Owned by claim.
	unsure bool // the outcome of a write was unknown: its entry may be found later

	// Guarded by Registry.mu.
	state    holdingState
	revision uint64             // of the latest write to its key that we know of
	written  holdingState       // what the KV says of it, as far as we know
	agreed   bool               // a sweep has compared it with the KV, and all was well
	since    time.Time          // of the connection
	links    map[*bus.Link]bool // the attach table; true: attached in grace; nil before the first
	ending   *time.Timer        // of the grace
	next     *probe             // that has not been sent yet
	probed   time.Time          // when the latest was sent
}

type holdingState int

const (
	claiming holdingState = iota
	held
	grace
	over
)

func (h *holding) key() string { return bus.EncodeToken(h.serverID) }

func (r *Registry) entryFor(h *holding, state string) entry {
	return entry{
		Node: r.bus.Node(), Session: h.session, State: state,
		Since: h.since.Unix(), Version: versionText(h.opts.version),
	}
}

// install makes h, whose session the KV named at revision in place of before,
// what this node holds. It returns false if h was superseded already: it is over, or
// this node holds a session that the KV named later.
func (r *Registry) install(h *holding, before bus.SessionID, revision uint64) bool {
	r.mu.Lock()
	current, claimant := r.current[h.serverID], r.sessions[before] // these may be two: claimant is not installed yet
	if h.state == over || current != nil && current.revision > revision {
		r.mu.Unlock()
		return false
	}
	r.current[h.serverID] = h
	h.state, h.written, h.revision = held, held, revision
	r.mu.Unlock()
	for _, old := range []*holding{current, claimant} {
		if old != nil && old != h {
			r.supersede(old)
		}
	}
	return true
}

// supersede ends a holding because the KV names another session: its binary is
// displaced, its phones are told, and those that have no session to lose yet move.
func (r *Registry) supersede(h *holding) {
	if was := r.endHolding(h, bus.ErrReclaimed); was == held {
		h.opts.evict(ErrDisplaced)
	}
}

// endHolding takes h off the tables and ends its links with err; links attached in
// grace move instead if there is a session to move to. It returns the state that
// h was in.
func (r *Registry) endHolding(h *holding, err error) holdingState {
	r.mu.Lock()
	was := h.state
	h.state = over
	if r.current[h.serverID] == h {
		delete(r.current, h.serverID)
	}
	delete(r.sessions, h.session)
	links := h.links
	h.links = nil
	if h.ending != nil {
		h.ending.Stop()
	}
	r.mu.Unlock()
	for l, inGrace := range links {
		if inGrace && errors.Is(err, bus.ErrReclaimed) {
			l.Close(bus.ErrMoved)
		} else {
			l.Close(err)
		}
	}
	return was
}

// ReleaseServer tells that conn, the binary of serverID, has ended for whatever
// reason: its grace begins. It returns when the KV knows, or has not answered in
// time and is told later.
func (r *Registry) ReleaseServer(serverID string, conn Conn) {
	r.mu.Lock()
	h := r.current[serverID]
	if h == nil || h.conn != conn || h.state != held {
		r.mu.Unlock()
		return
	}
	h.state = grace
	h.ending = time.AfterFunc(r.cfg.Grace, func() { r.graceOver(h) })
	r.mu.Unlock()
	r.log.Info("server_released", "server_id", logID(serverID))
	ctx, cancel := context.WithTimeout(r.ctx, decideTimeout)
	defer cancel()
	if err := r.writeHolding(ctx, h); err != nil {
		r.log.Warn("grace_not_written", "server_id", logID(serverID), "error", err.Error())
		r.sweepSoon()
	}
}

// graceOver ends a grace that nobody claimed.
func (r *Registry) graceOver(h *holding) {
	if r.endHolding(h, bus.ErrGraceOver) != grace {
		return
	}
	r.graceExpiries.Add(1)
	r.mu.Lock()
	known := h.written == grace
	r.mu.Unlock()
	if !known { // else the KV ends it by itself
		r.addOrphan(h.session, h.serverID)
	}
}

// writeHolding brings the KV's entry for h in line with h: held, or grace with
// its TTL. It returns nil when it is, or when h is over; another session there
// supersedes h.
func (r *Registry) writeHolding(ctx context.Context, h *holding) error {
	for {
		r.mu.Lock()
		state, rev, done := h.state, h.revision, h.written == h.state
		r.mu.Unlock()
		if state != held && state != grace || done {
			return nil
		}
		e, ttl := r.entryFor(h, stateHeld), time.Duration(0)
		if state == grace {
			e, ttl = r.entryFor(h, stateGrace), r.cfg.Grace
		}
		newRev, err := r.presence.put(ctx, h.key(), e.encode(), rev, ttl)
		if err == nil {
			r.wrote(h, state, newRev)
			continue // done, unless h has changed meanwhile
		}
		there, err2 := r.presence.getLeader(ctx, h.key())
		if err2 != nil {
			return err2
		}
		found, ok := entryOf(there)
		switch {
		case ok && found.Session != h.session:
			if r.lostTo(ctx, h, there, found) {
				return nil
			}
			if !pause(ctx, retryWait) {
				return ctx.Err()
			}
			continue
		case ok && found.State == e.State && errors.Is(err, errUnknown):
			r.wrote(h, state, there.revision) // it had been written after all
			continue
		}
		r.wrote(h, claiming, there.revision)
		if !pause(ctx, retryWait) {
			return ctx.Err()
		}
	}
}

// wrote notes what the KV says of h at revision rev; claiming: nothing.
func (r *Registry) wrote(h *holding, state holdingState, rev uint64) {
	r.mu.Lock()
	h.revision, h.written = rev, state
	r.mu.Unlock()
}

func (r *Registry) addOrphan(s bus.SessionID, serverID string) {
	r.mu.Lock()
	r.orphans[s] = orphan{serverID, time.Now().Add(orphanFor)}
	r.mu.Unlock()
	r.sweepSoon()
}
