package gateway

import (
	"io"
	"slices"
	"strings"
	"testing"
	"time"
)

func heartbeatOf(interval, timeout time.Duration) func(*settings) {
	return func(s *settings) { s.gateway.PingInterval, s.gateway.PongTimeout = interval, timeout }
}

func TestHeartbeat_NoPong_1011(t *testing.T) {
	t.Parallel()
	eachPlacement(t, func(t *testing.T, phones, binaries *node) {
		p, b, connID := meet(phones, binaries)
		near, nearID := join(binaries, b, b.serverID(connID))
		p.Pause()
		b.wantNotice(connID, 1011)
		p.Unpause()
		p.wantClosed(1011, "heartbeat timeout")
		b.send(nearID, "1")
		near.wantFrame("1")

		b.Pause()
		await(t, "the close", func() bool {
			return slices.ContainsFunc(binaries.gw.all(), func(c *conn) bool {
				_, closing := c.out.closed()
				return c.kind == kindBinary && closing
			})
		})
		b.Unpause()
		b.wantClosed(1011, "heartbeat timeout")
		wantQuiet(t, near.Peer)
	}, heartbeatOf(300*time.Millisecond, 400*time.Millisecond))
}

func TestHeartbeat_KeepsWhoAnswers(t *testing.T) {
	t.Parallel()
	eachPlacement(t, func(t *testing.T, phones, binaries *node) {
		p, b, connID := meet(phones, binaries)
		pass(1500 * time.Millisecond) // a dozen pings
		p.send("1")
		b.wantFrame("1")
		b.send(connID, "2")
		p.wantFrame("2")
	}, heartbeatOf(120*time.Millisecond, 400*time.Millisecond))
}

// Every connection gets its ping in every interval, by the raw bytes.
func TestHeartbeat_PingsEachInterval(t *testing.T) {
	t.Parallel()
	n := newCluster(t, 1, heartbeatOf(300*time.Millisecond, 5*time.Second))[0]
	id := newServerID()
	n.binary(id)
	for range 3 {
		c := n.rawDial(id)
		c.SetReadDeadline(time.Now().Add(patience))
		var last time.Time
		for i := range 4 {
			var head [2]byte
			if _, err := io.ReadFull(c, head[:]); err != nil {
				t.Fatal(err)
			}
			if head[0] != 0x89 {
				t.Fatalf("got frame %x, want a ping", head)
			}
			payload := make([]byte, head[1])
			if _, err := io.ReadFull(c, payload); err != nil {
				t.Fatal(err)
			}
			if _, err := c.Write(maskedFrame(0x8a, payload)); err != nil {
				t.Fatal(err)
			}
			if since := time.Since(last); i > 0 && (since < 100*time.Millisecond || since > 3*time.Second) {
				t.Errorf("%v between two pings, want 300ms", since)
			}
			last = time.Now()
		}
		c.Close()
	}
}

// The loop ends with the last connection and starts with the next.
func TestHeartbeat_LoopComesAndGoes(t *testing.T) {
	t.Parallel()
	n := newCluster(t, 1, heartbeatOf(30*time.Millisecond, time.Second))[0]
	beating := func() bool {
		n.gw.mu.Lock()
		defer n.gw.mu.Unlock()
		return n.gw.beating
	}
	for range 20 {
		p := n.phone("nobody")
		p.wantClosed(4404, "no server with that id")
		await(t, "the loop has ended", func() bool { return !beating() })
	}
	b := n.binary("somebody")
	await(t, "the loop has begun", beating)
	b.Drop()
	await(t, "the loop has ended", func() bool { return !beating() })
}

// A phone's ping is answered while it is served, and a parked binary's too.
func TestHeartbeat_PingsAreAnswered(t *testing.T) {
	t.Parallel()
	eachPlacement(t, func(t *testing.T, phones, binaries *node) {
		p, b, connID := meet(phones, binaries)
		for range 50 {
			if err := p.Ping(soon(t)); err != nil {
				t.Fatal(err)
			}
			b.send(connID, `"`+strings.Repeat("x", 50_000)+`"`)
			if err := b.Ping(soon(t)); err != nil {
				t.Fatal(err)
			}
		}
	})
}
