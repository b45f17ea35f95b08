package registry

import (
	"testing"
	"time"

	"github.com/pyrycode/pyrycode-relay/bus"
)

// A phone whose node did not hear the answer asks again: the later attempt takes the
// place of the earlier one, in the attach table too, and an attempt that comes late
// takes nobody's.
func TestPhoneAsksTwice_TheLaterAttemptCounts(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		s.cfg.MaxPhones = 1
		ns := s.three()
		b := ns[2].mustClaim("id")
		p := ns[0].mustDial("id")
		in := newInbox()
		again := ns[1].Bus().NewLink("id", p.id, in)
		open := func() error { return ns[1].Bus().Open(t.Context(), again, ns[2].id, b.session()) }

		wantErr(t, "an attempt as old as the one in use", open(), bus.ErrNoSession)
		p.send(t, "one")
		eventually(t, time.Second, "frame", func() bool { return len(b.in.got()) == 1 })
		wantQuiet(t, "end of the phone", p.in.ends)

		wantErr(t, "a later attempt", open(), nil)
		wantErr(t, "the earlier one", within(t, 5*time.Second, "end", p.in.ends), bus.ErrLinkLost)
		if err := again.Send(append(make([]byte, bus.Headroom), markFrame+"two"...)); err != nil {
			t.Fatal(err)
		}
		eventually(t, time.Second, "frame", func() bool { return len(b.in.got()) == 2 })
		wantQuiet(t, "notice of the earlier attempt", b.in.ends)
		_, err := ns[0].dial("id")
		wantErr(t, "a second phone", err, ErrTooManyPhones)
		again.Close(bus.CodeError(1000))
		wantErr(t, "the notice", within(t, 5*time.Second, "notice", b.in.ends), bus.CodeError(1000))
	})
}
