package gateway

import (
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pyrycode/pyrycode-relay/testenv"
)

func graceOf(d time.Duration) func(*settings) {
	return func(s *settings) { s.registry.Grace = d }
}

func probeOf(d time.Duration) func(*settings) {
	return func(s *settings) { s.registry.ProbeTimeout = d }
}

func TestServer_HeaderMissingOrEmpty_400(t *testing.T) {
	t.Parallel()
	n := newCluster(t, 1)[0]
	for _, name := range []string{"X-Pyrycode-Server", "X-Pyrycode-Version", "User-Agent"} {
		for _, value := range [][]string{nil, {""}} {
			_, err := n.dialBinary("x", func(o *testenv.BinaryOptions) { o.Header = http.Header{name: value} })
			wantRefused(t, err, http.StatusBadRequest)
			if body := refusedBody(err); !strings.Contains(body, strings.ToLower(name)) {
				t.Errorf("%s: body %q", name, body)
			}
		}
	}
	n.phone("x").wantClosed(4404, "no server with that id")
}

func TestServer_LogsItsLife(t *testing.T) {
	t.Parallel()
	n := newCluster(t, 1)[0]
	id := newServerID()
	b := n.binary(id, func(o *testenv.BinaryOptions) { o.Version = "0.9.1" })
	n.wantEvent("server_claimed", map[string]string{"server_id": id, "binary_version": "0.9.1", "remote": "127.0.0.1"})
	if err := b.Close(1000, ""); err != nil {
		t.Fatal(err)
	}
	n.wantEvent("server_released", map[string]string{"server_id": id})
}

func TestServer_LiveIncumbent_4409(t *testing.T) {
	t.Parallel()
	eachPlacement(t, func(t *testing.T, challengers, holders *node) {
		p, b, connID := meet(challengers, holders)
		id := b.serverID(connID)
		for range 3 {
			start := time.Now()
			c := challengers.binary(id)
			c.wantClosed(4409, "server-id already claimed")
			if took := time.Since(start); took > loaded(time.Second) {
				t.Errorf("4409 took %v", took)
			}
		}
		challengers.wantEvent("server_id_conflict", map[string]string{"server_id": id, "remote": "127.0.0.1"})
		p.send("1")
		b.wantFrame("1")
		wantQuiet(t, p.Peer)
		wantQuiet(t, b.Peer)
		if got := challengers.metric(`pyrycode_relay_register_failures_total{kind="conflict"}`); got != "3" {
			t.Errorf("conflicts: %s, want 3", got)
		}
		await(t, "one binary is counted", func() bool { return holders.gw.held.Load() == 1 })
	})
}

func TestServer_DeadIncumbent_Takeover(t *testing.T) {
	t.Parallel()
	eachPlacement(t, func(t *testing.T, challengers, holders *node) {
		p, b, connID := meet(challengers, holders)
		id := b.serverID(connID)
		near, _ := join(holders, b, id)
		b.Pause()
		c := challengers.binary(id)
		c.send("client-old", `"early"`) // waits, and is then dropped like any unknown one
		for range 5 {
			if err := c.Ping(soon(t)); err != nil {
				t.Fatalf("a parked binary's ping: %v", err)
			}
		}
		for range 39 { // more than is kept
			c.send("client-old", `"`+strings.Repeat("x", 10_000)+`"`)
		}
		wantQuiet(t, p.Peer)
		p.wantClosed(4404, "binary reclaimed server-id")
		near.wantClosed(4404, "binary reclaimed server-id")
		b.Unpause()
		b.wantClosed(1011, "heartbeat timeout")
		challengers.wantEvent("server_id_takeover", map[string]string{"server_id": id, "remote": "127.0.0.1"})
		challengers.wantEvent("server_claimed", map[string]string{"server_id": id})
		await(t, "all early frames", func() bool {
			return challengers.metric(`pyrycode_relay_envelopes_dropped_total{kind="unknown_conn"}`) == "40"
		})
		for _, n := range []*node{challengers, holders} {
			p, connID := join(n, c, id)
			c.send(connID, "2")
			p.wantFrame("2")
		}
		await(t, "one binary is counted", func() bool {
			return challengers.gw.held.Load() == 1 && (holders == challengers || holders.gw.held.Load() == 0)
		})
	}, probeOf(4*time.Second)) // all that the parked one sends comes before
}

// A claim that nobody can decide any more is closed, not at once and not with 4409.
func TestServer_ParkedAndUndecided_1011(t *testing.T) {
	t.Parallel()
	server := startNATS(t)
	n := newCluster(t, 1, probeOf(time.Second), func(s *settings) { s.nats = server.URL() })[0]
	id := newServerID()
	n.binary(id).Pause()
	c := n.binary(id)
	start := time.Now()
	server.Isolate()
	if err := c.Ping(soon(t)); err != nil {
		t.Errorf("a parked binary's ping: %v", err)
	}
	c.wantClosed(1011, "claim undecided")
	if took := time.Since(start); took < time.Second || took > loaded(12*time.Second) {
		t.Errorf("closed after %v", took)
	}
	server.Heal()
	n.awaitReady()
}

// NATS answers nothing, and the node does not know yet: still within 5 s.
func TestUpgrade_KVIsSilent_503InTime(t *testing.T) {
	t.Parallel()
	server := startNATS(t)
	n := newCluster(t, 1, func(s *settings) { s.nats = server.URL() })[0]
	server.Isolate()
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			start := time.Now()
			var err error
			if i%2 == 0 {
				_, err = testenv.DialPhone(soon(t), n.url, testenv.PhoneOptions{ServerID: "x"})
			} else {
				_, err = testenv.DialBinary(soon(t), n.url, testenv.BinaryOptions{ServerID: fmt.Sprint(i)})
			}
			wantRefusedStatus(t, err, 503)
			if took := time.Since(start); took > loaded(4*time.Second) {
				t.Errorf("answered after %v", took)
			}
		})
	}
	wg.Wait()
	if got := n.metric(`pyrycode_relay_register_failures_total{kind="undecided"}`); got != "4" {
		t.Errorf("undecided: %s, want 4", got)
	}
	server.Heal()
	n.awaitReady()
}

func TestServer_SeveralChallengers_OneWins(t *testing.T) {
	t.Parallel()
	eachPlacement(t, func(t *testing.T, challengers, holders *node) {
		id := newServerID()
		b := holders.binary(id)
		b.Pause()
		var cs []*testBinary
		for i := range 6 {
			cs = append(cs, []*node{challengers, holders}[i%2].binary(id))
		}
		await(t, "one is left", func() bool {
			left := 0
			for _, c := range cs {
				select {
				case <-c.Done():
				default:
					left++
				}
			}
			return left <= 1
		})
		var winner *testBinary
		for _, c := range cs {
			select {
			case <-c.Done():
				c.wantClosed(4409, "server-id already claimed")
			default:
				winner = c
			}
		}
		if winner == nil {
			t.Fatal("nobody won")
		}
		join(challengers, winner, id)
		join(holders, winner, id)
	}, probeOf(time.Second))
}

func TestServer_GatewayDead_ClaimedAtOnce(t *testing.T) {
	t.Parallel()
	nodes := newCluster(t, 2)
	id := newServerID()
	nodes[0].binary(id)
	nodes[0].crash()
	start := time.Now()
	b := nodes[1].binary(id)
	if took := time.Since(start); took > loaded(time.Second) {
		t.Errorf("the claim of a dead gateway's server-id took %v", took)
	}
	join(nodes[1], b, id)
}

func TestServer_ManyAtOnce_OneWins(t *testing.T) {
	t.Parallel()
	nodes := newCluster(t, 3)
	for range 3 {
		id := newServerID()
		var mu sync.Mutex
		var open []*testBinary
		var wg sync.WaitGroup
		for i := range 12 {
			n := nodes[i%3]
			wg.Go(func() {
				b, err := testenv.DialBinary(soon(t), n.url, testenv.BinaryOptions{ServerID: id})
				if err != nil {
					wantRefusedStatus(t, err, 503)
					return
				}
				t.Cleanup(b.Drop)
				mu.Lock()
				open = append(open, &testBinary{b, t})
				mu.Unlock()
			})
		}
		wg.Wait()
		await(t, "one is left", func() bool {
			left := 0
			for _, b := range open {
				select {
				case <-b.Done():
				default:
					left++
				}
			}
			return left == 1
		})
		for _, b := range open {
			select {
			case <-b.Done():
				b.wantClosed(4409, "server-id already claimed")
			default:
				join(nodes[0], b, id)
			}
		}
	}
}

func wantRefusedStatus(t *testing.T, err error, status int) {
	t.Helper()
	if got, want := fmt.Sprint(err), fmt.Sprint(status); !strings.Contains(got, want) {
		t.Errorf("dial: %v, want refused with %d", err, status)
	}
}

// From the instant that a binary's upgrade was answered, no phone is told 4404.
func TestServer_PhoneAfter101_Never4404(t *testing.T) {
	t.Parallel()
	nodes := newCluster(t, 2)
	for i := range 60 {
		id := newServerID()
		b := nodes[i%2].binary(id)
		var wg sync.WaitGroup
		for _, n := range nodes {
			wg.Go(func() {
				p, err := n.dialPhone(id)
				if err != nil {
					t.Error(err)
					return
				}
				if err := p.Send(soon(t), []byte("1")); err != nil {
					t.Error(err)
				}
			})
		}
		b.wantFrame("1")
		b.wantFrame("1")
		wg.Wait()
		b.Drop()
	}
}

// Grace.

func TestGrace_OldPhoneSends_Away(t *testing.T) {
	t.Parallel()
	eachPlacement(t, func(t *testing.T, phones, binaries *node) {
		p, b, connID := meet(phones, binaries)
		quiet, _ := join(phones, b, b.serverID(connID))
		silent := phones.phone(b.serverID(connID)) // attached, and was never heard of
		if err := b.Close(1000, ""); err != nil {
			t.Fatal(err)
		}
		binaries.wantEvent("server_released", nil)
		wantQuiet(t, p.Peer)
		p.send("1")
		p.wantClosed(4404, "binary is away")
		silent.send("1")
		silent.wantClosed(4404, "binary is away")
		wantQuiet(t, quiet.Peer)
	})
}

func TestGrace_BinaryReturns_OldPhonesReclaimed(t *testing.T) {
	t.Parallel()
	for _, elsewhere := range []bool{false, true} {
		t.Run(fmt.Sprintf("Elsewhere=%v", elsewhere), func(t *testing.T) {
			t.Parallel()
			eachPlacement(t, func(t *testing.T, phones, binaries *node) {
				p, b, connID := meet(phones, binaries)
				id := b.serverID(connID)
				near, _ := join(binaries, b, id)
				b.Drop()
				binaries.wantEvent("server_released", nil)
				wantQuiet(t, p.Peer)
				to := binaries
				if elsewhere {
					to = phones
					if phones == binaries {
						return // is the test without elsewhere
					}
				}
				b2 := to.binary(id)
				p.wantClosed(4404, "binary reclaimed server-id")
				for _, n := range []*node{phones, binaries} { // no 4404 loop
					p, connID := join(n, b2, id)
					b2.send(connID, "1")
					p.wantFrame("1")
				}
				near.wantClosed(4404, "binary reclaimed server-id")
				wantQuiet(t, b2.Peer) // no notice of phones that it has never heard of
			})
		})
	}
}

func TestGrace_NewPhone_GetsThroughAtTheFirstTry(t *testing.T) {
	t.Parallel()
	for _, elsewhere := range []bool{false, true} {
		t.Run(fmt.Sprintf("Elsewhere=%v", elsewhere), func(t *testing.T) {
			t.Parallel()
			eachPlacement(t, func(t *testing.T, phones, binaries *node) {
				id := newServerID()
				b := binaries.binary(id)
				b.Drop()
				binaries.wantEvent("server_released", nil)
				nodes := []*node{phones, binaries}
				var ps []*testPhone
				var pad = strings.Repeat("x", 20_000)
				for i := range 4 {
					p := nodes[i%2].phone(id)
					for n := range 5 {
						p.send(fmt.Sprintf("[%d,%d,%q]", i, n, pad))
					}
					ps = append(ps, p)
				}
				silent := phones.phone(id)
				for _, p := range ps {
					wantQuiet(t, p.Peer)
				}
				to := binaries
				if elsewhere {
					to = newNode(t, phones.set.registry.KVPrefix)
					to.awaitReady()
				}
				b2 := to.binary(id)
				next, first := make(map[string]int), make(map[string]string)
				for range 4 * 5 {
					e := b2.next()
					if e.HasToken != (next[e.ConnID] == 0) {
						t.Errorf("token in envelope %d: %v", next[e.ConnID], e.HasToken)
					}
					var i, n int
					if _, err := fmt.Sscanf(string(e.Frame), "[%d,%d,", &i, &n); err != nil || n != next[e.ConnID] {
						t.Fatalf("got %.30q, want frame %d (%v)", e.Frame, next[e.ConnID], err)
					}
					next[e.ConnID]++
					first[e.ConnID] = fmt.Sprint(i)
				}
				for connID, i := range first {
					b2.send(connID, i)
				}
				for i, p := range ps {
					p.wantFrame(fmt.Sprint(i))
				}
				silent.send(`"now"`)
				b2.send(b2.wantFrame(`"now"`), "7")
				silent.wantFrame("7")
				wantQuiet(t, b2.Peer)
			})
		})
	}
}

// A phone that sends more than the window waits with the rest, and loses nothing.
func TestGrace_NewPhone_FramesBeyondTheWindow(t *testing.T) {
	t.Parallel()
	eachPlacement(t, func(t *testing.T, phones, binaries *node) {
		id := newServerID()
		binaries.binary(id).Drop()
		binaries.wantEvent("server_released", nil)
		p := phones.phone(id)
		pad := strings.Repeat("x", 100_000)
		done := make(chan struct{})
		go func() {
			defer close(done)
			for i := range 30 {
				if err := p.Send(soon(t), fmt.Appendf(nil, "[%d,%q]", i, pad)); err != nil {
					t.Error(err)
					return
				}
			}
		}()
		pass(300 * time.Millisecond) // for the window to be full
		b := binaries.binary(id)
		for i := range 30 {
			b.wantFrame(fmt.Sprintf("[%d,%q]", i, pad))
		}
		<-done
	})
}

func TestGrace_NewPhone_BinaryStaysAway(t *testing.T) {
	t.Parallel()
	eachPlacement(t, func(t *testing.T, phones, binaries *node) {
		id := newServerID()
		binaries.binary(id).Drop()
		binaries.wantEvent("server_released", nil)
		p, silent := phones.phone(id), phones.phone(id)
		start := time.Now()
		p.send("1")
		p.wantClosed(4404, "binary is away")
		if took := time.Since(start); took < 7*time.Second || took > loaded(8*time.Second) {
			t.Errorf("closed after %v, want 8 s", took)
		}
		wantQuiet(t, silent.Peer)
	})
}

// A phone that gives up before its binary returns was never there.
func TestGrace_NewPhone_LeavesAgain(t *testing.T) {
	t.Parallel()
	eachPlacement(t, func(t *testing.T, phones, binaries *node) {
		id := newServerID()
		binaries.binary(id).Drop()
		binaries.wantEvent("server_released", nil)
		p := phones.phone(id)
		p.send("1")
		if err := p.Close(1000, ""); err != nil {
			t.Fatal(err)
		}
		phones.wantEvent("phone_unregistered", nil) // the echo comes before
		stays := phones.phone(id)
		stays.send("2")
		b := binaries.binary(id)
		b.wantFrame("2")
		wantQuiet(t, b.Peer)
		await(t, "one is attached", func() bool { return len(connIDs(phones.reg, id)) == 1 })
	})
}

func TestGrace_Over(t *testing.T) {
	t.Parallel()
	eachPlacement(t, func(t *testing.T, phones, binaries *node) {
		p, b, connID := meet(phones, binaries)
		id := b.serverID(connID)
		silent := phones.phone(id)
		b.Drop()
		binaries.wantEvent("server_released", nil)
		start := time.Now()
		late := phones.phone(id)
		for _, p := range []*testPhone{p, silent, late} {
			p.wantClosed(1000, "")
		}
		if took := time.Since(start); took < time.Second || took > loaded(2*time.Second) {
			t.Errorf("the grace took %v, want 2 s", took)
		}
		for _, n := range []*node{phones, binaries} {
			n.phone(id).wantClosed(4404, "no server with that id")
		}
		if got := binaries.metric("pyrycode_relay_grace_expiries_total"); got != "1" {
			t.Errorf("expiries: %s, want 1", got)
		}
		b2 := phones.binary(id)
		join(binaries, b2, id)
	}, graceOf(2*time.Second))
}

func TestGrace_BinaryReturns_OldGraceEndsNothing(t *testing.T) {
	t.Parallel()
	eachPlacement(t, func(t *testing.T, phones, binaries *node) {
		id := newServerID()
		binaries.binary(id).Drop()
		binaries.wantEvent("server_released", nil)
		b := phones.binary(id)
		p, connID := join(binaries, b, id)
		pass(4500 * time.Millisecond) // past the first grace
		p.send("1")
		b.wantFrame("1")
		b.send(connID, "2")
		p.wantFrame("2")
		join(phones, b, id)
		for _, n := range []*node{phones, binaries} {
			if got := n.metric("pyrycode_relay_grace_expiries_total"); got != "0" {
				t.Errorf("expiries: %s, want 0", got)
			}
		}
	}, graceOf(3*time.Second))
}

// A binary that flaps keeps its server-id.
func TestServer_Flapping_AlwaysReclaims(t *testing.T) {
	t.Parallel()
	nodes := newCluster(t, 2)
	id := newServerID()
	for i := range 30 {
		b := nodes[i%2].binary(id)
		p, connID := join(nodes[(i/2)%2], b, id)
		b.send(connID, "1")
		p.wantFrame("1")
		b.Drop()
		// Until the drop is noticed, a phone may yet be given to the dead binary.
		await(t, "the release", func() bool { return len(nodes[i%2].log.all("server_released")) == i/2+1 })
	}
}
