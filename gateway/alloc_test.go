package gateway

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"runtime"
	"testing"
	"time"

	bin "encoding/binary"
)

// A frame between a phone and a binary of one node is routed without an allocation, in
// either direction: not by the relay, and not by the WebSocket library.
//
//	(docs/performance.md)
func TestFrame_OneNode_DoesNotAllocate(t *testing.T) {
	n := newCluster(t, 1)[0]
	id := newServerID()
	b := n.rawServe(id)
	p := n.rawDial(id)
	for _, c := range []net.Conn{p, b} {
		c.SetDeadline(time.Now().Add(patience))
	}
	frame := sealedFrame(300)
	up := maskedFrame(0x81, frame)
	write(t, p, up)
	first := readText(t, b)
	connID := jsonString(t, envelopeOf(t, first)["conn_id"])
	down := maskedFrame(0x81, fmt.Appendf(nil, `{"conn_id":%q,"frame":%s}`, connID, frame))
	atBinary, atPhone := make([]byte, len(textFrame(fmt.Appendf(nil, `{"conn_id":%q,"frame":%s}`, connID, frame)))), make([]byte, len(textFrame(frame)))
	trip := func() {
		write(t, p, up)
		read(t, b, atBinary)
		write(t, b, down)
		read(t, p, atPhone)
	}
	for range 200 {
		trip()
	}
	const trips = 2000
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for range trips {
		trip()
	}
	runtime.ReadMemStats(&after)
	perFrame := float64(after.Mallocs-before.Mallocs) / (2 * trips)
	limit := 0.2 // the garbage collector empties pools, and leases are renewed
	if raceEnabled() {
		limit = 4 // sync.Pool then drops one item in four
	}
	t.Logf("%.3f allocations a frame", perFrame)
	if perFrame > limit {
		t.Errorf("%.3f allocations a frame, want at most %v", perFrame, limit)
	}
}

func write(t *testing.T, c net.Conn, p []byte) {
	if _, err := c.Write(p); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, c net.Conn, p []byte) {
	if _, err := io.ReadFull(c, p); err != nil {
		t.Fatal(err)
	}
}

// readText reads one text frame of fewer than 64 KiB.
func readText(t *testing.T, c net.Conn) []byte {
	t.Helper()
	head := make([]byte, 2)
	read(t, c, head)
	n := int(head[1])
	if n == 126 {
		length := make([]byte, 2)
		read(t, c, length)
		n = int(bin.BigEndian.Uint16(length))
	}
	text := make([]byte, n)
	read(t, c, text)
	return text
}

func envelopeOf(t *testing.T, p []byte) (fields map[string]json.RawMessage) {
	t.Helper()
	if err := json.Unmarshal(p, &fields); err != nil {
		t.Fatalf("%q: %v", p, err)
	}
	return fields
}
