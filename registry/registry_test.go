package registry

import (
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/pyrycode/pyrycode-relay/bus"
)

func TestHostileServerIDs_AreTenantsOfTheirOwn(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		ns := s.three()
		random := make([]byte, bus.MaxServerID)
		_, _ = rand.Read(random)
		ids := []string{"*", ">", "a.b", "a", "b", "a.*", ".", "..", " x y ", "x y", "=", "=2A", "$KV", "\x00\r\n", "Ä", string(random), strings.Repeat(">", bus.MaxServerID)}
		held := make(map[string]*binary)
		for i, id := range ids {
			held[id] = ns[i%3].mustClaim(id)
		}
		for i, id := range ids {
			s.wantHolder(held[id])
			p := ns[(i+1)%3].mustDial(id)
			p.send(t, "to "+id)
		}
		for _, id := range ids {
			eventually(t, 2*time.Second, "frame", func() bool { return len(held[id].in.got()) > 0 })
			if got := held[id].in.got(); len(got) != 1 || got[0] != "to "+id {
				t.Errorf("%q got %q, want its own frame", id, got)
			}
			_, err := ns[0].claim(id)
			wantErr(t, fmt.Sprintf("second claim of %q", id), err, ErrServerIDConflict)
		}
		stream, err := s.js.Stream(t.Context(), "KV_"+s.cfg.KVPrefix+"_presence")
		if err != nil {
			t.Fatal(err)
		}
		info, err := stream.Info(t.Context(), jetstream.WithSubjectFilter(">"))
		if err != nil {
			t.Fatal(err)
		}
		if got := len(info.State.Subjects); got != len(ids) {
			t.Errorf("keys: got %d, want %d: %v", got, len(ids), info.State.Subjects)
		}
	})
}

// What a peer brings along stays out of the KV.
func TestKV_HoldsNoAddressNoNameNoConnID(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		ns := s.three()
		sub, err := s.nc.SubscribeSync("$KV.>")
		if err != nil {
			t.Fatal(err)
		}
		if err := s.nc.Flush(); err != nil {
			t.Fatal(err)
		}
		b := ns[0].newBinary("id")
		b.id = "SECRET-binary"
		long := strings.Repeat("v", maxVersionText-1) + "Ä-SECRET"
		if err := b.claim(WithRemote("SECRET-203.0.113.9"), WithVersion(long)); err != nil {
			t.Fatal(err)
		}
		p := &testPhone{fakeConn: newConn(), at: ns[1], serverID: "id", in: newInbox()}
		p.id = "SECRET-phone"
		p.link = ns[1].Bus().NewLink("id", p.id, p.in)
		if err := ns[1].RegisterPhone("id", p, WithLink(p.link), WithRemote("SECRET-203.0.113.9")); err != nil {
			t.Fatal(err)
		}
		p.send(t, "SECRET-frame")
		eventually(t, 2*time.Second, "frame", func() bool { return len(b.in.got()) == 1 })
		e, _ := s.entry("id")
		if want := strings.Repeat("v", maxVersionText-1); e.Version != want {
			t.Errorf("version: got %q, want %q", e.Version, want)
		}
		b.release()
		last := ns[2].mustClaim("id", WithRemote("SECRET-203.0.113.9"))
		for {
			m, err := sub.NextMsg(time.Second)
			if err != nil {
				t.Fatalf("the second claim's entry has not come: %v", err)
			}
			if strings.Contains(fmt.Sprint(m.Subject, m.Header, string(m.Data)), "SECRET") {
				t.Errorf("%s %v: %s", m.Subject, m.Header, m.Data)
			}
			if strings.HasPrefix(m.Subject, "$KV."+s.cfg.KVPrefix+"_presence.") && strings.Contains(string(m.Data), last.session().String()) {
				return
			}
		}
	})
}

func TestPlainConn_IsServedWithoutOptions(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		ns := s.three()
		b, p := &sendConn{fakeConn: newConn()}, newConn()
		b.sent = make(chan string, 4)
		if err := ns[0].ClaimServer("id", b); err != nil {
			t.Fatal(err)
		}
		if err := ns[1].RegisterPhone("id", p); err != nil {
			t.Fatal(err)
		}
		q := ns[1].mustDial("id")
		q.send(t, "hello")
		if got := within(t, 2*time.Second, "frame", b.sent); got != "hello" {
			t.Errorf("frame: got %q, want hello", got)
		}
		// Another session takes the server-id: both are closed by default.
		s.write("id", entry{Node: ns[2].id, Session: bus.NewSessionID(), State: stateHeld}.encode())
		within(t, sweepEvery+2*slack, "the binary closed", b.closed)
		within(t, 2*time.Second, "the phone closed", p.closed)
	})
}

type sendConn struct {
	*fakeConn
	sent chan string
}

func (c *sendConn) Send(p []byte) error { c.sent <- unmarked(p); return nil }

func TestStop_TellsPhonesAndEndsEverything(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		ns := s.three()
		b := ns[0].mustClaim("id")
		left := ns[0].mustClaim("left") // not released
		phones := []*testPhone{ns[1].mustDial("id"), ns[2].mustDial("left")}
		b.release()
		ns[0].Drain()
		ns[0].Stop(t.Context())
		for i, p := range phones {
			wantErr(t, fmt.Sprintf("phone %d", i), within(t, 2*time.Second, "its end", p.in.ends), bus.ErrNodeGone)
		}
		ns[0].Taken("id", bus.SessionID{}) // late messages start nothing
		ns[0].spawn(func() { t.Error("spawned after Stop") })
		left.release()
		wantQuiet(t, "eviction", left.evicted)
		if _, err := ns[0].claim("id"); !errors.Is(err, ErrNotReady) {
			t.Errorf("claim after Stop: got %v, want %v", err, ErrNotReady)
		}
		eventually(t, 2*time.Second, "nobody responds", func() bool {
			return errors.Is(ns[1].Bus().Hello(t.Context(), ns[0].id), bus.ErrNoResponders)
		})
		for _, id := range []string{"id", "left"} {
			start := time.Now()
			s.wantHolder(ns[1].mustClaim(id, WithoutProbe()))
			if d := time.Since(start); d > time.Second {
				t.Errorf("claim of %q took %s", id, d)
			}
		}
	})
}

// The lease ends by itself: a NATS that is silent does not keep a node from ending.
func TestStop_NATSHoldsBytes_EndsSoon(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		n := s.node()
		n.proxy.Hold()
		start := time.Now()
		n.Stop(t.Context())
		if took := time.Since(start); took > dropTimeout+slack {
			t.Errorf("Stop took %s, want about %s", took, dropTimeout)
		}
	})
}
