package gateway

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/pyrycode/pyrycode-relay/bus"
)

// phoneHeaders are the headers of /v1/client. The token is for the binary alone: it is never
// logged, stored, compared nor put in an error.               (protocol.md: Endpoints)
type phoneHeaders struct {
	serverID   string
	token      string
	deviceName string // optional
	userAgent  string
}

// binaryHeaders are the headers of /v1/server.                 (protocol.md: Endpoints)
type binaryHeaders struct {
	serverID  string
	version   string
	userAgent string
}

const (
	headerServerID   = "X-Pyrycode-Server"
	headerToken      = "X-Pyrycode-Token" //nolint:gosec // a header's name
	headerDeviceName = "X-Pyrycode-Device-Name"
	headerVersion    = "X-Pyrycode-Version"
	headerUserAgent  = "User-Agent"
)

// The errors name the header and what would be right, never a value: they are the body of
// a 400.
var (
	errNoServerID   = errors.New("missing header x-pyrycode-server: send the server-id of the binary")
	errNoToken      = errors.New("missing header x-pyrycode-token: send the token that the binary gave this device")
	errNoVersion    = errors.New("missing header x-pyrycode-version: send the version of the binary")
	errNoUserAgent  = errors.New("missing header user-agent: send the name and version of the client")
	errLongServerID = fmt.Errorf("header x-pyrycode-server is too long: send at most %d bytes", bus.MaxServerID)
	errTextServerID = errors.New("header x-pyrycode-server is not text: send it in UTF-8")
)

// readPhoneHeaders returns the headers of a phone's upgrade, or one of the errors above.
func readPhoneHeaders(h http.Header) (phoneHeaders, error) {
	p := phoneHeaders{
		serverID:   h.Get(headerServerID),
		token:      h.Get(headerToken),
		deviceName: h.Get(headerDeviceName),
		userAgent:  h.Get(headerUserAgent),
	}
	if err := checkServerID(p.serverID); err != nil {
		return phoneHeaders{}, err
	}
	switch {
	case p.token == "":
		return phoneHeaders{}, errNoToken
	case p.userAgent == "":
		return phoneHeaders{}, errNoUserAgent
	}
	return p, nil
}

// readBinaryHeaders returns the headers of a binary's upgrade, or one of the errors above.
func readBinaryHeaders(h http.Header) (binaryHeaders, error) {
	b := binaryHeaders{
		serverID:  h.Get(headerServerID),
		version:   h.Get(headerVersion),
		userAgent: h.Get(headerUserAgent),
	}
	if err := checkServerID(b.serverID); err != nil {
		return binaryHeaders{}, err
	}
	switch {
	case b.version == "":
		return binaryHeaders{}, errNoVersion
	case b.userAgent == "":
		return binaryHeaders{}, errNoUserAgent
	}
	return b, nil
}

func checkServerID(id string) error {
	switch {
	case id == "":
		return errNoServerID
	case len(id) > bus.MaxServerID:
		return errLongServerID
	case !utf8.ValidString(id):
		return errTextServerID
	}
	return nil
}

// maxLogText is the length in bytes of a peer's text in a log line: names and versions fit,
// and no peer can fill a disk.
const maxLogText = 64

// logText makes text of a peer fit for a log line: cut to 64 bytes, at a rune's boundary,
// with U+FFFD for what is not UTF-8 or not visible (controls, line separators, direction
// overrides). Quoting is left to slog.
func logText(s string) string { return clip(s, maxLogText) }

// logServerID is logText for a server-id: cut to 128 bytes, so a visible one stays whole.
func logServerID(id string) string { return clip(id, bus.MaxServerID) }

// logConnID is logText for a conn_id, which holds a server-id.
func logConnID(id string) string { return clip(id, 2*bus.MaxServerID) }

func clip(s string, limit int) string {
	var b strings.Builder
	for _, r := range s {
		if !unicode.IsGraphic(r) {
			r = utf8.RuneError
		}
		if b.Len()+utf8.RuneLen(r) > limit {
			break
		}
		b.WriteRune(r)
	}
	return b.String()
}
