package bus

import (
	"strings"
	"testing"
)

func TestSubjects_RoundTrip(t *testing.T) {
	const node = NodeID("gw=2E1-00c0ffee")
	for _, server := range []string{"s", "a.b", "*", ">", "a b", "é", strings.Repeat(">", MaxServerID)} {
		for _, topic := range []topic{topicServer, topicPhone, topicClaim} {
			subject := tokenSubject(node, topic, EncodeToken(server))
			got, token, ok := splitSubject(node, subject)
			if back, err := DecodeToken(token); got != topic || !ok || err != nil || back != server {
				t.Errorf("split %q: %q %q %v, server %q %v", subject, got, token, ok, back, err)
			}
		}
	}
	if got, token, ok := splitSubject(node, nodeSubject(node)); got != topicNode || token != "" || !ok {
		t.Errorf("split %q: %q %q %v", nodeSubject(node), got, token, ok)
	}
	if got, want := tokenSubject("gw-1", topicServer, "s"), "pyrycode.relay.v1.gw-1.server.s"; got != want {
		t.Errorf("subject %q, want %q: it is a contract between nodes", got, want)
	}
}

func TestSplitSubject_RefusesWhatNoRelaySends(t *testing.T) {
	for _, subject := range []string{
		"", "x", subjectPrefix, subjectPrefix + "n", subjectPrefix + "n.", subjectPrefix + "n.server", subjectPrefix + "n.server.",
		subjectPrefix + "n.server.a.b", subjectPrefix + "n.phone.", subjectPrefix + "n.node.x", subjectPrefix + "n.node.",
		subjectPrefix + "n.other.a", subjectPrefix + "n..a", subjectPrefix + "nn.server.a", subjectPrefix + "m.server.a",
		"pyrycode.relay.v2.n.server.a", " " + subjectPrefix + "n.server.a",
	} {
		if topic, token, ok := splitSubject("n", subject); ok {
			t.Errorf("splitSubject(%q) = %q, %q, want it refused", subject, topic, token)
		}
	}
}

func FuzzSubject_OneToken(f *testing.F) {
	for _, s := range []string{"s", "*", ">", "a.b", "a b", "\r\nPUB x 0\r\n", "$SYS", "", "."} {
		f.Add(s, s)
	}
	f.Fuzz(func(t *testing.T, gateway, server string) {
		node := NewNodeID(gateway)
		subject := tokenSubject(node, topicServer, EncodeToken(server))
		if n := strings.Count(subject, "."); n != strings.Count(subjectPrefix, ".")+2 {
			t.Errorf("%q has %d dots", subject, n)
		}
		if strings.ContainsAny(subject, "*> \t\r\n\x00") {
			t.Errorf("%q holds what means something to NATS", subject)
		}
		if topic, token, ok := splitSubject(node, subject); ok != (server != "") || ok && (topic != topicServer || token != EncodeToken(server)) {
			t.Errorf("split %q: %q %q %v", subject, topic, token, ok)
		}
		splitSubject(node, server) // whatever it is
	})
}
