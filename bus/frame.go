package bus

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
)

// This file is the one table of what nodes say to each other.
//
// Protocol flow of a link (phone's node A, binary's node B):
//
//	A → B  OPEN (a NATS request)     B → A  ACCEPT or REFUSE (its reply)
//	A → B  ACK: I know that you accepted
//	both   DATA, in both directions, each numbered from 1
//	both   FRAMES, several DATA that follow each other in one message
//	both   ACK, when no DATA goes back soon enough to carry it
//	both   PROBE, when DATA or CLOSE stays unacknowledged; answered by ACK
//	both   CLOSE, numbered like DATA, so that it overtakes none
//	both   RESET, when the link cannot go on; answered by ACK with flagReset,
//	       repeated until then
//
// Every message starts with this header, big endian:
//
//	 0  version   u8   the link's, or handshakeVersion (version.go)
//	 1  kind      u8   Kind
//	 2  reason    u8   Reason, in REFUSE, CLOSE and RESET; flags in ACCEPT and ACK
//	 3  link      u64  LinkID, chosen by A anew for each OPEN
//	11  session   16 B SessionID of the binary connection the link is bound to
//	27  seq       u64  DATA, CLOSE: number. FRAMES: that of the first, the others
//	                   follow. PROBE: highest number sent. ACK: the
//	                   lowest number missing, when a gap was seen, else 0. OPEN:
//	                   versions that A speaks. ACCEPT: version of the link
//	35  ack       u64  every number up to here has arrived in order. OPEN: how
//	                   often the phone has asked, this time included
//	43  credit    u64  the receiver takes this many bytes in all (frame bytes
//	                   plus frameOverhead each), counted from the link's start
//	51  payload        DATA: one frame. FRAMES: one or more, each after its length
//	                   as u32. OPEN: u8 length of A's node id, node id,
//	                   conn id. CLOSE, RESET: u16 close code, with ReasonCode
//
// PROBE, CLOSE and RESET carry the sender's subject as NATS reply subject, for an
// answer from a node that does not know the link.
//
// ack and credit only grow, so a message that comes late or twice does no harm.

// Headroom is how many bytes the header takes in front of a payload. Whoever passes
// a frame to Link.Send leaves them free.
const Headroom = 51

// partHeader is how many bytes stand before each frame of a FRAMES.
const partHeader = 4

// errMalformed is returned when a message cannot have come from a relay that this
// one works with. It is counted and dropped, never answered.
var errMalformed = errors.New("malformed message")

// Kind says what a message is.
type Kind uint8

// The kinds. Numbers are part of the protocol between nodes.
const (
	KindOpen      Kind = 1  // A → B  request: bind a link to a session; credit = A's window
	KindAccept    Kind = 2  // B → A  reply; credit = B's window, 0 with flagGrace
	KindRefuse    Kind = 3  // B → A  reply; reason
	KindData      Kind = 4  // both   one frame
	KindAck       Kind = 5  // both   ack and credit; seq ≠ 0 reports a gap
	KindClose     Kind = 6  // both   the last numbered message
	KindReset     Kind = 7  // both   the link is lost
	KindProbe     Kind = 8  // both   how far are you?
	KindHello     Kind = 9  // request to a node; answered by HELLO
	KindChallenge Kind = 10 // request: is the binary of this session alive? answered by ALIVE or GONE
	KindAlive     Kind = 11 // reply: it answered a ping sent after the request came
	KindGone      Kind = 12 // reply: this node does not hold that session, or it did not answer
	KindTaken     Kind = 13 // notice: that session has been replaced, look at the KV
	KindFrames    Kind = 14 // both   several DATA
)

func (k Kind) String() string {
	names := [...]string{"", "OPEN", "ACCEPT", "REFUSE", "DATA", "ACK", "CLOSE", "RESET", "PROBE", "HELLO", "CHALLENGE", "ALIVE", "GONE", "TAKEN", "FRAMES"}
	if int(k) < len(names) && k > 0 {
		return names[k]
	}
	return fmt.Sprintf("Kind(%d)", uint8(k))
}

const (
	// flagGrace in ACCEPT: the binary is away, no frame may come yet.
	flagGrace Reason = 0x80
	// flagReset in ACK: it answers a RESET.
	flagReset Reason = 0x80
)

// Reason is an error as one byte. Numbers are part of the protocol.
type Reason uint8

// ReasonCode says that the payload holds the close code that a peer chose.
const ReasonCode Reason = 1

const (
	reasonLinkLost Reason = 2
	// reasonUnknown in RESET: its sender has no such link. It arrives as ErrLinkLost.
	reasonUnknown Reason = 13
)

var reasons = map[Reason]error{
	reasonLinkLost: ErrLinkLost,

	3:  ErrNodeGone,
	4:  ErrReclaimed,
	5:  ErrMoved,
	6:  ErrAway,
	7:  ErrGraceOver,
	8:  ErrBacklog,
	9:  ErrNoSession,
	10: ErrTooManyPhones,
	// 11 had a meaning once and gets no other one.
	12: ErrVersion,
	// 13 is reasonUnknown.
}

// reasonOf gives the byte and the payload that carry err. What has no byte of
// its own is a lost link.
func reasonOf(err error) (Reason, []byte) {
	var code CodeError
	if errors.As(err, &code) {
		return ReasonCode, binary.BigEndian.AppendUint16(nil, uint16(code))
	}
	for r, e := range reasons {
		if errors.Is(err, e) {
			return r, nil
		}
	}
	return reasonLinkLost, nil
}

// errorOf is the inverse of reasonOf. A reason that this version does not know,
// from a newer node, is a lost link: the end stays visible, and the phone dials
// again.
func errorOf(r Reason, payload []byte) error {
	if r == ReasonCode && len(payload) == 2 {
		return CodeError(binary.BigEndian.Uint16(payload))
	}
	if err, ok := reasons[r]; ok {
		return err
	}
	return ErrLinkLost
}

// Message is one message between nodes.
type Message struct {
	Version uint8 // of its link; 0: handshakeVersion
	Kind    Kind
	Reason  Reason
	Link    LinkID
	Session SessionID
	Seq     uint64
	Ack     uint64
	Credit  uint64
	Payload []byte
}

// putHeader writes m's header to p, which has Headroom bytes.
func (m *Message) putHeader(p []byte) {
	_ = p[Headroom-1]
	p[0] = cmp.Or(m.Version, handshakeVersion)
	p[1] = byte(m.Kind)
	p[2] = byte(m.Reason)
	binary.BigEndian.PutUint64(p[3:], uint64(m.Link))
	copy(p[11:27], m.Session[:])
	binary.BigEndian.PutUint64(p[27:], m.Seq)
	binary.BigEndian.PutUint64(p[35:], m.Ack)
	binary.BigEndian.PutUint64(p[43:], m.Credit)
}

// encode returns m as it goes on the wire, in a new slice.
func (m *Message) encode() []byte {
	p := make([]byte, Headroom+len(m.Payload))
	m.putHeader(p)
	copy(p[Headroom:], m.Payload)
	return p
}

// decode takes a message apart, for a node that speaks s. The payload aliases p. The
// error is errMalformed, with what is wrong and never with what p holds.
func decode(p []byte, s Versions) (Message, error) {
	if len(p) < Headroom {
		return Message{}, fmt.Errorf("%w: %d bytes, want at least %d", errMalformed, len(p), Headroom)
	}
	if !s.decodes(p[0]) {
		return Message{}, fmt.Errorf("%w: version %d", errMalformed, p[0])
	}
	m := Message{
		Version: p[0],
		Kind:    Kind(p[1]),
		Reason:  Reason(p[2]),
		Link:    LinkID(binary.BigEndian.Uint64(p[3:])),
		Session: SessionID(p[11:27]),
		Seq:     binary.BigEndian.Uint64(p[27:]),
		Ack:     binary.BigEndian.Uint64(p[35:]),
		Credit:  binary.BigEndian.Uint64(p[43:]),
		Payload: p[Headroom:],
	}
	if m.Kind < KindOpen || m.Kind > KindFrames {
		return Message{}, fmt.Errorf("%w: kind %d", errMalformed, p[1])
	}
	if m.Kind == KindFrames && !areParts(m.Payload) {
		return Message{}, fmt.Errorf("%w: FRAMES whose lengths do not fit", errMalformed)
	}
	return m, nil
}

// appendPart appends a frame to the payload of a FRAMES.
func appendPart(p, frame []byte) []byte {
	return append(binary.BigEndian.AppendUint32(p, uint32(len(frame))), frame...) //nolint:gosec // far less
}

// cutPart is the inverse of appendPart, from the front: the first frame of p, and what
// is behind it.
func cutPart(p []byte) (frame, rest []byte, ok bool) {
	if len(p) < partHeader {
		return nil, nil, false
	}
	n, p := uint64(binary.BigEndian.Uint32(p)), p[partHeader:]
	if n > uint64(len(p)) {
		return nil, nil, false
	}
	return p[:n], p[n:], true
}

// areParts reports whether p is what appendPart makes.
func areParts(p []byte) bool {
	ok := len(p) > 0
	for ok && len(p) > 0 {
		_, p, ok = cutPart(p)
	}
	return ok
}

// joinOpen is the payload of an OPEN from node.
func joinOpen(node NodeID, connID string) []byte {
	p := make([]byte, 0, 1+len(node)+len(connID))
	p = append(p, byte(len(node))) //nolint:gosec // NewNodeID: at most 3*maxGatewayID+9
	p = append(p, node...)
	return append(p, connID...)
}

// splitOpen is the inverse of joinOpen.
func splitOpen(p []byte) (node NodeID, connID string, ok bool) {
	if len(p) < 1 || len(p) < 1+int(p[0]) || p[0] == 0 {
		return "", "", false
	}
	n := 1 + int(p[0])
	for _, c := range p[1:n] {
		if !plain(c) && c != '=' {
			return "", "", false // it becomes part of a subject
		}
	}
	return NodeID(p[1:n]), string(p[n:]), true
}
