package testenv

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// Phone is a phone: its messages are frames.
type Phone struct{ *Peer }

// Binary is a binary: its messages are envelopes around frames.
type Binary struct{ *Peer }

// Send sends frame, any JSON value, to a phone. Its bytes are not touched.
func (b *Binary) Send(ctx context.Context, connID string, frame []byte) error {
	return b.SendRaw(ctx, envelope(connID, frame, ""))
}

// SendClose asks the relay to close a phone with code, after frame unless that
// is nil.
func (b *Binary) SendClose(ctx context.Context, connID string, code int, frame []byte) error {
	return b.SendRaw(ctx, envelope(connID, frame, fmt.Sprintf(`,"close_code":%d`, code)))
}

// SendRaw sends message as it is, envelope or not.
func (b *Binary) SendRaw(ctx context.Context, message []byte) error {
	return b.Peer.Send(ctx, message)
}

func envelope(connID string, frame []byte, rest string) []byte {
	id, _ := json.Marshal(connID) // a string always marshals
	var e bytes.Buffer
	e.WriteString(`{"conn_id":`)
	e.Write(id)
	if frame != nil {
		e.WriteString(`,"frame":`)
		e.Write(frame)
	}
	e.WriteString(rest)
	e.WriteByte('}')
	return e.Bytes()
}

// Envelope is a message from the relay to a binary.
type Envelope struct {
	ConnID    string
	Token     string
	HasToken  bool
	Frame     json.RawMessage // bytes as they came; nil if there is no such key
	CloseCode int
	HasClose  bool
	Raw       []byte // the whole message
}

// NextEnvelope is NextMessage for an envelope. If the message is none, it
// returns an error together with what was understood, Raw at least.
func (b *Binary) NextEnvelope(ctx context.Context) (Envelope, error) {
	raw, err := b.Next(ctx)
	if err != nil {
		return Envelope{}, err
	}
	return parseEnvelope(raw)
}

// parseEnvelope reads key by key: a frame may be nested as deeply as JSON
// allows, and the object around it must not count.
func parseEnvelope(raw []byte) (Envelope, error) {
	e := Envelope{Raw: raw}
	dec := json.NewDecoder(bytes.NewReader(raw))
	if t, err := dec.Token(); t != json.Delim('{') {
		return e, errors.Join(errors.New("envelope is not an object"), err)
	}
	for dec.More() {
		key, err := dec.Token()
		if err != nil {
			return e, fmt.Errorf("envelope: %w", err)
		}
		var value any
		switch key {
		case "conn_id":
			value = &e.ConnID
		case "token":
			value, e.HasToken = &e.Token, true
		case "close_code":
			value, e.HasClose = &e.CloseCode, true
		case "frame":
			value = &e.Frame
		default:
			value = new(json.RawMessage)
		}
		if err := dec.Decode(value); err != nil {
			return e, fmt.Errorf("envelope: %w", err)
		}
	}
	if _, err := dec.Token(); err != nil {
		return e, fmt.Errorf("envelope: %w", err)
	}
	if _, err := dec.Token(); err != io.EOF {
		return e, errors.New("envelope has trailing bytes")
	}
	return e, nil
}
