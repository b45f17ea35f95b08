package gateway

import (
	"net/http"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/pyrycode/pyrycode-relay/bus"
)

const secret = "s3cret"

func TestReadPhoneHeaders(t *testing.T) {
	full := map[string]string{
		"x-pyrycode-server": "s", "x-pyrycode-token": secret, "x-pyrycode-device-name": "Pixel", "user-agent": "app/1",
	}
	for _, tt := range headerCases("x-pyrycode-token", errNoToken) {
		p, err := readPhoneHeaders(tt.apply(full))
		if err != tt.want { //nolint:errorlint // the very value, its text is the body
			t.Errorf("%s=%.20q: %v, want %v", tt.name, tt.value, err, tt.want)
		}
		if err != nil && p != (phoneHeaders{}) {
			t.Errorf("%s=%.20q: headers with an error", tt.name, tt.value)
		}
	}
	got, err := readPhoneHeaders(headersOf(full))
	if want := (phoneHeaders{serverID: "s", token: secret, deviceName: "Pixel", userAgent: "app/1"}); got != want || err != nil {
		t.Errorf("got %+v, %v, want %+v", got, err, want)
	}
	delete(full, "x-pyrycode-device-name")
	if got, err := readPhoneHeaders(headersOf(full)); err != nil || got.deviceName != "" {
		t.Errorf("without a device name: %+v, %v", got, err)
	}
}

func TestReadBinaryHeaders(t *testing.T) {
	full := map[string]string{"x-pyrycode-server": "s", "x-pyrycode-version": "0.9.1", "user-agent": "pyry/0.9.1"}
	for _, tt := range headerCases("x-pyrycode-version", errNoVersion) {
		b, err := readBinaryHeaders(tt.apply(full))
		if err != tt.want { //nolint:errorlint // the very value, its text is the body
			t.Errorf("%s=%.20q: %v, want %v", tt.name, tt.value, err, tt.want)
		}
		if err != nil && b != (binaryHeaders{}) {
			t.Errorf("%s=%.20q: headers with an error", tt.name, tt.value)
		}
	}
	got, err := readBinaryHeaders(headersOf(full))
	if want := (binaryHeaders{serverID: "s", version: "0.9.1", userAgent: "pyry/0.9.1"}); got != want || err != nil {
		t.Errorf("got %+v, %v, want %+v", got, err, want)
	}
}

// headerCase sets one header of a complete set; an empty value deletes it.
type headerCase struct {
	name, value string
	want        error
}

func headerCases(own string, missing error) []headerCase {
	const id = "x-pyrycode-server"
	return []headerCase{
		{id, "", errNoServerID},
		{own, "", missing},
		{"user-agent", "", errNoUserAgent},
		{id, strings.Repeat("x", 128), nil},
		{id, strings.Repeat("x", 129), errLongServerID},
		{id, strings.Repeat("é", 64), nil},
		{id, strings.Repeat("é", 65), errLongServerID},
		{id, strings.Repeat("\xff", 100_000), errLongServerID},
		{id, "a\xff", errTextServerID},
		{id, "a.*.> \tb", nil},
		{own, strings.Repeat("x", 100_000), nil},
	}
}

func (c headerCase) apply(full map[string]string) http.Header {
	h := headersOf(full)
	h.Set(c.name, c.value)
	if c.value == "" {
		h.Del(c.name)
	}
	return h
}

func headersOf(values map[string]string) http.Header {
	h := http.Header{}
	for name, value := range values {
		h.Set(name, value)
	}
	return h
}

func TestLogText(t *testing.T) {
	x64 := strings.Repeat("x", 64)
	for _, tt := range []struct{ in, want string }{
		{"", ""},
		{"Juhana's Pixel 9 (työ) 🦊", "Juhana's Pixel 9 (työ) 🦊"},
		{x64, x64},
		{x64 + "y", x64},
		{x64[:63] + "é", x64[:63]},
		{x64[:62] + "é", x64[:62] + "é"},
		{x64[:62] + "\xff", x64[:62]},
		{"a\x00b\nc\x7fd\u0085e", "a\ufffdb\ufffdc\ufffdd\ufffde"},
		{"a\u202eb\u2028c\u200bd", "a\ufffdb\ufffdc\ufffdd"},
		{"a\xffb\xe2\x82", "a\ufffdb\ufffd\ufffd"},
	} {
		if got := logText(tt.in); got != tt.want {
			t.Errorf("logText(%q) = %q, want %q", tt.in, got, tt.want)
		}
	}
	id := strings.Repeat("é", bus.MaxServerID/2)
	if got := logServerID(id + "x"); got != id {
		t.Errorf("logServerID cut to %q", got)
	}
}

func FuzzLogText(f *testing.F) {
	f.Add("Pixel 9")
	f.Add("\x00\n\xff\u202e" + strings.Repeat("é", 40))
	f.Fuzz(func(t *testing.T, s string) {
		got := logText(s)
		if len(got) > maxLogText || !utf8.ValidString(got) || strings.ContainsAny(got, "\x00\x1b\r\n\u2028\u202e") {
			t.Errorf("logText(%q) = %q", s, got)
		}
		if again := logText(got); again != got {
			t.Errorf("logText(%q) = %q", got, again)
		}
	})
}
