package gateway

import (
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pyrycode/pyrycode-relay/bus"
	"github.com/pyrycode/pyrycode-relay/registry"
)

// sentinels are the exported error variables of a room, read from its source.
func sentinels(t *testing.T, file string) (names []string) {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range f.Decls {
		if g, ok := d.(*ast.GenDecl); ok && g.Tok == token.VAR {
			for _, s := range g.Specs {
				for _, n := range s.(*ast.ValueSpec).Names {
					if n.IsExported() {
						names = append(names, n.Name)
					}
				}
			}
		}
	}
	return names
}

func TestCodeFor_EverySentinelIsMapped(t *testing.T) {
	want := map[string]struct {
		err    error
		code   int
		reason string
	}{
		"bus.ErrLinkLost":              {bus.ErrLinkLost, 1011, "relay link lost"},
		"bus.ErrNodeGone":              {bus.ErrNodeGone, 4404, "binary's gateway is gone"},
		"bus.ErrReclaimed":             {bus.ErrReclaimed, 4404, "binary reclaimed server-id"},
		"bus.ErrMoved":                 {bus.ErrMoved, 4404, "binary reclaimed server-id"},
		"bus.ErrAway":                  {bus.ErrAway, 4404, "binary is away"},
		"bus.ErrGraceOver":             {bus.ErrGraceOver, 1000, ""},
		"bus.ErrBacklog":               {bus.ErrBacklog, 1011, "phone backlog full"},
		"bus.ErrNoSession":             {bus.ErrNoSession, 4404, "no server with that id"},
		"bus.ErrTooManyPhones":         {bus.ErrTooManyPhones, 4429, "too many phones for server-id"},
		"bus.ErrClosed":                {bus.ErrClosed, 1011, "relay link lost"},
		"bus.ErrNoResponders":          {bus.ErrNoResponders, 1011, "relay link lost"},
		"bus.ErrVersion":               {bus.ErrVersion, 1011, "relay link lost"},
		"registry.ErrNoServer":         {registry.ErrNoServer, 4404, "no server with that id"},
		"registry.ErrTooManyPhones":    {registry.ErrTooManyPhones, 4429, "too many phones for server-id"},
		"registry.ErrServerIDConflict": {registry.ErrServerIDConflict, 4409, "server-id already claimed"},
		"registry.ErrHeld":             {registry.ErrHeld, 1011, "claim undecided"},
		"registry.ErrUndecided":        {registry.ErrUndecided, 1011, "claim undecided"},
		"registry.ErrNotReady":         {registry.ErrNotReady, 1011, "claim undecided"},
		"registry.ErrDisplaced":        {registry.ErrDisplaced, 1011, "heartbeat timeout"},
		"registry.ErrClosed":           {registry.ErrClosed, 1011, "relay link lost"},
	}
	seen := 0
	for _, room := range []string{"bus", "registry"} {
		for _, name := range sentinels(t, "../"+room+"/errors.go") {
			name = room + "." + name
			tt, ok := want[name]
			if !ok {
				t.Errorf("%s: no close code is known", name)
				continue
			}
			seen++
			inTable := false
			for _, row := range codeTable {
				inTable = inTable || errors.Is(tt.err, row.err)
			}
			if !inTable {
				t.Errorf("%s is not in codeTable", name)
			}
			if got := codeFor(fmt.Errorf("wrapped: %w", tt.err)); got.code != tt.code || got.reason != tt.reason {
				t.Errorf("%s: %d %q, want %d %q", name, got.code, got.reason, tt.code, tt.reason)
			}
		}
	}
	if seen != len(want) {
		t.Errorf("%d sentinels are left, the table here has %d", seen, len(want))
	}
	if got := codeFor(bus.CodeError(4321)); got != (closeCode{code: 4321}) {
		t.Errorf("a peer's code: %+v", got)
	}
}

func TestSendable(t *testing.T) {
	for code := range 70_000 {
		want := code >= 1000 && code <= 1014 && code != 1004 && code != 1006 || code >= 3000 && code <= 4999
		if got := sendable(code); got != want {
			t.Fatalf("sendable(%d) = %v, want %v", code, got, want)
		}
	}
}

func TestDirective_ClosesThePhone(t *testing.T) {
	t.Parallel()
	eachPlacement(t, func(t *testing.T, phones, binaries *node) {
		id := newServerID()
		b := binaries.binary(id)
		for _, tt := range []struct{ code, want int }{
			{4000, 4000}, {4401, 4401}, {4421, 4421}, {1000, 1000}, {1001, 1001}, {1011, 1011}, {1013, 1013}, {3000, 3000}, {4999, 4999},
			{1005, 1005},
			{1006, 1006}, {1004, 1006}, {1015, 1006}, {999, 1006}, {1, 1006}, {1016, 1006}, {2000, 1006}, {2999, 1006}, {5000, 1006}, {65535, 1006},
		} {
			for _, frame := range []string{"", `"bye"`} {
				p, connID := join(phones, b, id)
				b.send(connID, "1")
				b.send(connID, "2")
				b.sendClose(connID, tt.code, frame)
				b.send(connID, `"too late"`)
				p.wantFrame("1")
				p.wantFrame("2")
				if frame != "" {
					p.wantFrame(frame)
				}
				p.wantClosed(tt.want, "")
				phones.wantEvent("phone_unregistered", map[string]string{"conn_id": connID})
			}
		}
		wantQuiet(t, b.Peer) // no close notice for what it asked for
		await(t, "none is attached", func() bool { return len(connIDs(phones.reg, id)) == 0 })
	})
}

func TestCloseNotice_SaysHowThePhoneEnded(t *testing.T) {
	t.Parallel()
	eachPlacement(t, func(t *testing.T, phones, binaries *node) {
		id := newServerID()
		b := binaries.binary(id)
		for _, code := range []int{1000, 1001, 1002, 1008, 1011, 1014, 3000, 4000, 4404, 4999, 1005} {
			p, connID := join(phones, b, id)
			p.send(`"last"`)
			if err := p.Close(code, "a reason"); err != nil {
				t.Fatal(err)
			}
			b.wantFrame(`"last"`)
			b.wantNotice(connID, code)
		}
		p, connID := join(phones, b, id)
		p.send(`"last"`)
		p.Drop()
		e := b.next()
		if !e.HasClose { // a reset may destroy the frame before it
			e = b.next()
		}
		if e.ConnID != connID || e.CloseCode != 1001 {
			t.Errorf("after a drop: %s", e.Raw)
		}
		await(t, "none is attached", func() bool { return len(connIDs(phones.reg, id)) == 0 })
		silent := phones.phone(id)
		connID = connIDs(phones.reg, id)[0]
		if err := silent.Close(1000, ""); err != nil {
			t.Fatal(err)
		}
		b.wantNotice(connID, 1000) // for every end, also of one that never sent a frame
		await(t, "none is attached", func() bool { return len(connIDs(phones.reg, id)) == 0 })
		wantQuiet(t, b.Peer) // each once
	})
}

// Many phones send and leave at the same moment. Of each, the binary sees its frames
// in order, then one notice, then nothing.
func TestCloseNotice_IsTheLastOfItsPhone(t *testing.T) {
	t.Parallel()
	const count, frames = 40, 5
	eachPlacement(t, func(t *testing.T, phones, binaries *node) {
		id := newServerID()
		b := binaries.binary(id)
		var want []string
		start := make(chan struct{})
		var left sync.WaitGroup
		for i := range count {
			p := phones.phone(id)
			life := ""
			for k := range frames {
				life += fmt.Sprint(i*frames+k, " ")
			}
			want = append(want, life+fmt.Sprint("close ", 4000+i))
			left.Go(func() {
				<-start
				for frame := range strings.FieldsSeq(life) {
					if err := p.Send(soon(t), []byte(frame)); err != nil {
						t.Errorf("phone %d: %v", i, err)
					}
				}
				if err := p.Close(4000+i, ""); err != nil {
					t.Errorf("phone %d: %v", i, err)
				}
			})
		}
		close(start)
		seen := make(map[string]string) // by conn_id
		for notices := 0; notices < count; {
			e := b.next()
			if e.HasClose {
				notices++
				seen[e.ConnID] += fmt.Sprint("close ", e.CloseCode)
				continue
			}
			seen[e.ConnID] += string(e.Frame) + " "
			b.send(e.ConnID, string(e.Frame)) // an answer, which may meet the end
		}
		left.Wait()
		await(t, "none is attached", func() bool { return len(connIDs(phones.reg, id)) == 0 })
		wantQuiet(t, b.Peer)
		slices.Sort(want)
		if got := slices.Sorted(maps.Values(seen)); !slices.Equal(got, want) {
			t.Errorf("the phones are seen as\n%q, want\n%q", got, want)
		}
	}, func(s *settings) { s.registry.MaxPhones = count })
}

// A peer that dies with a ping under way ends with its own code.
func TestCloseNotice_PhoneClosesUnderAPing(t *testing.T) {
	t.Parallel()
	eachPlacement(t, func(t *testing.T, phones, binaries *node) {
		id := newServerID()
		b := binaries.binary(id)
		for range 20 {
			c := phones.rawDial(id)
			if _, err := c.Write(maskedFrame(0x81, []byte(`1`))); err != nil {
				t.Fatal(err)
			}
			connID := b.wantFrame("1")
			c.SetReadDeadline(time.Now().Add(patience))
			if _, err := c.Read(make([]byte, 1)); err != nil { // the ping, to which no pong comes
				t.Fatal(err)
			}
			if _, err := c.Write(maskedFrame(0x88, []byte{4001 >> 8, 4001 & 0xff})); err != nil {
				t.Fatal(err)
			}
			b.wantNotice(connID, 4001)
		}
	}, func(s *settings) { s.gateway.PingInterval = 30 * time.Millisecond })
}

// A close waits for the peer's own close frame before the connection goes.
func TestClose_WaitsForTheEcho(t *testing.T) {
	t.Parallel()
	eachPlacement(t, func(t *testing.T, phones, binaries *node) {
		id := newServerID()
		b := binaries.binary(id)
		c := phones.rawDial(id)
		if _, err := c.Write(maskedFrame(0x81, []byte(`1`))); err != nil {
			t.Fatal(err)
		}
		b.sendClose(b.wantFrame("1"), 4000, "")
		c.SetReadDeadline(time.Now().Add(patience))
		frame := make([]byte, 4)
		if n, err := c.Read(frame); err != nil || n != 4 || frame[0] != 0x88 || frame[2] != 4000>>8 || frame[3] != 4000&0xff {
			t.Fatalf("got %x, %v, want a close frame of 4000", frame[:n], err)
		}
		c.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
		if _, err := c.Read(frame); !isTimeout(err) {
			t.Fatalf("before the echo: %v", err)
		}
		for range 100 { // what is under way is no reason for a reset
			if _, err := c.Write(maskedFrame(0x81, []byte(`"late"`))); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := c.Write(maskedFrame(0x88, frame[2:])); err != nil {
			t.Fatal(err)
		}
		c.SetReadDeadline(time.Now().Add(patience))
		if n, err := c.Read(frame); n != 0 || isTimeout(err) {
			t.Errorf("after the echo: %d bytes, %v", n, err)
		}
		wantQuiet(t, b.Peer)
	}, heartbeatOf(time.Hour, time.Hour)) // no ping among the bytes
}

func TestPhoneCap_OverTheCluster(t *testing.T) {
	t.Parallel()
	eachPlacement(t, func(t *testing.T, phones, binaries *node) {
		id := newServerID()
		b := binaries.binary(id)
		var all []*testPhone
		for i := range 16 {
			p, _ := join([]*node{phones, binaries}[i%2], b, id)
			all = append(all, p)
		}
		for _, n := range []*node{phones, binaries} {
			n.phone(id).wantClosed(4429, "too many phones for server-id")
		}
		n := phones.phone(newServerID())
		n.wantClosed(4404, "no server with that id")
		if err := all[0].Close(1000, ""); err != nil {
			t.Fatal(err)
		}
		b.next() // its notice
		join(phones, b, id)
		phones.phone(id).wantClosed(4429, "too many phones for server-id")
		if got := phones.metric(`pyrycode_relay_register_failures_total{kind="too_many_phones"}`); got == "0" {
			t.Error("the failures were not counted")
		}
		wantQuiet(t, b.Peer) // nothing of those that were refused
	})
}

// The library reads a frame that has begun to its end before it looks for the
// close frame, and this frame never ends.
func TestClose_EndsUnderAFrameThatNeverComes(t *testing.T) {
	t.Parallel()
	n := newCluster(t, 1)[0]
	id := newServerID()
	n.binary(id)
	c := n.rawDial(id)
	head := []byte{0x81, 0x80 | 127, 0, 0, 1, 0, 0, 0, 0, 0, 1, 2, 3, 4} // 2^40 bytes of text
	if _, err := c.Write(append(head, make([]byte, 263_000)...)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write(make([]byte, 15_000)); err != nil {
		t.Fatal(err)
	}
	_ = c.SetReadDeadline(time.Now().Add(closeTimeout + patience))
	if _, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("the connection is still open")
	}
}
