package gateway

import (
	"hash/maphash"
	"net/http"
)

// contention keeps binaries that fight for one server-id from melting the cluster: each
// redials at once, whatever it is closed with. Over its burst, the claims of a server-id
// are refused before they reach the registry, with an HTTP status, which makes a binary
// back off; what happens again and again is logged once a minute. So on each node a
// server-id costs at most claimBurst claims and one more per claimInterval. Server-ids are
// hostile input: only a keyed hash of each is remembered.
type contention struct {
	seed      maphash.Seed
	claims    *limiter[uint64]
	conflicts *limiter[uint64] // log lines
	refusals  *limiter[uint64] // log lines
}

func newContention() contention {
	return contention{
		seed:      maphash.MakeSeed(),
		claims:    newLimiter[uint64](claimInterval, claimBurst),
		conflicts: newLimiter[uint64](contentionLog, 1),
		refusals:  newLimiter[uint64](contentionLog, 1),
	}
}

var refusalContended = refusal{http.StatusTooManyRequests, "too many claims of this server-id: do two binaries have it?"}

// contended returns the refusal of b if its server-id has been claimed too often lately.
func (g *Gateway) contended(b *binary) error {
	key := maphash.String(g.contention.seed, b.serverID)
	if ok, _ := g.contention.claims.allow(key); ok {
		return nil
	}
	g.metrics.registerFailed(failureContended)
	if first, _ := g.contention.refusals.allow(key); first {
		g.log.Warn("server_id_contended", "server_id", logServerID(b.serverID), "remote", b.addr)
	}
	return refusalContended
}

// conflicted notes that b met a living incumbent.
func (g *Gateway) conflicted(b *binary) {
	if first, _ := g.contention.conflicts.allow(maphash.String(g.contention.seed, b.serverID)); first {
		g.log.Info("server_id_conflict", "server_id", logServerID(b.serverID), "remote", b.addr)
	}
}
