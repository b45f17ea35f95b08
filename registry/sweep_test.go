package registry

import (
	"context"
	"testing"
	"time"

	"github.com/pyrycode/pyrycode-relay/bus"
)

// removeID deletes the key of the server-id "id" by hand.
func (s *scene) removeID() {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	kv, err := s.js.KeyValue(ctx, s.cfg.KVPrefix+"_presence")
	if err == nil {
		err = kv.Delete(ctx, "id")
	}
	if err != nil {
		s.t.Fatal(err)
	}
}

func TestEntryDeleted_IsWrittenAgain(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		ns := s.three()
		b := ns[0].mustClaim("id")
		p := ns[1].mustDial("id")
		s.removeID()
		eventually(t, sweepEvery+time.Second, "entry there again", func() bool { _, ok := s.entry("id"); return ok })
		s.wantHolder(b)
		wantQuiet(t, "eviction", b.evicted)
		wantQuiet(t, "end of the phone", p.in.ends)
	})
}

func TestAnotherSessionInTheKV_DisplacesTheHolder(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		ns := s.three()
		b := ns[0].mustClaim("id")
		p := ns[1].mustDial("id")
		s.write("id", entry{Node: ns[1].id, Session: bus.NewSessionID(), State: stateHeld}.encode())
		wantErr(t, "eviction", within(t, sweepEvery+time.Second, "eviction", b.evicted), ErrDisplaced)
		wantErr(t, "its phone", within(t, 2*time.Second, "end", p.in.ends), bus.ErrReclaimed)
		b.release()
		if e, _ := s.entry("id"); e.State != stateHeld || e.Node != ns[1].id {
			t.Errorf("entry: got %+v, want the other session's", e)
		}
		wantQuiet(t, "a second eviction", b.evicted)
	})
}

// A node that was frozen for longer than its lease still has its ends of links
// that the others have ended: it finds out when its lease is back.
func TestFrozenNode_EndsLinksThatTheOthersForgot(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		ns := s.three()
		ns[0].mustClaim("id")
		p := ns[1].mustDial("id")
		ns[0].bus.EndNode(ns[1].id) // as it does when a lease is gone
		wantQuiet(t, "end of the phone", p.in.ends)
		ns[1].lease.mu.Lock()
		ns[1].lease.renewed = time.Now().Add(-ns[1].cfg.LeaseTTL) // the clock went on while it was frozen
		ns[1].lease.mu.Unlock()
		nudge(ns[1].renewNow)
		wantErr(t, "the phone", within(t, 5*time.Second, "end", p.in.ends), bus.ErrLinkLost)
		ns[1].mustDial("id")
	})
}
