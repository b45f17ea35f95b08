package gateway

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/pyrycode/pyrycode-relay/testenv"
)

// The life of a session on three gateways beside a NATS cluster, with three
// replicas.
func TestCluster_ThreeServers(t *testing.T) {
	t.Parallel()
	c, err := testenv.StartCluster(testenv.ClusterOptions{Detector: detector})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	prefix := fmt.Sprintf("test%d", clusters.Add(1))
	nodes := make([]*node, 3)
	for i := range nodes {
		nodes[i] = newNode(t, prefix, func(s *settings) {
			s.nats, s.registry.KVReplicas = c.URLs()[i], 3
			s.registry.Grace, s.registry.ProbeTimeout = 5*time.Second, 3*time.Second
		})
	}
	for _, n := range nodes {
		n.awaitReady()
	}

	t.Run("Routes", func(t *testing.T) {
		id := newServerID()
		nodes[1].phone(id).wantClosed(4404, "no server with that id")
		b := nodes[0].binary(id)
		for _, n := range nodes {
			p, connID := join(n, b, id)
			b.send(connID, "1")
			p.wantFrame("1")
			b.sendClose(connID, 4000, `"bye"`)
			p.wantFrame(`"bye"`)
			p.wantClosed(4000, "")
		}
	})
	t.Run("Conflict", func(t *testing.T) {
		id := newServerID()
		nodes[0].binary(id)
		for _, n := range nodes {
			n.binary(id).wantClosed(4409, "server-id already claimed")
		}
	})
	t.Run("PhoneAfter101", func(t *testing.T) {
		for i := range 12 { // the replica that is asked may not know yet
			id := newServerID()
			b := nodes[i%3].binary(id)
			join(nodes[(i+1)%3], b, id)
			join(nodes[(i+2)%3], b, id)
		}
	})
	t.Run("Reclaim", func(t *testing.T) {
		id := newServerID()
		b := nodes[0].binary(id)
		old, _ := join(nodes[1], b, id)
		b.Drop()
		nodes[0].wantEvent("server_released", map[string]string{"server_id": id})
		fresh := nodes[2].phone(id)
		fresh.send(`"fresh"`)
		b = nodes[2].binary(id)
		b.wantFrame(`"fresh"`)
		old.wantClosed(4404, "binary reclaimed server-id")
		join(nodes[0], b, id)
	})
	t.Run("GraceOver", func(t *testing.T) {
		id := newServerID()
		b := nodes[0].binary(id)
		p, _ := join(nodes[1], b, id)
		b.Drop()
		p.wantClosed(1000, "")
		nodes[2].phone(id).wantClosed(4404, "no server with that id")
	})
	t.Run("Takeover", func(t *testing.T) {
		id := newServerID()
		b := nodes[0].binary(id)
		p, _ := join(nodes[1], b, id)
		b.Pause()
		b2 := nodes[2].binary(id)
		p.wantClosed(4404, "binary reclaimed server-id")
		b.Unpause()
		b.wantClosed(1011, "heartbeat timeout")
		join(nodes[0], b2, id)
	})
}

// A gateway is killed: its binary is elsewhere within a second and is not told
// 4409, and phones attached through it are told within five.
func TestCluster_GatewayKilled(t *testing.T) {
	t.Parallel()
	nodes := newCluster(t, 3)
	p, b, connID := meet(nodes[1], nodes[0])
	id := b.serverID(connID)
	_, b2, connID2 := meet(nodes[0], nodes[1]) // a phone of the gateway that dies
	nodes[0].crash()
	killed := time.Now()
	moved := nodes[2].binary(id)
	if took := time.Since(killed); took > loaded(time.Second) {
		t.Errorf("the binary waited %v", took)
	}
	b2.wantNotice(connID2, 1001)
	if took := time.Since(killed); took > loaded(5*time.Second) {
		t.Errorf("the notice took %v", took)
	}
	info, err := p.Closed(soon(t))
	if took := time.Since(killed); err != nil || info.Code != 4404 || took > loaded(5*time.Second) {
		t.Errorf("the phone: %v, %v, after %v", info, err, took)
	}
	join(nodes[1], moved, id)
	join(nodes[2], moved, id)
	wantQuiet(t, moved.Peer)
}

// The same without a binary that returns: later phones are told 4404 in time.
func TestCluster_GatewayKilled_NobodyReturns(t *testing.T) {
	t.Parallel()
	nodes := newCluster(t, 2)
	p, b, connID := meet(nodes[1], nodes[0])
	nodes[0].crash()
	start := time.Now()
	late, err := nodes[1].dialPhone(b.serverID(connID))
	if took := time.Since(start); took > loaded(5*time.Second) {
		t.Errorf("the upgrade took %v, want 5 s at most", took)
	}
	var refused *testenv.RefusedError
	switch {
	case err == nil:
		if info, err := late.Closed(soon(t)); err != nil || info.Code != 4404 {
			t.Errorf("a late phone: %v, %v, want 4404", info, err)
		}
	case !errors.As(err, &refused) || refused.Status != 503:
		t.Errorf("a late phone: %v", err)
	}
	info, err := p.Closed(soon(t))
	if took := time.Since(start); err != nil || info.Code != 4404 || info.Reason != "binary's gateway is gone" || took > loaded(5*time.Second) {
		t.Errorf("the phone: %v, %v, after %v", info, err, took)
	}
}
