package bus

import (
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"strings"
)

// MaxServerID is the longest server-id in bytes. With every byte escaped its
// token is 384 bytes, far below NATS' 4 KiB control line.
const MaxServerID = 128

// maxGatewayID is how many bytes of a gateway id a node id keeps: with every one
// escaped, the length of a node id fits a byte (joinOpen).
const maxGatewayID = 64

// NodeID names one running relay process: <gateway-id>-<8 hex>, fresh at every
// start and never reused. It is safe as one subject token and as a KV key.
type NodeID string

// NewNodeID returns a fresh id for a process of the gateway called gatewayID, of
// which it keeps the first 64 bytes.
func NewNodeID(gatewayID string) NodeID {
	var b [4]byte
	random(b[:])
	return NodeID(EncodeToken(gatewayID[:min(len(gatewayID), maxGatewayID)]) + "-" + hex.EncodeToString(b[:]))
}

// SessionID names one binary connection. It is the fencing token: whatever
// names another session than the current one is refused.
type SessionID [16]byte

// NewSessionID returns a random session id.
func NewSessionID() (s SessionID) {
	random(s[:])
	return s
}

func (s SessionID) String() string { return hex.EncodeToString(s[:]) }

// MarshalText gives the 32 hex digits of String.
func (s SessionID) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText takes what MarshalText gave.
func (s *SessionID) UnmarshalText(p []byte) error {
	if len(p) != hex.EncodedLen(len(s)) {
		return fmt.Errorf("session id of %d characters, want %d", len(p), hex.EncodedLen(len(s)))
	}
	var id SessionID
	if _, err := hex.Decode(id[:], p); err != nil {
		return fmt.Errorf("session id is not hex")
	}
	*s = id
	return nil
}

// LinkID names the link of one phone connection for as long as that lasts.
type LinkID uint64

func newLinkID() LinkID {
	var b [8]byte
	random(b[:])
	return LinkID(binary.BigEndian.Uint64(b[:]))
}

// NewConnID returns a fresh phone connection id, client-<server-id>-<16 hex>.
// It is opaque to all and never reused.                 (protocol.md: conn_id)
func NewConnID(serverID string) string {
	var b [8]byte
	random(b[:])
	return "client-" + serverID + "-" + hex.EncodeToString(b[:])
}

func random(p []byte) {
	_, _ = rand.Read(p) // never fails: crypto/rand ends the process instead
}

const upperHex = "0123456789ABCDEF"

// EncodeToken makes any text safe as one NATS subject token and as a KV key:
// A-Z a-z 0-9 _ - stay, every other byte becomes =XX in upper-case hex. It is
// injective, DecodeToken is its inverse. Server-ids and gateway ids reach
// subjects and keys through here only.
func EncodeToken(s string) string {
	escapes := 0
	for i := range len(s) {
		if !plain(s[i]) {
			escapes++
		}
	}
	if escapes == 0 {
		return s
	}
	var b strings.Builder
	b.Grow(len(s) + 2*escapes)
	for i := range len(s) {
		if c := s[i]; plain(c) {
			b.WriteByte(c)
		} else {
			b.WriteByte('=')
			b.WriteByte(upperHex[c>>4])
			b.WriteByte(upperHex[c&15])
		}
	}
	return b.String()
}

// DecodeToken is the inverse of EncodeToken. It refuses everything that
// EncodeToken does not produce, so that no two tokens mean one text.
func DecodeToken(token string) (string, error) {
	if !strings.Contains(token, "=") && EncodeToken(token) == token {
		return token, nil
	}
	var b strings.Builder
	b.Grow(len(token))
	for i := 0; i < len(token); i++ {
		c := token[i]
		if c != '=' {
			b.WriteByte(c)
			continue
		}
		if i+2 >= len(token) {
			return "", fmt.Errorf("token ends within an escape")
		}
		high, low := strings.IndexByte(upperHex, token[i+1]), strings.IndexByte(upperHex, token[i+2])
		if high < 0 || low < 0 {
			return "", fmt.Errorf("token has a bad escape at %d", i)
		}
		b.WriteByte(byte(high<<4 | low)) //nolint:gosec // both are below 16
		i += 2
	}
	if s := b.String(); EncodeToken(s) == token {
		return s, nil
	}
	return "", fmt.Errorf("token is not in canonical form")
}

func plain(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '_' || c == '-'
}
