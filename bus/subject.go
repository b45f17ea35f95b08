package bus

import "strings"

// Every subject of the relay:
//
//	pyrycode.relay.v1.<node>.server.<token>   to the node that holds the binary
//	pyrycode.relay.v1.<node>.phone.<token>    to the node that holds the phone
//	pyrycode.relay.v1.<node>.claim.<token>    claims: CHALLENGE and TAKEN
//	pyrycode.relay.v1.<node>.node             HELLO: is this node there?
//	pyrycode.relay.inbox.<node>.>             replies
//
// A node subscribes once, to pyrycode.relay.v1.<node>.>, before it announces
// itself. v1 is the version of this layout; the version of the messages is in
// their first byte.                                   (docs/adr/0002)
const (
	subjectPrefix = "pyrycode.relay.v1."
	inboxPrefix   = "pyrycode.relay.inbox."
)

// topic is what a message of a node's subject is about.
type topic string

const (
	topicServer topic = "server" // link messages from a phone's node
	topicPhone  topic = "phone"  // link messages from a binary's node
	topicClaim  topic = "claim"
	topicNode   topic = "node"
)

func nodeWildcard(n NodeID) string { return subjectPrefix + string(n) + ".>" }

func nodeSubject(n NodeID) string { return subjectPrefix + string(n) + "." + string(topicNode) }

func tokenSubject(n NodeID, t topic, token string) string {
	return subjectPrefix + string(n) + "." + string(t) + "." + token
}

// splitSubject takes a subject that arrived on node n's subscription apart. ok
// is false for anything that no relay would send.
func splitSubject(n NodeID, subject string) (t topic, token string, ok bool) {
	rest, ok := strings.CutPrefix(subject, subjectPrefix+string(n)+".")
	if !ok {
		return "", "", false
	}
	head, token, found := strings.Cut(rest, ".")
	switch t = topic(head); t {
	case topicNode:
		return t, "", !found
	case topicServer, topicPhone, topicClaim:
		return t, token, found && token != "" && !strings.Contains(token, ".")
	}
	return "", "", false
}
