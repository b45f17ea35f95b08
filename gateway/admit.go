package gateway

import (
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"
)

// maxRemembered bounds what a limiter remembers, to about 100 MB. Over it the keys seen
// least recently are forgotten early: a flood from a million addresses gets a few upgrades
// more, and nobody is refused because of it.
const maxRemembered = 1 << 20

// limiter limits how often something may happen for each key: a burst at once, then once
// per interval, a token bucket kept as one time per key. Safe for concurrent use.
type limiter[K comparable] struct {
	// Static after construction.
	start    time.Time
	interval time.Duration
	burst    int           // 0 = no limit
	window   time.Duration // an empty bucket is full again after it

	// Guarded by mu. The times are since start.
	mu     sync.Mutex
	recent map[K]time.Duration // when the bucket is full again
	older  map[K]time.Duration // the same, of keys not admitted since turned
	turn   time.Duration       // when recent becomes older
}

// newLimiter allows burst at once and then one per interval, for each key. A burst of 0 or
// less is no limit.
func newLimiter[K comparable](interval time.Duration, burst int) *limiter[K] {
	return &limiter[K]{
		start:    time.Now(),
		interval: interval,
		burst:    burst,
		window:   interval * time.Duration(burst),
	}
}

// allow takes one from the bucket of key. If there is none it takes nothing and returns
// how long it will be until there is one, at most the interval.
func (l *limiter[K]) allow(key K) (ok bool, retryAfter time.Duration) {
	if l.burst <= 0 {
		return true, 0
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Since(l.start)
	l.forget(now)
	full := max(now, l.recent[key], l.older[key]) + l.interval
	if wait := full - now - l.window; wait > 0 {
		return false, wait
	}
	l.recent[key] = full
	return true, 0
}

// forget drops older and starts a new recent, once a window: whatever is in older was last
// written more than a window ago, so it is full, and an unknown bucket is full as well.
func (l *limiter[K]) forget(now time.Duration) {
	if now < l.turn && len(l.recent) < maxRemembered/2 {
		return
	}
	l.older, l.recent = l.recent, make(map[K]time.Duration)
	l.turn = now + l.window
}

// admission limits the upgrades of each client address. The IPv6 addresses of a /64 are
// one client, and so are all invalid ones.    (protocol.md: Liveness and limits)
type admission struct{ *limiter[netip.Addr] }

func newAdmission(interval time.Duration, burst int) admission {
	return admission{newLimiter[netip.Addr](interval, burst)}
}

func (a admission) allow(addr netip.Addr) (ok bool, retryAfter time.Duration) {
	return a.limiter.allow(bucketOf(addr))
}

func bucketOf(addr netip.Addr) netip.Addr {
	addr = addr.Unmap()
	if !addr.Is6() {
		return addr
	}
	p, _ := addr.WithZone("").Prefix(64) // 64 bits is never an error
	return p.Addr()
}

// clientAddr returns the address of the client that sent r: the peer of the connection or,
// if that is one of the trusted proxies, the right-most address in X-Forwarded-For that is
// not. What is left of that one the client may have made up. An entry that is no address
// ends the walk at the proxy that passed it on. The result has no zone and is IPv4 where it
// is IPv4-mapped; it is invalid if the peer has no IP address.
func clientAddr(r *http.Request, trusted []netip.Prefix) netip.Addr {
	addr := parseAddr(r.RemoteAddr)
	if !isTrusted(addr, trusted) {
		return addr
	}
	forwarded := strings.Split(strings.Join(r.Header.Values("X-Forwarded-For"), ","), ",")
	for _, entry := range slices.Backward(forwarded) {
		hop := parseAddr(strings.TrimSpace(entry))
		if !hop.IsValid() {
			break
		}
		addr = hop
		if !isTrusted(addr, trusted) {
			break
		}
	}
	return addr
}

func isTrusted(addr netip.Addr, trusted []netip.Prefix) bool {
	return slices.ContainsFunc(trusted, func(p netip.Prefix) bool { return p.Contains(addr) })
}

// parseAddr reads an address with or without a port; the result is invalid if s is neither.
func parseAddr(s string) netip.Addr {
	addr, err := netip.ParseAddr(s)
	if err != nil {
		addrPort, _ := netip.ParseAddrPort(s)
		addr = addrPort.Addr()
	}
	return addr.Unmap().WithZone("")
}
