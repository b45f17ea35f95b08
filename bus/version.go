package bus

// How nodes of two releases live together while a cluster is upgraded node by
// node. What opens a link or needs none (OPEN, ACCEPT, REFUSE, RESET and its ACK,
// HELLO, CHALLENGE, ALIVE, GONE, TAKEN) is in handshakeVersion for ever, so every
// node understands every other. OPEN says which versions the phone's node speaks,
// and ACCEPT which one the link uses from then on: the highest that both do. If
// there is none the OPEN is refused with ErrVersion.
//
// A release that changes DATA, FRAMES, ACK, CLOSE or PROBE raises the highest version of
// spoken, and keeps the lowest at that of the release before it: then any two
// releases that follow each other work together.     (docs/links.md: Versions)

// handshakeVersion is the version byte of what is said before, and without, an
// agreement.
const handshakeVersion = 1

// spoken are the versions of the link protocol that this program speaks.
var spoken = Versions{Lowest: 1, Highest: 1}

// Versions is a range of versions of the link protocol, both ends included.
type Versions struct {
	Lowest  uint8 `json:"lowest"`
	Highest uint8 `json:"highest"`
}

// decodes reports whether v may be in the first byte of a message that a node with
// these versions takes.
func (s Versions) decodes(v uint8) bool {
	return v == handshakeVersion || s.Lowest <= v && v <= s.Highest
}

// offer is the Seq of an OPEN.
func (s Versions) offer() uint64 { return uint64(s.Lowest)<<8 | uint64(s.Highest) }

// offered is the inverse of offer.
func offered(seq uint64) Versions {
	return Versions{Lowest: uint8(seq >> 8), Highest: uint8(seq)} //nolint:gosec // two bytes
}

// Common is the highest version that both speak; 0: there is none.
func (s Versions) Common(other Versions) uint8 {
	if v := min(s.Highest, other.Highest); v >= s.Lowest && v >= other.Lowest {
		return v
	}
	return 0
}

// agrees reports whether the Seq of an ACCEPT is a version that was offered.
func (s Versions) agrees(seq uint64) bool {
	return uint64(s.Lowest) <= seq && seq <= uint64(s.Highest)
}

// ofHandshake reports whether m is in handshakeVersion whatever its link's is.
func (m *Message) ofHandshake() bool {
	switch m.Kind {
	case KindData, KindFrames, KindClose, KindProbe:
		return false
	case KindAck:
		return m.Reason == flagReset
	}
	return true
}
