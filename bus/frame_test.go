package bus

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
)

func TestMessages_RoundTrip(t *testing.T) {
	for kind := KindOpen; kind <= KindFrames; kind++ {
		want := Message{
			Version: 1, Kind: kind, Reason: 0xa5, Link: 1<<63 + 2, Session: NewSessionID(),
			Seq: 1<<62 + 3, Ack: 4, Credit: ^uint64(0), Payload: []byte(kind.String()),
		}
		if kind == KindFrames {
			want.Payload = appendPart(appendPart(nil, []byte("one")), nil)
		}
		got, err := decode(want.encode(), spoken)
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: got %+v, %v, want %+v", kind, got, err, want)
		}
		if strings.HasPrefix(kind.String(), "Kind(") {
			t.Errorf("kind %d has no name", kind)
		}
	}
}

// The bytes are a contract between nodes of different releases.
func TestMessage_GoldenBytes(t *testing.T) {
	m := Message{
		Kind: KindData, Reason: 0x06, Link: 0x0102030405060708,
		Session: SessionID{0xa0, 0xa1, 0xa2, 0xa3, 0xa4, 0xa5, 0xa6, 0xa7, 0xa8, 0xa9, 0xaa, 0xab, 0xac, 0xad, 0xae, 0xaf},
		Seq:     0x1112131415161718, Ack: 0x2122232425262728, Credit: 0x3132333435363738, Payload: []byte("{}"),
	}
	const want = "01" + "04" + "06" + "0102030405060708" + "a0a1a2a3a4a5a6a7a8a9aaabacadaeaf" +
		"1112131415161718" + "2122232425262728" + "3132333435363738" + "7b7d"
	if got := hex.EncodeToString(m.encode()); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	kinds := []Kind{KindOpen, KindAccept, KindRefuse, KindData, KindAck, KindClose, KindReset, KindProbe, KindHello, KindChallenge, KindAlive, KindGone, KindTaken, KindFrames}
	for i, k := range kinds {
		if int(k) != i+1 {
			t.Errorf("%s is %d, want %d", k, k, i+1)
		}
	}
}

func TestDecode_RefusesWhatNoRelaySends(t *testing.T) {
	good := (&Message{Kind: KindAck}).encode()
	frames := func(payload string) []byte {
		return (&Message{Kind: KindFrames, Payload: []byte(payload)}).encode()
	}
	for name, p := range map[string][]byte{
		"nothing":           nil,
		"short":             good[:Headroom-1],
		"version 0":         append([]byte{0}, good[1:]...),
		"version 2":         append([]byte{2}, good[1:]...),
		"kind 0":            append([]byte{handshakeVersion, 0}, good[2:]...),
		"kind after FRAMES": append([]byte{handshakeVersion, byte(KindFrames) + 1}, good[2:]...),
		"FRAMES of none":    frames(""),
		"FRAMES, a length":  frames("\x00\x00\x00"),
		"FRAMES, too short": frames("\x00\x00\x00\x01a\x00\x00\x00\x02b"),
		"FRAMES, 4 GiB":     frames("\xff\xff\xff\xff" + strings.Repeat("a", 1000)),
		"text":              []byte(strings.Repeat("{", 100)),
		"the highest bytes": bytes.Repeat([]byte{0xff}, 100),
	} {
		if m, err := decode(p, spoken); !errors.Is(err, errMalformed) {
			t.Errorf("%s: got %+v, %v, want errMalformed", name, m, err)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte{})
	f.Add((&Message{Kind: KindOpen, Payload: joinOpen("gw-1", "client-s-0")}).encode())
	f.Add((&Message{Kind: KindData, Seq: 1, Payload: []byte(`{"a":1}`)}).encode())
	f.Add((&Message{Kind: KindFrames, Seq: 7, Payload: appendPart(appendPart(nil, []byte("{}")), nil)}).encode())
	f.Add((&Message{Kind: KindClose, Reason: ReasonCode, Payload: []byte{3, 0xe8}}).encode())
	f.Fuzz(func(t *testing.T, p []byte) {
		m, err := decode(p, spoken)
		if err != nil {
			if !errors.Is(err, errMalformed) {
				t.Errorf("error %v", err)
			}
			return
		}
		if !bytes.Equal(m.encode(), p) {
			t.Errorf("%x decodes to %+v, which encodes to %x", p, m, m.encode())
		}
		if m.Kind == KindFrames {
			var again []byte
			for frame, rest, ok := cutPart(m.Payload); ok; frame, rest, ok = cutPart(rest) {
				again = appendPart(again, frame)
			}
			if len(again) == 0 || !bytes.Equal(again, m.Payload) {
				t.Errorf("%x falls into frames that make %x", m.Payload, again)
			}
		}
		if errorOf(m.Reason, m.Payload) == nil {
			t.Errorf("reason %d is no error", m.Reason)
		}
	})
}

func TestReasons_RoundTrip(t *testing.T) {
	travel := map[error]Reason{
		ErrLinkLost: 2, ErrNodeGone: 3, ErrReclaimed: 4, ErrMoved: 5, ErrAway: 6, ErrGraceOver: 7,
		ErrBacklog: 8, ErrNoSession: 9, ErrTooManyPhones: 10, ErrVersion: 12,
		CodeError(0): ReasonCode, CodeError(1000): ReasonCode, CodeError(4401): ReasonCode, CodeError(65535): ReasonCode,
	}
	for want, number := range travel {
		reason, payload := reasonOf(fmt.Errorf("wrapped: %w", want))
		if got := errorOf(reason, payload); reason != number || !errors.Is(got, want) {
			t.Errorf("%v travels as %d %x (want %d) and arrives as %v", want, reason, payload, number, got)
		}
	}
	if len(reasons)+4 != len(travel) {
		t.Errorf("the test knows %d reasons of %d", len(travel)-4, len(reasons))
	}
	for _, local := range []error{ErrClosed, ErrNoResponders, errViolation, errors.New("else")} {
		if reason, payload := reasonOf(local); errorOf(reason, payload) != ErrLinkLost { //nolint:errorlint // the value itself
			t.Errorf("%v arrives as %v, want ErrLinkLost", local, errorOf(reason, payload))
		}
	}
	for _, c := range []struct {
		reason  Reason
		payload string
	}{{0, ""}, {1, ""}, {1, "\x03"}, {1, "\x03\xe8\x00"}, {11, ""}, {13, ""}, {0x80, ""}, {255, ""}} {
		if got := errorOf(c.reason, []byte(c.payload)); got != ErrLinkLost { //nolint:errorlint // the value itself
			t.Errorf("reason %d %x is %v, want ErrLinkLost", c.reason, c.payload, got)
		}
	}
}

func FuzzSplitOpen(f *testing.F) {
	f.Add([]byte{})
	f.Add(joinOpen("gw-1", "client-s-0"))
	f.Add([]byte{0, 'a'})
	f.Add([]byte{3, 'a', '.', '>', 'c'})
	f.Fuzz(func(t *testing.T, p []byte) {
		node, conn, ok := splitOpen(p)
		if !ok {
			return
		}
		if !bytes.Equal(joinOpen(node, conn), p) {
			t.Errorf("%x is %q %q, which is %x", p, node, conn, joinOpen(node, conn))
		}
		if node == "" || !tokenForm.MatchString(string(node)) {
			t.Errorf("node %q would become part of a subject", node)
		}
	})
}
