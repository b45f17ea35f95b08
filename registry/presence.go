package registry

import (
	"encoding/json"
	"fmt"
	"unicode/utf8"

	"github.com/pyrycode/pyrycode-relay/bus"
)

// state of an entry.
const (
	stateHeld  = "held"  // a binary is connected
	stateGrace = "grace" // its connection ended; the entry carries a TTL
)

// entry is the value of one key of the presence bucket: who holds a server-id.
// It has no secret, no address and no device name.
type entry struct {
	Node    bus.NodeID    `json:"node"`
	Session bus.SessionID `json:"session"`
	State   string        `json:"state"`
	Since   int64         `json:"since"` // unix seconds, for people; nothing is decided by it
	Version string        `json:"version,omitempty"`
}

func (e entry) encode() []byte {
	p, err := json.Marshal(e)
	if err != nil {
		panic(fmt.Sprintf("registry: entry does not marshal: %v", err)) // strings and numbers always do
	}
	return p
}

// entryOf reads a record. An entry that no relay wrote counts as absent at its
// revision: it can be claimed over.
func entryOf(r record) (entry, bool) {
	var e entry
	if !r.exists || json.Unmarshal(r.value, &e) != nil || e.State != stateHeld && e.State != stateGrace ||
		e.Session == (bus.SessionID{}) || !nodeText(e.Node) {
		return entry{}, false
	}
	return e, true
}

// maxNodeText is far above what a node id takes, and below NATS' control line.
const maxNodeText = 512

// nodeText reports whether n can be a node's id: it goes into subjects.
func nodeText(n bus.NodeID) bool {
	_, err := bus.DecodeToken(string(n))
	return n != "" && len(n) <= maxNodeText && err == nil
}

// maxVersionText bounds what a binary says of its version, in bytes.
const maxVersionText = 64

func versionText(s string) string {
	if len(s) > maxVersionText {
		s = s[:maxVersionText]
		for !utf8.ValidString(s) && len(s) > 0 {
			s = s[:len(s)-1]
		}
	}
	return s
}
