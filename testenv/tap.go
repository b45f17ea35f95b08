package testenv

import (
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync"
)

// tap is the logger of a nats-server that traces: it shows a Detector all that
// clients tell the server, but for the data of messages that are not for a KV
// bucket, where frames belong. A client that subscribed to ">" would see as
// much and disturb: there would be somebody on every subject, and never again
// "no responders".
type tap struct {
	lines  io.Writer // subjects, and the headers of messages
	values io.Writer // of KV entries

	// Guarded by mu.
	mu   sync.Mutex
	next map[string]announced // by connection: the message whose bytes come next
}

// announced is a message of which the server has read the first line.
type announced struct {
	subject string
	header  int // bytes of the message that are its header
}

func newTap(d *Detector) *tap {
	return &tap{
		lines:  d.Writer("NATS subjects and headers"),
		values: d.Writer("KV values"),
		next:   make(map[string]announced),
	}
}

// Tracef gets what the server reads: the name and the arguments of an operation,
// or the bytes of a message. TestDetector_LooksThroughNATS fails when a nats-server
// comes that does this in another way.
func (t *tap) Tracef(format string, args ...any) {
	if conn, ok := strings.CutSuffix(format, "<<- %s"); ok {
		t.operation(conn, strings.Fields(fmt.Sprintln(args[0].([]any)...)))
	} else if conn, ok := strings.CutSuffix(format, "%s MSG_PAYLOAD: [%q]"); ok && args[0] == "<<-" {
		t.message(conn, args[1].([]byte))
	}
}

func (t *tap) operation(conn string, words []string) {
	fmt.Fprintln(t.lines, words)
	if len(words) < 3 || words[0] != "PUB" && words[0] != "HPUB" {
		return
	}
	a := announced{subject: strings.Clone(words[1])} // what words point to is the server's
	if words[0] == "HPUB" {
		a.header, _ = strconv.Atoi(words[len(words)-2])
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.next[conn] = a
}

func (t *tap) message(conn string, data []byte) {
	t.mu.Lock()
	a, ok := t.next[conn]
	delete(t.next, conn)
	t.mu.Unlock()
	if !ok {
		return // from another server, whose client told it
	}
	header := min(a.header, len(data))
	if header > 0 {
		fmt.Fprintf(t.lines, "%s %s\n", a.subject, data[:header])
	}
	if strings.HasPrefix(a.subject, "$KV.") {
		fmt.Fprintf(t.values, "%s %s\n", a.subject, data[header:])
	}
}

// The rest of server.Logger.

func (*tap) Noticef(string, ...any) {}
func (*tap) Warnf(string, ...any)   {}
func (*tap) Errorf(string, ...any)  {}
func (*tap) Fatalf(string, ...any)  {}
func (*tap) Debugf(string, ...any)  {}
