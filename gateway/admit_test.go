package gateway

import (
	bin "encoding/binary"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func TestAdmission_BurstThenOnePerInterval(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAdmission(6*time.Second, 20)
		addr := netip.MustParseAddr("192.0.2.1")
		wantBurst := func(want int) {
			t.Helper()
			for got := range want {
				if ok, wait := a.allow(addr); !ok {
					t.Fatalf("upgrade %d of %d refused for %v", got+1, want, wait)
				}
			}
			if ok, _ := a.allow(addr); ok {
				t.Fatalf("upgrade %d allowed", want+1)
			}
		}
		wantBurst(20)
		if _, wait := a.allow(addr); wait != 6*time.Second {
			t.Errorf("retry after %v, want 6s", wait)
		}
		advanceBubble(6*time.Second - 1) // refusals cost nothing
		if ok, wait := a.allow(addr); ok || wait != 1 {
			t.Errorf("after 6s-1ns: %v, %v, want refused for 1ns", ok, wait)
		}
		advanceBubble(1)
		wantBurst(1)
		advanceBubble(15 * time.Second)
		wantBurst(2)
		advanceBubble(time.Hour)
		wantBurst(20)
	})
}

// advanceBubble moves the clock of the synctest bubble that it is called in.
func advanceBubble(d time.Duration) {
	time.Sleep(d) //nolint:forbidigo // no real time passes
}

func TestAdmission_WhoSharesABucket(t *testing.T) {
	for _, tt := range []struct {
		a, b string // empty = invalid
		want bool
	}{
		{"192.0.2.1", "192.0.2.1", true},
		{"192.0.2.1", "192.0.2.2", false},
		{"192.0.2.1", "::ffff:192.0.2.1", true},
		{"::ffff:192.0.2.1", "::ffff:192.0.2.2", false},
		{"2001:db8::1", "2001:db8::ffff:1", true},
		{"2001:db8::1", "2001:db8:0:1::1", false},
		{"fe80::1%eth0", "fe80::2%eth1", true},
		{"", "", true},
		{"", "::1", false},
		{"", "0.0.0.0", false},
	} {
		a := newAdmission(time.Minute, 1)
		first, _ := netip.ParseAddr(tt.a)
		second, _ := netip.ParseAddr(tt.b)
		a.allow(first)
		if ok, _ := a.allow(second); ok == tt.want {
			t.Errorf("%q and %q share a bucket: %v, want %v", tt.a, tt.b, !ok, tt.want)
		}
	}
}

func TestAdmission_BurstZeroIsOff(t *testing.T) {
	a := newAdmission(time.Hour, 0)
	for range 1000 {
		if ok, wait := a.allow(netip.Addr{}); !ok || wait != 0 {
			t.Fatalf("allow = %v, %v", ok, wait)
		}
	}
}

// An emptied bucket is remembered until it is full again, whatever else is forgotten; then
// it is forgotten within two windows, as calls come in.
func TestAdmission_ForgetsFullBucketsOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAdmission(time.Second, 10)
		addr := netip.MustParseAddr("192.0.2.1")
		other := netip.MustParseAddr("192.0.2.2")
		advanceBubble(7 * time.Second) // not in step with the windows
		for range 10 {
			a.allow(addr)
		}
		for second := 1; second <= 100; second++ {
			advanceBubble(time.Second)
			a.allow(other)
			if ok, _ := a.allow(addr); !ok {
				t.Fatalf("second %d: refused", second)
			}
			if ok, _ := a.allow(addr); ok {
				t.Fatalf("second %d: a second one allowed", second)
			}
		}
		for range 3 {
			advanceBubble(10 * time.Second)
			a.allow(other)
		}
		if _, found := a.older[addr]; found || len(a.recent)+len(a.older) > 2 {
			t.Errorf("still remembers %v and %v", a.recent, a.older)
		}
	})
}

func TestAdmission_FloodForgivesAndStaysBounded(t *testing.T) {
	a := newAdmission(time.Hour, 1)
	addr := func(i uint64) netip.Addr {
		var b [16]byte
		bin.BigEndian.PutUint64(b[:], i|1<<63)
		return netip.AddrFrom16(b)
	}
	for i := range uint64(maxRemembered + 100) {
		if ok, _ := a.allow(addr(i)); !ok {
			t.Fatalf("new address %d refused", i)
		}
		if n := len(a.recent) + len(a.older); n > maxRemembered {
			t.Fatalf("%d addresses remembered", n)
		}
	}
	if ok, _ := a.allow(addr(maxRemembered)); ok {
		t.Error("the latest address is not remembered")
	}
	if ok, _ := a.allow(addr(0)); !ok {
		t.Error("the first address is still remembered")
	}
}

func TestAdmission_Concurrent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAdmission(time.Minute, 20)
		var allowed atomic.Int64
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() {
				for range 10 {
					if ok, _ := a.allow(netip.MustParseAddr("2001:db8::1")); ok {
						allowed.Add(1)
					}
				}
			})
		}
		wg.Wait()
		if got := allowed.Load(); got != 20 {
			t.Errorf("%d of 500 allowed, want 20", got)
		}
	})
}

var trustedProxies = []netip.Prefix{
	netip.MustParsePrefix("10.0.0.0/8"),
	netip.MustParsePrefix("fd00::/8"),
}

func TestClientAddr(t *testing.T) {
	for _, tt := range []struct {
		remote    string
		forwarded []string
		want      string
	}{
		{"192.0.2.1:5", nil, "192.0.2.1"},
		{"[2001:db8::1]:5", nil, "2001:db8::1"},
		{"[fe80::1%eth0]:5", nil, "fe80::1"},
		{"[::ffff:192.0.2.1]:5", nil, "192.0.2.1"},
		{"pipe", nil, "invalid IP"},
		{"", nil, "invalid IP"},
		{"pipe", []string{"192.0.2.1"}, "invalid IP"},

		{"192.0.2.1:5", []string{"198.51.100.1"}, "192.0.2.1"}, // not from a proxy: made up
		{"10.0.0.1:5", nil, "10.0.0.1"},
		{"10.0.0.1:5", []string{"198.51.100.1"}, "198.51.100.1"},
		{"[::ffff:10.0.0.1]:5", []string{"198.51.100.1"}, "198.51.100.1"},
		{"[fd00::1%eth0]:5", []string{" 2001:db8::1 "}, "2001:db8::1"},
		{"10.0.0.1:5", []string{"203.0.113.9, 198.51.100.1, 10.0.0.2"}, "198.51.100.1"},
		{"10.0.0.1:5", []string{"203.0.113.9", "198.51.100.1,fd00::2", "10.0.0.2"}, "198.51.100.1"},
		{"10.0.0.1:5", []string{"::ffff:198.51.100.1,::ffff:10.0.0.2"}, "198.51.100.1"},
		{"10.0.0.1:5", []string{"198.51.100.1:1234"}, "198.51.100.1"},
		{"10.0.0.1:5", []string{"[2001:db8::1%x]:1234"}, "2001:db8::1"},
		{"10.0.0.1:5", []string{"10.0.0.3,10.0.0.2"}, "10.0.0.3"}, // from inside

		{"10.0.0.1:5", []string{""}, "10.0.0.1"},
		{"10.0.0.1:5", []string{"198.51.100.1, unknown"}, "10.0.0.1"},
		{"10.0.0.1:5", []string{"198.51.100.1, x, 10.0.0.2"}, "10.0.0.2"},
		{"10.0.0.1:5", []string{"198.51.100.1,,10.0.0.2"}, "10.0.0.2"},
		{"10.0.0.1:5", []string{strings.Repeat(",", 100)}, "10.0.0.1"},
	} {
		r := &http.Request{RemoteAddr: tt.remote, Header: http.Header{"X-Forwarded-For": tt.forwarded}}
		if got := clientAddr(r, trustedProxies).String(); got != tt.want {
			t.Errorf("clientAddr(%q, %q) = %s, want %s", tt.remote, tt.forwarded, got, tt.want)
		}
	}
}

// FuzzClientAddr: the result is plain, and what an untrusted peer says of itself is ignored,
// whether it is the peer or the entry that a proxy appended.
func FuzzClientAddr(f *testing.F) {
	f.Add("10.0.0.1:5", "203.0.113.9, 198.51.100.1", "10.0.0.2")
	f.Add("192.0.2.1:5", "x", "")
	f.Add("[fd00::1%eth0]:5", "fe80::1%1", "[2001:db8::1]:5")
	f.Add("pipe", ",,", "::ffff:10.0.0.1")
	f.Fuzz(func(t *testing.T, remote, line1, line2 string) {
		get := func(remote string, lines ...string) netip.Addr {
			return clientAddr(&http.Request{RemoteAddr: remote, Header: http.Header{"X-Forwarded-For": lines}}, trustedProxies)
		}
		got := get(remote, line1, line2)
		if got.Zone() != "" || got.Is4In6() {
			t.Errorf("got %v", got)
		}
		if peer := get(remote); !isTrusted(peer, trustedProxies) && got != peer {
			t.Errorf("got %v from peer %v", got, peer)
		}
		if got := get("10.0.0.1:5", line1, line2+",198.51.100.1"); got != netip.MustParseAddr("198.51.100.1") {
			t.Errorf("got %v, want what the proxy appended", got)
		}
	})
}

func BenchmarkAdmission(b *testing.B) {
	addrs := make([]netip.Addr, 1<<16)
	for i := range addrs {
		addrs[i] = netip.AddrFrom4([4]byte{192, 0, byte(i >> 8), byte(i)})
	}
	for _, n := range []int{1, len(addrs)} {
		b.Run(fmt.Sprintf("addresses=%d", n), func(b *testing.B) {
			a := newAdmission(time.Microsecond, 20)
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				for i := 0; pb.Next(); i++ {
					a.allow(addrs[i%n])
				}
			})
		})
	}
}
