package gateway

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pyrycode/pyrycode-relay/testenv"
)

func (n *node) drain(within time.Duration) time.Duration {
	start := time.Now()
	n.reg.Drain()
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	n.gw.Shutdown(ctx)
	return time.Since(start)
}

func TestDrain_Everybody1001(t *testing.T) {
	t.Parallel()
	eachPlacement(t, func(t *testing.T, phones, binaries *node) {
		p, b, connID := meet(phones, binaries)
		b.send(connID, `"last"`)
		p.wantFrame(`"last"`)
		if took := phones.drain(8 * time.Second); took > loaded(time.Second) {
			t.Errorf("it took %v", took)
		}
		p.wantClosed(1001, "shutting down")
		if phones == binaries {
			for {
				_, err := b.Next(soon(t))
				if info := (testenv.CloseInfo{}); errors.As(err, &info) {
					if info.Code != 1001 || info.Reason != "shutting down" {
						t.Errorf("binary: %v", info)
					}
					break
				}
			}
		} else {
			b.wantNotice(connID, 1001)
			wantQuiet(t, b.Peer)
		}
		_, err := phones.dialPhone(b.serverID(connID))
		wantRetryAfter(t, wantRefused(t, err, 503))
		_, err = phones.dialBinary(b.serverID(connID))
		wantRetryAfter(t, wantRefused(t, err, 503))
	})
}

// A binary's gateway drains: the binary is at another one at once, and its phones
// there are told.
func TestDrain_BinaryMoves(t *testing.T) {
	t.Parallel()
	nodes := newCluster(t, 2)
	p, b, connID := meet(nodes[0], nodes[1])
	id := b.serverID(connID)
	go nodes[1].drain(8 * time.Second)
	b.wantClosed(1001, "shutting down")
	b2 := nodes[0].binary(id)
	p.wantClosed(4404, "binary reclaimed server-id")
	join(nodes[0], b2, id)
}

func TestDrain_GatewayGoes_PhonesElsewhereAreTold(t *testing.T) {
	t.Parallel()
	nodes := newCluster(t, 2)
	p, b, _ := meet(nodes[0], nodes[1])
	nodes[1].stop()
	b.wantClosed(1001, "shutting down")
	info, err := p.Closed(soon(t))
	if err != nil || info.Code != 4404 {
		t.Errorf("phone: %v, %v, want 4404", info, err)
	}
}

// Peers that take nothing do not hold it up.
func TestDrain_StuckPeers_WithinItsTime(t *testing.T) {
	t.Parallel()
	eachPlacement(t, func(t *testing.T, phones, binaries *node) {
		id := newServerID()
		b := binaries.binary(id)
		var stuck []string
		for range 8 {
			p, connID := join(phones, b, id)
			p.Pause()
			stuck = append(stuck, connID)
		}
		frame := `"` + strings.Repeat("x", 200_000) + `"`
		for range 15 {
			for _, connID := range stuck {
				b.send(connID, frame)
			}
		}
		b.Pause()
		if took := phones.drain(time.Second); took > loaded(time.Second) {
			t.Errorf("it took %v, want 1 s", took)
		}
		await(t, "the end of what was dropped", func() bool {
			phones.gw.mu.Lock()
			defer phones.gw.mu.Unlock()
			return phones.gw.open == 0
		})
		phones.wantNothingLeft()
		b.Unpause()
	}, func(s *settings) { s.gateway.WriteTimeout = time.Hour }) // it does not end them
}

// Nor does a KV that answers nothing.
func TestDrain_KVIsSilent_WithinItsTime(t *testing.T) {
	t.Parallel()
	server := startNATS(t)
	n := newCluster(t, 1, func(s *settings) { s.nats = server.URL() })[0]
	for range 3 {
		_, b, _ := meet(n, n)
		b.Pause()
	}
	server.Isolate()
	if took := n.drain(500 * time.Millisecond); took > 3500*time.Millisecond { // one that waits for the KV takes longer
		t.Errorf("it took %v, want 1.5 s", took)
	}
	server.Heal()
	await(t, "the releases", func() bool {
		n.gw.mu.Lock()
		defer n.gw.mu.Unlock()
		return n.gw.open == 0
	})
}

// Upgrades that are under way when it begins are answered, and nobody stays.
func TestDrain_WhilePeersCome(t *testing.T) {
	t.Parallel()
	eachPlacement(t, func(t *testing.T, phones, binaries *node) {
		id := newServerID()
		binaries.binary(id)
		var wg sync.WaitGroup
		for i := range 8 {
			wg.Go(func() {
				for {
					var err error
					var p *testenv.Peer
					if i%2 == 0 {
						var phone *testenv.Phone
						if phone, err = testenv.DialPhone(soon(t), phones.url, testenv.PhoneOptions{ServerID: id}); err == nil {
							p = phone.Peer
						}
					} else {
						var b *testenv.Binary
						if b, err = testenv.DialBinary(soon(t), phones.url, testenv.BinaryOptions{ServerID: newServerID()}); err == nil {
							p = b.Peer
						}
					}
					if err != nil {
						wantRefusedStatus(t, err, 503)
						return
					}
					if i%4 < 2 {
						p.Drop()
						continue
					}
					info, err := p.Closed(soon(t))
					if err != nil {
						t.Error(err)
						return
					}
					if info.Code != 1001 && info.Code != 4429 && info.Code != 4409 {
						t.Errorf("peer %d: %v", i, info)
					}
				}
			})
		}
		pass(50 * time.Millisecond)
		phones.drain(8 * time.Second)
		wg.Wait()
		phones.wantNothingLeft()
	})
}

// Connections are closed in batches, so that the gateways which their peers dial
// next do not meet all of them at once; and a gateway with many is not later.
func TestDrain_InBatches(t *testing.T) {
	for name, tt := range map[string]struct {
		conns, batch int
		time         time.Duration // what the caller gives
		want         time.Duration // until the last is closed
	}{
		"Few":        {drainBatch - 1, drainBatch, time.Minute, 0},
		"Some":       {5 * drainBatch, drainBatch, time.Minute, 4 * drainPause},
		"Many":       {3*drainBatch*drainSteps + drainSteps - 1, 3 * drainBatch, time.Minute, drainSteps * drainPause},
		"LittleTime": {drainBatch * drainSteps, drainBatch, 10 * drainPause, 10 * drainPause},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := &Gateway{}
				start := time.Now()
				closed := make(map[time.Duration]int) // so many at that time
				for i := range g.slots {
					g.slots[i] = make(map[*conn]struct{})
				}
				for i := range tt.conns {
					c := &conn{slot: i % heartbeatSlots}
					c.init(g, kindPhone, "c", func(code int) {
						if code != 1001 {
							t.Errorf("closed %d, want 1001", code)
						}
						closed[time.Since(start)]++
						delete(g.slots[c.slot], c)
					})
					g.slots[c.slot][c] = struct{}{}
				}
				ctx, cancel := context.WithTimeout(t.Context(), tt.time)
				defer cancel()
				g.Shutdown(ctx)
				all, last := 0, time.Duration(0)
				for at, n := range closed {
					all, last = all+n, max(last, at)
					if n > tt.batch && at < tt.time {
						t.Errorf("%d closed at once after %v, want %d at most", n, at, tt.batch)
					}
				}
				if all != tt.conns || last != tt.want {
					t.Errorf("closed %d of %d, the last after %v, want %v", all, tt.conns, last, tt.want)
				}
			})
		})
	}
}
