package gateway

import (
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/pyrycode/pyrycode-relay/testenv"
)

// Two binaries have one server-id, and the one that lost redials without a pause. It
// meets 4409, then an HTTP status; the cluster writes nothing, the log has a line a
// minute, and nobody else notices.
func TestFight_LoserIsHeldBack(t *testing.T) {
	t.Parallel()
	eachPlacement(t, func(t *testing.T, rivals, holders *node) {
		p, b, connID := meet(rivals, holders)
		id := b.serverID(connID)
		before := rivals.kvWrites()
		start := time.Now()
		conflicts, refused := 0, 0
		for range 2 * claimBurst {
			rival, err := rivals.dialBinary(id)
			if err == nil {
				rival.wantClosed(4409, "server-id already claimed")
				conflicts++
				continue
			}
			wantRetryAfter(t, wantRefused(t, err, http.StatusTooManyRequests))
			refused++
		}
		if most := claimBurst + int(time.Since(start)/claimInterval) + 1; conflicts < claimBurst-2 || conflicts > most {
			t.Errorf("%d claims passed, want %d to %d", conflicts, claimBurst-2, most)
		}
		if writes := rivals.kvWrites() - before; writes != 0 {
			t.Errorf("%d KV writes, want none", writes)
		}
		for _, event := range []string{"server_id_conflict", "server_id_contended"} {
			if got := rivals.log.all(event); len(got) != 1 || got[0].attrs["server_id"] != id {
				t.Errorf("%s: got %v, want one line with the server-id", event, got)
			}
		}
		if got := rivals.metric(`pyrycode_relay_register_failures_total{kind="contended"}`); got != strconv.Itoa(refused) {
			t.Errorf("contended: %s, want %d", got, refused)
		}
		p.send("1")
		b.wantFrame("1")
		wantQuiet(t, p.Peer)
		wantQuiet(t, b.Peer)
		wantQuiet(t, rivals.binary(newServerID()).Peer)
	})
}

// Both redial without a pause, and whoever wins is gone at once: what a crash loop does.
// Each takes the server-id from the other again and again, and yet a node lets only so
// many claims pass, each with four KV writes at most.    (docs/guarantees.md)
func TestFight_BothRedialWithoutPause(t *testing.T) {
	t.Parallel()
	const refusals = 100 // until each has met so many; a machine that is busy lets claims pass slowly
	for _, count := range []int{1, 2} {
		t.Run(fmt.Sprint(count, "Nodes"), func(t *testing.T) {
			t.Parallel()
			nodes := newCluster(t, count)
			id := newServerID()
			before, start := nodes[0].kvWrites(), time.Now()
			var won, refused [2]int
			var fighters sync.WaitGroup
			for i := range won {
				fighters.Go(func() { won[i], refused[i] = nodes[i%count].fight(id, refusals) })
			}
			fighters.Wait()
			took := time.Since(start)
			claims := count * (claimBurst + int(took/claimInterval) + 1)
			t.Logf("in %v: won %v, refused %v; %d claims may pass", took, won, refused, claims)
			if won[0] == 0 || won[1] == 0 || won[0]+won[1] > claims {
				t.Errorf("claims passed: %v, want some of each and %d at most", won, claims)
			}
			if refused != [2]int{refusals, refusals} {
				t.Errorf("refused: %v, want each %d times", refused, refusals)
			}
			for _, n := range nodes {
				for _, event := range []string{"server_id_conflict", "server_id_contended"} {
					if got := n.log.all(event); len(got) > 1 {
						t.Errorf("%s: %d lines in %v, want one a minute at most", event, len(got), took)
					}
				}
				if n.metric(`pyrycode_relay_register_failures_total{kind="contended"}`) == "0" {
					t.Error("nothing was contended, want it counted")
				}
			}
			if writes := nodes[0].kvWrites() - before; writes == 0 || writes > uint64(4*claims) {
				t.Errorf("%d KV writes, want some, and %d at most", writes, 4*claims)
			}
			var peace *testBinary // when the fight is over somebody gets it
			await(t, "the server-id", func() bool {
				b, err := nodes[0].dialBinary(id)
				peace = b
				return err == nil
			})
			join(nodes[count-1], peace, id)
		})
	}
}

// fight dials for id without a pause until it has been refused so many times, and lets
// go whatever it wins.
func (n *node) fight(id string, refusals int) (won, refused int) {
	n.t.Helper()
	for end := time.Now().Add(2 * patience); refused < refusals && time.Now().Before(end); {
		b, err := testenv.DialBinary(soon(n.t), n.url, testenv.BinaryOptions{ServerID: id})
		if err == nil {
			won++
			b.Drop()
			continue
		}
		wantRefused(n.t, err, http.StatusTooManyRequests)
		refused++
	}
	return won, refused
}

// What happens again and again is logged once a minute for each server-id, and in the
// next minute again.
func TestFight_IsLoggedOnceAMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const minutes = 3
		rec := &recorder{}
		g := &Gateway{log: slog.New(rec), contention: newContention()}
		g.metrics = newMetrics(g)
		b, other := &binary{serverID: newServerID()}, &binary{serverID: newServerID()}
		begun := time.Now()
		for time.Since(begun) < minutes*time.Minute {
			for range 10 {
				_ = g.contended(b)
				g.conflicted(b)
			}
			advanceBubble(100 * time.Millisecond)
		}
		want := slices.Repeat([]string{b.serverID}, minutes)
		for _, event := range []string{"server_id_conflict", "server_id_contended"} {
			var ids []string
			var last time.Time
			for _, e := range rec.all(event) {
				ids = append(ids, e.attrs["server_id"])
				if !last.IsZero() && e.at.Sub(last) < time.Minute {
					t.Errorf("%s: two lines in %v, want a minute between them", event, e.at.Sub(last))
				}
				last = e.at
			}
			if !slices.Equal(ids, want) {
				t.Errorf("%s in %d minutes: lines for %v, want %v", event, minutes, ids, want)
			}
		}
		g.conflicted(other)
		if got := rec.all("server_id_conflict"); len(got) != minutes+1 || got[minutes].attrs["server_id"] != other.serverID {
			t.Errorf("another server-id: %d lines, want one of its own", len(got)-minutes)
		}
	})
}

// kvWrites is how many writes the presence bucket has seen.
func (n *node) kvWrites() uint64 {
	n.t.Helper()
	nc, err := nats.Connect(n.set.nats)
	if err != nil {
		n.t.Fatal(err)
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		n.t.Fatal(err)
	}
	stream, err := js.Stream(soon(n.t), "KV_"+n.set.registry.KVPrefix+"_presence")
	if err != nil {
		n.t.Fatal(err)
	}
	return stream.CachedInfo().State.LastSeq
}
