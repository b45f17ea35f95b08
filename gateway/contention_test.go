package gateway

import (
	"net/http"
	"strconv"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
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
