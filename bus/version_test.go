package bus

import (
	"errors"
	"fmt"
	"sync"
	"testing"

	"github.com/nats-io/nats.go"

	"github.com/pyrycode/pyrycode-relay/testenv"
)

// Nodes of two releases over one NATS, with each end on either: a link uses the
// highest version that both speak, and where there is none the phone is refused.
func TestVersions_OfTwoReleasesMeet(t *testing.T) {
	t.Parallel()
	first, second, third := Versions{1, 1}, Versions{1, 2}, Versions{2, 3}
	for _, c := range []struct {
		phones, binaries Versions
		want             uint8 // 0: refused
	}{
		{first, first, 1}, {second, second, 2}, {third, third, 3},
		{first, second, 1}, {second, first, 1}, // a rolling upgrade
		{second, third, 2}, {third, second, 2}, // the next one
		{first, third, 0}, {third, first, 0}, // two steps at once
	} {
		t.Run(fmt.Sprintf("%v meets %v", c.phones, c.binaries), func(t *testing.T) {
			t.Parallel()
			r := newRigSpeaking(t, c.phones, c.binaries)
			seen := r.watchVersions()
			if c.want == 0 {
				r.held.lets(r.newReceiver(), false)
				p := r.phones.NewLink("s", "c", r.newReceiver())
				if err := r.phones.Open(t.Context(), p, r.binaries.Node(), r.session); !errors.Is(err, ErrVersion) {
					t.Errorf("Open: %v, want ErrVersion", err)
				}
				p.Close(CodeError(1000))
				r.empty()
				return
			}
			phone, binary := r.newReceiver(), r.newReceiver()
			p, b := r.connect(phone, binary)
			sendAll(t, p, "1", "2")
			sendAll(t, b, "a", "b")
			binary.wants("1", "2")
			phone.wants("a", "b")
			p.Close(CodeError(4001))
			if err := binary.ended(); !errors.Is(err, CodeError(4001)) {
				t.Errorf("ended with %v, want 4001", err)
			}
			r.empty()
			seen.want(c.want)
			if n := r.phones.Malformed() + r.binaries.Malformed(); n > 0 {
				t.Errorf("%d messages were not understood", n)
			}
		})
	}
}

// What needs no link, and the visible end of one, is understood by every release.
func TestVersions_TooFarApart_StillHearEachOther(t *testing.T) {
	t.Parallel()
	r := newRigSpeaking(t, Versions{1, 1}, Versions{7, 8})
	if err := r.phones.Hello(t.Context(), r.binaries.Node()); err != nil {
		t.Errorf("Hello: %v", err)
	}
	r.phones.Taken(r.binaries.Node(), "taken", r.session)
	if got := <-r.held.taken; got != "taken" {
		t.Errorf("Taken for %q", got)
	}
	for kind, answer := range map[Kind]Kind{KindReset: KindAck, KindOpen: KindRefuse} {
		m := Message{Kind: kind, Link: 7, Session: r.session, Seq: r.phones.versions.offer(), Payload: joinOpen(r.phones.Node(), "c")}
		got, err := r.phones.request(t.Context(), tokenSubject(r.binaries.Node(), topicServer, "s"), m)
		if err != nil || got.Kind != answer {
			t.Errorf("%s is answered with %s, %v, want %s", kind, got.Kind, err, answer)
		}
	}
}

// An ACCEPT that names a version which was not offered comes from no relay.
func TestOpen_AcceptedInAVersionNobodyOffered(t *testing.T) {
	t.Parallel()
	r := newNATSRig(t)
	nc := r.listener()
	const node = NodeID("liar-00000000")
	_, err := nc.Subscribe(nodeWildcard(node), func(m *nats.Msg) {
		if m.Reply != "" {
			_ = m.Respond((&Message{Kind: KindAccept, Seq: 9, Credit: 1000}).encode())
		}
	})
	if err == nil {
		err = nc.Flush()
	}
	if err != nil {
		t.Fatal(err)
	}
	p := r.phones.NewLink("s", "c", r.newReceiver())
	if err := r.phones.Open(t.Context(), p, node, r.session); !errors.Is(err, errMalformed) {
		t.Errorf("Open: %v, want errMalformed", err)
	}
	p.Close(CodeError(1000))
	r.empty()
}

func newRigSpeaking(t *testing.T, phones, binaries Versions) *rig {
	t.Helper()
	r := &rig{T: t, session: NewSessionID(), url: startNATS(t, testenv.ServerOptions{}).URL()}
	r.phones, r.mover = startBusOver(t, r.url, testConfig, phones, nil)
	r.binaries, r.held = startBusOver(t, r.url, testConfig, binaries, nil)
	r.waitConnected()
	return r
}

// listener is a NATS connection of the test's own.
func (r *rig) listener() *nats.Conn {
	r.Helper()
	nc, err := nats.Connect(r.url)
	if err != nil {
		r.Fatal(err)
	}
	r.Cleanup(nc.Close)
	return nc
}

// versionsSeen is which versions were on the wire.
type versionsSeen struct {
	t *testing.T

	mu   sync.Mutex
	link map[uint8]int // of messages of a link
	rest map[uint8]int // of all others
}

func (r *rig) watchVersions() *versionsSeen {
	r.Helper()
	s := &versionsSeen{t: r.T, link: map[uint8]int{}, rest: map[uint8]int{}}
	nc := r.listener()
	_, err := nc.Subscribe(subjectPrefix+">", func(msg *nats.Msg) {
		m, err := decode(msg.Data, Versions{0, 255})
		if err != nil {
			return
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if m.ofHandshake() {
			s.rest[m.Version]++
		} else {
			s.link[m.Version]++
		}
	})
	if err == nil {
		err = nc.Flush()
	}
	if err != nil {
		r.Fatal(err)
	}
	return s
}

// want checks that the messages of links were in v and all others in 1.
func (s *versionsSeen) want(v uint8) {
	s.t.Helper()
	eventually(s.t, "the link's messages are seen", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.link[v] >= 4 // of frames at least one each way, a CLOSE, an ACK
	})
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.link) != 1 || len(s.rest) != 1 || s.rest[handshakeVersion] == 0 {
		s.t.Errorf("versions on the wire: %v of links and %v else, want %d and %d only", s.link, s.rest, v, handshakeVersion)
	}
}
