package gateway

import (
	"bytes"
	"errors"
	"io"
	"strconv"
	"sync"
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
	if !utf8.Valid(p) {
		return false
	}
	d := newDecoder(p)
	defer d.release()
	return d.skip() == nil && d.atEnd()
}

// downEnvelope is what a binary told the relay about one of its phones: a frame to deliver,
// a close code to close with after it, or both.
type downEnvelope struct {
	connID    []byte // unquoted, not empty; in the input or in the scratch
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

// parseDown reads one envelope from a binary. The result refers to p, and to scratch if
// conn_id had to be unescaped and fits, so both must be left alone for as long as it is in
// use. As in encoding/json, the last of two equal keys wins, a key may be written with
// escapes and unknown ones are ignored; but keys match in exact case only. The bytes of
// frame may hold invalid UTF-8. The errors are malformed and errPushWake. Safe for
// concurrent use.                                           (protocol.md: The routing envelope)
func parseDown(p, scratch []byte) (downEnvelope, error) {
	d := newDecoder(p)
	defer d.release()
	var e downEnvelope
	if err := d.object(func(name, value []byte) error { return e.set(name, value, scratch) }); err != nil {
		return downEnvelope{}, err
	}
	if !d.atEnd() {
		return downEnvelope{}, errTrailing
	}
	switch {
	case len(e.connID) == 0 && e.pushWake:
		return downEnvelope{}, errPushWake
	case len(e.connID) == 0:
		return downEnvelope{}, errConnID
	case e.frame == nil && e.closeCode == 0:
		return downEnvelope{}, errEmpty
	}
	return e, nil
}

// set takes over one member. The name is unquoted, the value is JSON; null unsets.
func (e *downEnvelope) set(name, value, scratch []byte) error {
	if string(value) == "null" {
		value = nil
	}
	switch string(name) {
	case "conn_id":
		if value != nil && value[0] != '"' {
			return errConnID
		}
		e.connID = unquote(scratch, value)
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

// unquote returns the text of the JSON string quoted (nil for nil), which it sub-slices if
// it can and otherwise unescapes into scratch.
func unquote(scratch, quoted []byte) []byte {
	if quoted == nil {
		return nil
	}
	if bytes.IndexByte(quoted, '\\') < 0 && utf8.Valid(quoted) {
		return quoted[1 : len(quoted)-1]
	}
	text, _ := jsontext.AppendUnquote(scratch[:0], quoted) // its error says no more than that U+FFFD was put in
	return text
}

// decoder finds the bounds of the JSON values in p without building them. Pooled; owned by
// one call. jsontext parses a bytes.Buffer in place, so its offsets are offsets into p.
type decoder struct {
	p       []byte
	shallow bool

	buf  bytes.Buffer
	json jsontext.Decoder
}

// maxRecursion is how deep a message may nest, by a count of its brackets, to be read by
// recursion. That is 1.5 times as fast as reading token by token, but needs up to 420 bytes
// of stack a level: 10,000 levels (20 KB of message) would leave the reading goroutine of
// a connection with a stack of 4 MiB, these leave it with 128 KiB.
const maxRecursion = 256

// decodeOptions make jsontext accept what JSON allows and encoding/json accepts: equal keys
// and escapes that are half a surrogate pair. Whether p is UTF-8 is then the caller's to check.
var decodeOptions = []jsontext.Options{
	jsontext.AllowDuplicateNames(true),
	jsontext.AllowInvalidUTF8(true),
}

var decoders = sync.Pool{New: func() any { return new(decoder) }}

func newDecoder(p []byte) *decoder {
	d := decoders.Get().(*decoder)
	d.reset(p)
	d.shallow = bytes.Count(p, []byte{'['})+bytes.Count(p, []byte{'{'}) <= maxRecursion
	return d
}

// release gives d back to the pool, without p.
func (d *decoder) release() {
	d.reset(nil)
	decoders.Put(d)
}

func (d *decoder) reset(p []byte) {
	d.p, d.buf = p, *bytes.NewBuffer(p)
	d.json.Reset(&d.buf, decodeOptions...)
}

// skip moves past the next value.
func (d *decoder) skip() error {
	if d.shallow {
		_, err := d.json.ReadValue()
		return err
	}
	return d.json.SkipValue()
}

// next moves past the next value, or name of an object's member, and returns its bytes.
func (d *decoder) next() ([]byte, error) {
	start := d.json.InputOffset()
	if err := d.skip(); err != nil {
		return nil, errSyntax
	}
	// No value starts with a byte of what can stand between two of them.
	return bytes.TrimLeft(d.p[start:d.json.InputOffset()], " \t\r\n:,"), nil
}

// object reads one object and hands each of its members to set, the name unquoted.
func (d *decoder) object(set func(name, value []byte) error) error {
	begin, err := d.json.ReadToken()
	switch {
	case err != nil:
		return errSyntax
	case begin.Kind() != jsontext.KindBeginObject:
		return errNotObject
	}
	for d.json.PeekKind() != jsontext.KindEndObject {
		name, err := d.next()
		if err != nil {
			return err
		}
		value, err := d.next()
		if err != nil {
			return err
		}
		if err := set(unquote(nil, name), value); err != nil {
			return err
		}
	}
	_, err = d.json.ReadToken()
	return err
}

// atEnd reports whether nothing but whitespace is left.
func (d *decoder) atEnd() bool {
	_, err := d.json.ReadToken()
	return errors.Is(err, io.EOF)
}
