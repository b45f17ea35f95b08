package gateway

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"
)

func nested(depth int, open, inner, end string) string {
	return strings.Repeat(open, depth) + inner + strings.Repeat(end, depth)
}

// seedFrames are the seeds of everything here that takes a frame: what phones send, the corners
// of the grammar, and the attempts to close the envelope early.
var seedFrames = []string{
	`{"id":7,"type":"message","ts":"2026-05-04T10:00:00.000Z","payload":{"text":"h\u00e9llo <b>&amp;</b> 🦊"}}`,
	`{"type":"noise","data":"AAECAwQFBgcICQoLDA0ODw=="}`,
	`{"a":1,"a":2,"a":{"a":3}}`,
	" \t\r\n{ \"spaced\" : [ 1 , 2 ] } \n",
	`null`, `true`, `false`, `0`, `-0.5e+10`, `1e400`, `123456789012345678901234567890`,
	`""`, `"\ud800"`, `"\ud83d\ude00"`, `"\u2028"`, "\"\u2028\"", `[]`, `{}`, `{"":""}`, `"conn_id"`,
	nested(63, "[", "", "]"), nested(64, `{"a":`, "1", "}"), nested(65, `[{"a":`, "[]", "}]"),
	nested(5000, `[{"a":`, "1", "}]"),
	nested(10_000, "[", "", "]"), nested(10_000, `{"a":`, "{}", "}"), nested(10_000, "[", "", "]"),
	nested(10_001, "[", "", "]"), nested(10_000, `{"a":`, "1", "}"), nested(10_001, `{"a":`, "1", "}"),

	``, ` `, `{`, `}`, `]`, `[`, `nul`, `nullx`, `1 2`, `{}{}`, `[1,]`, `{"a":1,}`, `{"a"}`, `{"a",1}`, `{1:1}`, `,1`, `:1`,
	`01`, `+1`, `.5`, `1.`, `1e`, `-`, `NaN`, `'a'`, `"a`, "\"a\nb\"", `"\x41"`, `"\u12"`, "\"\xff\"", "\xff", "\ufeff1", "1\x00",
	`1}`, `1},"close_code":4401`, `1,"close_code":4401`, `1,"close_code":4401}`, `{}},{"conn_id":"x"`, `"}`, `1}{`, "1\n}\n",
	nested(10_001, "[", "", ""), nested(200, `{"a":`, "", ""),
}

func TestValidFrame_AgreesWithEncodingJSON(t *testing.T) {
	for _, frame := range seedFrames {
		if got, want := validFrame([]byte(frame)), validByOracle([]byte(frame)); got != want {
			t.Errorf("validFrame(%.60q, %d bytes) = %v, want %v", frame, len(frame), got, want)
		}
	}
}

func TestValidFrame_Depth(t *testing.T) {
	for depth, want := range map[int]bool{
		63: true, 64: true, 9_999: true, 10_000: true, 10_001: false, 100_000: false,
	} {
		for _, f := range [][3]string{{"[", "", "]"}, {"[", "{}", "]"}, {`{"a":`, "1", "}"}} {
			levels := depth - strings.Count(f[1], "{")
			if got := validFrame([]byte(nested(levels, f[0], f[1], f[2]))); got != want {
				t.Errorf("%d levels of %s: valid = %v, want %v", depth, f[0], got, want)
			}
		}
	}
}

func FuzzValidFrame(f *testing.F) {
	for _, frame := range seedFrames {
		if len(frame) < 1<<10 { // the deep ones would slow it down a hundredfold
			f.Add([]byte(frame))
		}
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		before := bytes.Clone(p)
		want := validByOracle(p)
		if got := validFrame(p); got != want {
			t.Fatalf("validFrame(%q) = %v, want %v", p, got, want)
		}
		if !bytes.Equal(p, before) {
			t.Fatalf("%q was changed to %q", before, p)
		}
	})
}

func validByOracle(p []byte) bool { return json.Valid(p) && utf8.Valid(p) }

func TestUpPrefix(t *testing.T) {
	for _, tt := range []struct {
		connID, token string
		withToken     bool
		want          string
	}{
		{"client-s-1", "t", true, `{"conn_id":"client-s-1","token":"t","frame":`},
		{"client-s-1", "t", false, `{"conn_id":"client-s-1","frame":`},
		{"client-s-1", "", true, `{"conn_id":"client-s-1","token":"","frame":`},
		{`a"\<&>` + "\x01\n\u2028é", `"},{"`, true, `{"conn_id":"a\"\\<&>\u0001\n` + "\u2028é" + `","token":"\"},{\"","frame":`},
		{"a\xffb", "\x80", true, `{"conn_id":"a` + "\ufffd" + `b","token":"` + "\ufffd" + `","frame":`},
	} {
		if got := string(upPrefix(tt.connID, tt.token, tt.withToken)); got != tt.want {
			t.Errorf("upPrefix(%q, %q, %v) = %s, want %s", tt.connID, tt.token, tt.withToken, got, tt.want)
		}
	}
}

func TestCloseNotice(t *testing.T) {
	if got, want := string(closeNotice(`client-"-1`, 4404)), `{"conn_id":"client-\"-1","close_code":4404}`; got != want {
		t.Errorf("closeNotice = %s, want %s", got, want)
	}
}

// FuzzSplice carries a frame both ways: a valid one arrives bit for bit, next to fields that
// it cannot touch.
func FuzzSplice(f *testing.F) {
	for i, frame := range seedFrames {
		if len(frame) >= 1<<10 {
			continue
		}
		f.Add([]byte(frame), "client-"+frame[:min(len(frame), 20)]+"-0123456789abcdef", fmt.Sprint("token", i), i%2 == 0)
	}
	f.Add([]byte(`1`), "a\xff\"\\\u2028<&>\x00", "\xed\xa0\x80", true)
	f.Fuzz(func(t *testing.T, frame []byte, connID, token string, withToken bool) {
		up := append(append(upPrefix(connID, token, withToken), frame...), upSuffix...)
		if !validFrame(frame) || !json.Valid(fmt.Appendf(nil, "[%s]", frame)) {
			return // the latter: a frame of 10,000 levels, for encoding/json too deep once it is wrapped
		}
		wantFrame := strings.Trim(string(frame), " \t\r\n")
		wantID, wantToken := string([]rune(connID)), string([]rune(token))

		var fields map[string]json.RawMessage
		if err := json.Unmarshal(up, &fields); err != nil {
			t.Fatalf("up %q: %v", up, err)
		}
		keys := 2
		if withToken {
			keys++
			if got := jsonString(t, fields["token"]); got != wantToken {
				t.Fatalf("token = %q, want %q", got, wantToken)
			}
		}
		if len(fields) != keys || jsonString(t, fields["conn_id"]) != wantID || string(fields["frame"]) != wantFrame {
			t.Fatalf("up %q = %q, want conn_id %q and frame %q", up, fields, wantID, wantFrame)
		}

		if wantID == "" || wantFrame == "null" {
			return
		}
		down := append(append(upPrefix(connID, "", false), frame...), `,"close_code":65535 } `...)
		e, err := parseDown(down)
		if err != nil || string(e.connID) != wantID || string(e.frame) != wantFrame || e.closeCode != 65535 {
			t.Fatalf("parseDown(%q) = %q, %q, %d, %v", down, e.connID, e.frame, e.closeCode, err)
		}
	})
}

func jsonString(t *testing.T, raw []byte) (s string) {
	if err := json.Unmarshal(raw, &s); err != nil {
		t.Fatalf("%q: %v", raw, err)
	}
	return s
}

func TestParseDown(t *testing.T) {
	for _, tt := range downEnvelopes {
		e, err := parseDown([]byte(tt.in))
		got := wantDown{string(e.connID), string(e.frame), e.closeCode, err}
		if got != tt.want {
			t.Errorf("parseDown(%.80q) = %.80q, want %.80q", tt.in, fmt.Sprint(got), fmt.Sprint(tt.want))
		}
		if (e.frame == nil) != (tt.want.frame == "") {
			t.Errorf("parseDown(%.80q): frame is %#v", tt.in, e.frame)
		}
	}
}

type wantDown struct {
	connID, frame string
	closeCode     int
	err           error
}

var downEnvelopes = []struct {
	in   string
	want wantDown
}{
	{`{"conn_id":"c","frame":{"a": 1}}`, wantDown{"c", `{"a": 1}`, 0, nil}},
	{"\n{ \"frame\"\t:\r\n [ 1 ] , \"conn_id\" : \"c\" } \n", wantDown{"c", `[ 1 ]`, 0, nil}},
	{`{"conn_id":"c","frame":"{\"<\u003c\ud800"}`, wantDown{"c", `"{\"<\u003c\ud800"`, 0, nil}},
	{"{\"conn_id\":\"c\",\"frame\":\"\xff\"}", wantDown{"c", "\"\xff\"", 0, nil}},
	{`{"conn_id":"c","frame":1e400,"close_code":4000}`, wantDown{"c", `1e400`, 4000, nil}},
	{`{"conn_id":"c","frame":false}`, wantDown{"c", `false`, 0, nil}},
	{`{"conn_id":"c","close_code":65535}`, wantDown{"c", "", 65535, nil}},
	{`{"conn_id":"c","frame":null,"close_code":1}`, wantDown{"c", "", 1, nil}},
	{`{"conn_id":"c","frame":0,"close_code":null}`, wantDown{"c", "0", 0, nil}},
	{`{"conn_id":"c","frame":0,"close_code":0}`, wantDown{"c", "0", 0, nil}},
	{`{"v":1,"conn_id":"c","x":{"conn_id":"d","frame":2},"frame":0}`, wantDown{"c", "0", 0, nil}},
	{`{"conn_id":"c","frame":0,"token":5,"push_wake":{}}`, wantDown{"c", "0", 0, nil}},

	// Keys and conn_id in other spellings.
	{`{"c\u006fnn_id":"c\n\u00e9\ud800-long","fr\u0061me":0}`, wantDown{"c\né\ufffd-long", "0", 0, nil}},
	{"{\"conn_id\":\"c\xff\",\"frame\":0}", wantDown{"c\ufffd", "0", 0, nil}},
	{`{"conn_id":"c","Frame":1,"frame ":2,"frame":0}`, wantDown{"c", "0", 0, nil}},
	{`{"conn_id":"c","Frame":1}`, wantDown{err: errEmpty}},

	// The last of two equal keys.
	{`{"conn_id":"a\n","frame":1,"conn_id":"b\n","frame":2}`, wantDown{"b\n", "2", 0, nil}},
	{`{"conn_id":"c","close_code":1,"frame":1,"frame":null,"close_code":2}`, wantDown{"c", "", 2, nil}},
	{`{"conn_id":"c","frame":1,"frame":null}`, wantDown{err: errEmpty}},
	{`{"conn_id":"c","frame":1,"conn_id":null}`, wantDown{err: errConnID}},

	{``, wantDown{err: errSyntax}},
	{` `, wantDown{err: errSyntax}},
	{`nope`, wantDown{err: errSyntax}},
	{`{`, wantDown{err: errSyntax}},
	{`{"conn_id":"c","frame":}`, wantDown{err: errSyntax}},
	{`{"conn_id":"c","frame":1`, wantDown{err: errSyntax}},
	{`{"conn_id":"c","frame":1,}`, wantDown{err: errSyntax}},
	{`{"conn_id":"c","frame":1]`, wantDown{err: errSyntax}},
	{`{"conn_id":"c","frame":[1}]}`, wantDown{err: errSyntax}},
	{`{"conn_id":"c" "frame":1}`, wantDown{err: errSyntax}},
	{`{"conn_id","c","frame",1}`, wantDown{err: errSyntax}},
	{`{1:2}`, wantDown{err: errSyntax}},
	{`{"conn_id":"c","x":tru,"frame":1}`, wantDown{err: errSyntax}},
	{`{"conn_id":"c","frame":` + nested(10_000, "[", "", "]") + `}`, wantDown{err: errSyntax}},
	{`{"conn_id":"c","frame":` + nested(9_999, "[", "", "]") + `}`, wantDown{"c", nested(9_999, "[", "", "]"), 0, nil}},

	{`null`, wantDown{err: errNotObject}},
	{`[{"conn_id":"c","frame":1}]`, wantDown{err: errNotObject}},
	{`"conn_id"`, wantDown{err: errNotObject}},

	{`{"conn_id":"c","frame":1}x`, wantDown{err: errTrailing}},
	{`{"conn_id":"c","frame":1}}`, wantDown{err: errTrailing}},
	{`{"conn_id":"c","frame":1}{"conn_id":"c","frame":1}`, wantDown{err: errTrailing}},
	{`{"conn_id":"c","frame":1} null`, wantDown{err: errTrailing}},

	{`{"frame":1}`, wantDown{err: errConnID}},
	{`{"conn_id":"","frame":1}`, wantDown{err: errConnID}},
	{`{"conn_id":null,"frame":1}`, wantDown{err: errConnID}},
	{`{"conn_id":7,"frame":1}`, wantDown{err: errConnID}},
	{`{"conn_id":["c"],"frame":1}`, wantDown{err: errConnID}},
	{`{}`, wantDown{err: errConnID}},

	{`{"conn_id":"c","close_code":65536}`, wantDown{err: errCloseCode}},
	{`{"conn_id":"c","close_code":-1}`, wantDown{err: errCloseCode}},
	{`{"conn_id":"c","close_code":-0}`, wantDown{err: errCloseCode}},
	{`{"conn_id":"c","close_code":1e3}`, wantDown{err: errCloseCode}},
	{`{"conn_id":"c","close_code":1000.0}`, wantDown{err: errCloseCode}},
	{`{"conn_id":"c","close_code":"1000"}`, wantDown{err: errCloseCode}},
	{`{"conn_id":"c","close_code":true}`, wantDown{err: errCloseCode}},
	{`{"conn_id":"c","close_code":{}}`, wantDown{err: errCloseCode}},
	{`{"conn_id":"c","close_code":` + strings.Repeat("9", 400) + `}`, wantDown{err: errCloseCode}},

	{`{"conn_id":"c"}`, wantDown{err: errEmpty}},
	{`{"conn_id":"c","frame":null}`, wantDown{err: errEmpty}},
	{`{"conn_id":"c","close_code":0}`, wantDown{err: errEmpty}},
	{`{"conn_id":"c","push_wake":{}}`, wantDown{err: errEmpty}},

	{`{"push_wake":{"platform":"fcm","token":"t"}}`, wantDown{err: errPushWake}},
	{`{"push_wake":{},"conn_id":"","frame":null}`, wantDown{err: errPushWake}},
	{`{"push_wake":null}`, wantDown{err: errConnID}},
	{`{"push_wake":{}`, wantDown{err: errSyntax}},
}

// FuzzParseDown holds parseDown against encoding/json, which also takes a key in other case:
// an envelope with such a key is not compared.
func FuzzParseDown(f *testing.F) {
	for _, tt := range downEnvelopes {
		f.Add([]byte(tt.in))
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		before := bytes.Clone(p)
		got, err := parseDown(p)
		if !bytes.Equal(p, before) {
			t.Fatalf("%q was changed to %q", before, p)
		}
		if err != nil && (got.connID != nil || got.frame != nil || got.closeCode != 0) {
			t.Fatalf("parseDown(%q) = %+v with %v", p, got, err)
		}
		want, comparable := downByOracle(p)
		if !comparable {
			return
		}
		switch {
		case (err == nil) != (want.err == nil), errors.Is(err, errPushWake) != errors.Is(want.err, errPushWake):
			t.Fatalf("parseDown(%q): %v, want %v", p, err, want.err)
		case string(got.connID) != want.connID || string(got.frame) != want.frame || got.closeCode != want.closeCode:
			t.Fatalf("parseDown(%q) = %q, %q, %d, want %v", p, got.connID, got.frame, got.closeCode, want)
		}
	})
}

func downByOracle(p []byte) (want wantDown, comparable bool) {
	var keys map[string]json.RawMessage
	if err := json.Unmarshal(p, &keys); err != nil {
		return wantDown{err: err}, true
	}
	for key := range keys {
		for _, name := range []string{"conn_id", "frame", "close_code", "push_wake"} {
			if key != name && strings.EqualFold(key, name) {
				return wantDown{}, false
			}
		}
	}
	var e struct {
		ConnID    *string         `json:"conn_id"`
		Frame     json.RawMessage `json:"frame"`
		CloseCode *uint16         `json:"close_code"`
		PushWake  json.RawMessage `json:"push_wake"`
	}
	if err := json.Unmarshal(p, &e); err != nil {
		return wantDown{err: err}, true
	}
	if e.ConnID != nil {
		want.connID = *e.ConnID
	}
	if string(e.Frame) != "null" {
		want.frame = string(e.Frame)
	}
	if e.CloseCode != nil {
		want.closeCode = int(*e.CloseCode)
	}
	switch {
	case want.connID == "" && e.PushWake != nil && string(e.PushWake) != "null":
		return wantDown{err: errPushWake}, true
	case want.connID == "" || want.frame == "" && want.closeCode == 0:
		return wantDown{err: errors.New("incomplete")}, true
	}
	return want, true
}

func TestEnvelope_DoesNotAllocate(t *testing.T) {
	limit := 0.0
	if raceEnabled() {
		limit = 1 // a sync.Pool then drops one item in four
	}
	frame := sampleFrame(8 << 10)
	down := append(append(upPrefix("client-x-1", "", false), frame...), upSuffix...)
	if n := testing.AllocsPerRun(1000, func() { validFrame(frame) }); n > limit {
		t.Errorf("validFrame: %v allocations", n)
	}
	if n := testing.AllocsPerRun(1000, func() { _, _ = parseDown(down) }); n > limit {
		t.Errorf("parseDown: %v allocations", n)
	}
}

func raceEnabled() bool {
	info, ok := debug.ReadBuildInfo()
	return ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}

// sampleFrame returns a JSON array of messages, of size bytes or a little more.
func sampleFrame(size int) []byte {
	b := []byte(`[`)
	for i := 0; len(b) < size; i++ {
		b = fmt.Appendf(b, `{"id":%d,"type":"message","ok":true,"payload":{"text":"the quick brown fox, \"quoted\", é","n":[1,2.5,-3e7]}},`, i)
	}
	return append(b, `null]`...)
}

// sealedFrame returns an encrypted message: one long string of base64.
func sealedFrame(size int) []byte {
	return []byte(`{"type":"noise","data":"` + strings.Repeat("a+b/", size/4) + `"}`)
}

func BenchmarkValidFrame(b *testing.B) {
	benchmarkSizes(b, func(b *testing.B, frame []byte) {
		if !validFrame(frame) {
			b.Fatal("not valid")
		}
	})
}

func BenchmarkParseDown(b *testing.B) {
	var envelope, of []byte
	benchmarkSizes(b, func(b *testing.B, frame []byte) {
		if len(of) == 0 || &of[0] != &frame[0] {
			of = frame
			envelope = append(append(upPrefix("client-1b4e28ba-2fa1-11d2-883f-0016d3cca427-0123456789abcdef", "", false), frame...), upSuffix...)
		}
		if _, err := parseDown(envelope); err != nil {
			b.Fatal(err)
		}
	})
}

func benchmarkSizes(b *testing.B, run func(*testing.B, []byte)) {
	for _, size := range []int{300, 8 << 10, 64 << 10} {
		for name, frame := range map[string][]byte{"plain": sampleFrame(size), "sealed": sealedFrame(size)} {
			b.Run(fmt.Sprintf("%s/%d", name, size), func(b *testing.B) {
				b.ReportAllocs()
				b.SetBytes(int64(len(frame)))
				for b.Loop() {
					run(b, frame)
				}
			})
		}
	}
}

func BenchmarkUpPrefix(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		upPrefix("client-1b4e28ba-2fa1-11d2-883f-0016d3cca427-0123456789abcdef", "", false)
	}
}
