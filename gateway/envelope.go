package gateway

import (
	"bytes"
	"errors"
	"strconv"
	"unicode/utf8"

	"github.com/go-json-experiment/json/jsontext"
)

// The routing envelope: the JSON wrapper on the binary's leg. A frame is spliced into it
// and cut out of it byte for byte. Its grammar is checked, its value is never built.
//
//	relay → binary   {"conn_id":"…","token":"…","frame":<JSON>}   token on a phone's first envelope only
//	relay → binary   {"conn_id":"…","close_code":4000}            close notice, exactly these two keys
//	binary → relay   {"conn_id":"…","frame":<JSON>,"close_code":4000}
//
// (protocol.md: The routing envelope)

// upSuffix follows the frame that follows upPrefix.
const upSuffix = "}"

// upPrefix returns what precedes a phone's frame on the way to its binary. The envelope is
// upPrefix, frame, upSuffix. Bytes that are not UTF-8 in connID or token become U+FFFD.
func upPrefix(connID, token string, withToken bool) []byte {
	b := append(make([]byte, 0, 64+len(connID)+len(token)), `{"conn_id":`...)
	b = appendQuoted(b, connID)
	if withToken {
		b = append(b, `,"token":`...)
		b = appendQuoted(b, token)
	}
	return append(b, `,"frame":`...)
}

// closeNotice returns the envelope that tells a binary that the phone connID is gone.
func closeNotice(connID string, code int) []byte {
	b := append(make([]byte, 0, 64+len(connID)), `{"conn_id":`...)
	b = appendQuoted(b, connID)
	b = append(b, `,"close_code":`...)
	b = strconv.AppendInt(b, int64(code), 10)
	return append(b, '}')
}

// appendQuoted appends s as a JSON string, escaping only what JSON requires.
func appendQuoted(b []byte, s string) []byte {
	b, _ = jsontext.AppendQuote(b, s) // its error says no more than that U+FFFD was put in
	return b
}

// validFrame reports whether p is exactly one JSON value in UTF-8, whitespace around it
// allowed, nested at most 10,000 deep: the verdict of json.Valid and utf8.Valid together.
// No frame may enter an envelope without it: `1},"close_code":4401,…` would close the
// envelope early and speak for the relay. Safe for concurrent use.      (protocol.md: Frames)
func validFrame(p []byte) bool {
	s := newScanner(p)
	defer s.release()
	end := s.value(s.space(0))
	return end >= 0 && s.space(end) == len(p) && (s.ascii() || utf8.Valid(p))
}

// downEnvelope is what a binary told the relay about one of its phones: a frame to deliver,
// a close code to close with after it, or both.
type downEnvelope struct {
	connID    []byte // unquoted, not empty; in the input unless it has escapes
	frame     []byte // JSON, its exact bytes, in the input; nil if absent or null
	closeCode int    // 1…65535; 0 if absent, null or 0

	pushWake bool // the field push_wake is there
}

// malformed says what is wrong with a binary's envelope. The text is short and constant,
// fit to be a metric label: nothing of the envelope is in it.
type malformed string

func (m malformed) Error() string { return "malformed envelope: " + string(m) }

// The first fault that parseDown meets is the one that it returns.
const (
	errSyntax    malformed = "syntax"     // not JSON, nothing at all, or nested deeper than 10,000
	errNotObject malformed = "not_object" // it starts with another JSON value
	errTrailing  malformed = "trailing"   // bytes after the object
	errConnID    malformed = "conn_id"    // conn_id is not a string, empty or missing
	errCloseCode malformed = "close_code" // close_code is not an integer of 0…65535, written without fraction or exponent
	errEmpty     malformed = "empty"      // neither frame nor close_code
)

// errPushWake is returned for an envelope with push_wake and without conn_id. It is well
// formed, and addressed to no phone.
var errPushWake = errors.New("push_wake envelope")

// parseDown reads one envelope from a binary. The result refers to p, which must be left
// alone for as long as it is in use. As in encoding/json, the last of two equal keys wins, a
// key may be written with escapes and unknown ones are ignored; but keys match in exact case
// only. The bytes of frame may hold invalid UTF-8. The errors are malformed and errPushWake.
// Safe for concurrent use.                                  (protocol.md: The routing envelope)
func parseDown(p []byte) (downEnvelope, error) {
	s := newScanner(p)
	defer s.release()
	var e downEnvelope
	end, err := s.envelope(&e)
	switch {
	case err != nil:
		return downEnvelope{}, err
	case s.space(end) != len(p):
		return downEnvelope{}, errTrailing
	case len(e.connID) == 0 && e.pushWake:
		return downEnvelope{}, errPushWake
	case len(e.connID) == 0:
		return downEnvelope{}, errConnID
	case e.frame == nil && e.closeCode == 0:
		return downEnvelope{}, errEmpty
	}
	return e, nil
}

// envelope reads the object that p starts with into e, and returns where it ends.
func (s *scanner) envelope(e *downEnvelope) (end int, err error) {
	i := s.space(0)
	switch c := s.at(i); {
	case c == '[', c != '{' && s.value(i) >= 0:
		return 0, errNotObject
	case c != '{':
		return 0, errSyntax
	}
	s.push('{')
	if i = s.space(i + 1); s.at(i) == '}' {
		return i + 1, nil
	}
	for {
		name := i
		nameEnd := s.text(name)
		if nameEnd < 0 {
			return 0, errSyntax
		}
		start := s.colon(nameEnd)
		if start < 0 {
			return 0, errSyntax
		}
		if end = s.value(start); end < 0 {
			return 0, errSyntax
		}
		if err := e.set(unquote(s.p[name:nameEnd]), s.p[start:end]); err != nil {
			return 0, err
		}
		switch i = s.space(end); s.at(i) {
		case '}':
			return i + 1, nil
		case ',':
			i = s.space(i + 1)
		default:
			return 0, errSyntax
		}
	}
}

// set takes over one member. The name is unquoted, the value is JSON; null unsets.
func (e *downEnvelope) set(name, value []byte) error {
	if string(value) == "null" {
		value = nil
	}
	switch string(name) {
	case "conn_id":
		if value != nil && value[0] != '"' {
			return errConnID
		}
		e.connID = unquote(value)
	case "frame":
		e.frame = value
	case "close_code":
		return e.setCloseCode(value)
	case "push_wake":
		e.pushWake = value != nil
	}
	return nil
}

func (e *downEnvelope) setCloseCode(value []byte) error {
	if value == nil {
		e.closeCode = 0
		return nil
	}
	code, err := strconv.ParseUint(string(value), 10, 16)
	if err != nil {
		return errCloseCode
	}
	e.closeCode = int(code)
	return nil
}

// unquote returns the text of the JSON string quoted (nil for nil): a part of it if that
// is possible, else unescaped, in memory of its own.
func unquote(quoted []byte) []byte {
	if quoted == nil {
		return nil
	}
	if bytes.IndexByte(quoted, '\\') < 0 && utf8.Valid(quoted) {
		return quoted[1 : len(quoted)-1]
	}
	text, _ := jsontext.AppendUnquote(nil, quoted) // its error says no more than that U+FFFD was put in
	return text
}
