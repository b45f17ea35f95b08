package bus

import (
	"encoding/json"
	"regexp"
	"strings"
	"testing"
)

func TestToken(t *testing.T) {
	for _, c := range []struct{ text, token string }{
		{"", ""},
		{"6ba7b810-9dad-11d1-80b4-00c04fd430c8", "6ba7b810-9dad-11d1-80b4-00c04fd430c8"},
		{"AZaz09_-", "AZaz09_-"},
		{"a.b", "a=2Eb"},
		{"*", "=2A"},
		{">", "=3E"},
		{"a b\tc\r\n", "a=20b=09c=0D=0A"},
		{"=", "=3D"},
		{"=3D", "=3D3D"},
		{"$JS.API", "=24JS=2EAPI"},
		{"\x00\x7f\xff", "=00=7F=FF"},
		{"é", "=C3=A9"},
		{strings.Repeat(".", MaxServerID), strings.Repeat("=2E", MaxServerID)},
	} {
		if got := EncodeToken(c.text); got != c.token {
			t.Errorf("EncodeToken(%q) = %q, want %q", c.text, got, c.token)
		}
		if got, err := DecodeToken(c.token); err != nil || got != c.text {
			t.Errorf("DecodeToken(%q) = %q, %v, want %q", c.token, got, err, c.text)
		}
	}
}

func TestDecodeTokenRefusesWhatEncodeTokenDoesNotMake(t *testing.T) {
	for _, token := range []string{
		"=", "a=", "=2", "a=2", // cut off
		"=2e", "=zz", "= 2", "=+1", "==3D", // not upper-case hex
		"=41", "=5F", "=2D", // needs no escape
		"a.b", "*", ">", "a b", "é", "\x00", // needs one
		"=2E.", "a=2E b",
	} {
		if got, err := DecodeToken(token); err == nil {
			t.Errorf("DecodeToken(%q) = %q, want an error", token, got)
		}
	}
}

var tokenForm = regexp.MustCompile(`^[A-Za-z0-9_=-]*$`)

func FuzzToken(f *testing.F) {
	for _, s := range []string{"", "a", "a.b", "*", ">", "=", "=2E", "=2e", "=41", "é", "\xff\x00", "6ba7b810-9dad-11d1-80b4-00c04fd430c8"} {
		f.Add(s, "b")
	}
	f.Fuzz(func(t *testing.T, s, other string) {
		token := EncodeToken(s)
		if !tokenForm.MatchString(token) || len(token) > 3*len(s) {
			t.Errorf("EncodeToken(%q) = %q", s, token)
		}
		if got, err := DecodeToken(token); err != nil || got != s {
			t.Errorf("DecodeToken(EncodeToken(%q)) = %q, %v", s, got, err)
		}
		if s != other && EncodeToken(other) == token {
			t.Errorf("%q and %q have one token, %q", s, other, token)
		}
		if text, err := DecodeToken(s); err == nil && EncodeToken(text) != s {
			t.Errorf("DecodeToken takes %q, which is not how %q is encoded", s, text)
		}
	})
}

func TestNodeIDs_AreFreshSafeAndShort(t *testing.T) {
	for _, gateway := range []string{"", "gw-1", "host.example.com", "*.>", strings.Repeat("gw", 5000), strings.Repeat(">", 5000)} {
		a, b := NewNodeID(gateway), NewNodeID(gateway)
		if a == b {
			t.Errorf("two processes of %.20q have one id, %s", gateway, a)
		}
		if !regexp.MustCompile(`^[A-Za-z0-9_=-]*-[0-9a-f]{8}$`).MatchString(string(a)) || len(a) > 255 {
			t.Errorf("node id of %.20q is %q", gateway, a)
		}
		node, conn, ok := splitOpen(joinOpen(a, "conn"))
		if node != a || conn != "conn" || !ok {
			t.Errorf("through OPEN, %q became %q, %q, %v", a, node, conn, ok)
		}
	}
}

func TestSessionID_IsTextInJSON(t *testing.T) {
	s := NewSessionID()
	if s == (SessionID{}) || s == NewSessionID() {
		t.Fatalf("session %s is not random", s)
	}
	text, err := json.Marshal(s)
	if err != nil || string(text) != `"`+s.String()+`"` || len(s.String()) != 32 {
		t.Fatalf("session as JSON is %s, %v", text, err)
	}
	var got SessionID
	if err := json.Unmarshal(text, &got); err != nil || got != s {
		t.Errorf("got %s, %v, want %s", got, err, s)
	}
	for _, bad := range []string{"", "00", strings.Repeat("0", 31), strings.Repeat("0", 33), strings.Repeat("0", 31) + "g"} {
		kept := s
		if err := kept.UnmarshalText([]byte(bad)); err == nil || kept != s {
			t.Errorf("UnmarshalText(%q): error %v, and the session changed to %s", bad, err, kept)
		}
	}
}

func TestConnIDs_HaveTheContractsForm(t *testing.T) {
	id := NewConnID("my.server")
	if !regexp.MustCompile(`^client-my\.server-[0-9a-f]{16}$`).MatchString(id) {
		t.Errorf("conn id %q", id)
	}
	if id == NewConnID("my.server") {
		t.Error("two conn ids are one")
	}
}
