package gateway

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pyrycode/pyrycode-relay/testenv"
)

const maxFrame = 262_144

// exactFrames arrive bit for bit, in either direction.
var exactFrames = []string{
	`{"html":"<b>&amp;</b>\u003c\u0026","n":1e400,"a":1,"a":2}`,
	`{ "spaces" :  [ 1 ,	2 ] , "lone":"\ud800", "esc":"\u0041\/" }`,
	`"` + "\u2028\u2029\x7f" + `"`, `123456789012345678901234567890.10`, `-0`, `1E+2`,
	`true`, `false`, `[]`, `{}`, `""`, `"conn_id"`, `{"conn_id":"x","close_code":4000,"token":"y"}`,
	`{"mark":"` + markFrame + `"}`, strings.Repeat("[", 9_000) + strings.Repeat("]", 9_000),
}

func TestRoute_FramesAreSpliced(t *testing.T) {
	t.Parallel()
	eachPlacement(t, func(t *testing.T, phones, binaries *node) {
		p, b, connID := meet(phones, binaries)
		for _, frame := range append(exactFrames, "null") {
			p.send(frame)
			// Not b.wantFrame: what must not be rewritten is looked at as bytes.
			raw, err := b.Next(soon(t))
			if err != nil {
				t.Fatal(err)
			}
			if want := fmt.Sprintf(`{"conn_id":%q,"frame":%s}`, connID, frame); string(raw) != want {
				t.Fatalf("binary got %.200q, want %.200q", raw, want)
			}
		}
		for _, frame := range exactFrames {
			b.sendRaw(fmt.Sprintf(`{"conn_id":%q,"frame":%s}`, connID, frame))
			p.wantFrame(frame)
		}
		// What a binary puts inside a frame is passed on as it is.
		b.sendRaw(fmt.Sprintf("{\"frame\":\"\xff\xfe\", \"unknown\":[1,{}], \"conn\\u005fid\" : %q }", connID))
		p.wantFrame("\"\xff\xfe\"")
		// Spaces around a phone's value are no part of it, or arrive; nothing else.
		p.send(" \r\n\t{\"a\": 1}\n ")
		if e := b.next(); strings.TrimSpace(string(e.Frame)) != `{"a": 1}` {
			t.Errorf("binary got %q", e.Raw)
		}
	})
}

func TestRoute_TextOutWhateverCameIn(t *testing.T) {
	t.Parallel()
	eachPlacement(t, func(t *testing.T, phones, binaries *node) {
		p, b, connID := meet(phones, binaries)
		if err := p.SendBinary(soon(t), []byte(`{"bin":1}`)); err != nil {
			t.Fatal(err)
		}
		m, err := b.NextMessage(soon(t))
		if err != nil || m.Binary || !bytes.HasSuffix(m.Data, []byte(`"frame":{"bin":1}}`)) {
			t.Errorf("binary got %+v, %v", m, err)
		}
		if err := b.SendBinary(soon(t), fmt.Appendf(nil, `{"conn_id":%q,"frame":2}`, connID)); err != nil {
			t.Fatal(err)
		}
		p.wantFrame("2")
	})
}

func TestRoute_Fragments(t *testing.T) {
	t.Parallel()
	eachPlacement(t, func(t *testing.T, phones, binaries *node) {
		p, b, connID := meet(phones, binaries)
		if err := p.SendFragments(soon(t), []byte(`{"a`), nil, []byte(`":`), []byte(`1}`)); err != nil {
			t.Fatal(err)
		}
		b.wantFrame(`{"a":1}`)
		if err := b.SendFragments(soon(t), fmt.Appendf(nil, `{"conn_id":%q,`, connID), []byte(`"frame":[`), []byte(`]}`)); err != nil {
			t.Fatal(err)
		}
		p.wantFrame("[]")
		half := bytes.Repeat([]byte("x"), maxFrame/2)
		if err := p.SendFragments(soon(t), []byte(`"`), half, half); err != nil {
			t.Fatal(err)
		}
		p.wantClosed(1009, "")
		b.wantNotice(connID, 1009)
	})
}

func TestRoute_MessageSize(t *testing.T) {
	t.Parallel()
	sized := func(n int) string { return `"` + strings.Repeat("x", n-2) + `"` }
	eachPlacement(t, func(t *testing.T, phones, binaries *node) {
		p, b, connID := meet(phones, binaries)
		p.send(sized(maxFrame))
		b.wantFrame(sized(maxFrame))

		around := len(fmt.Sprintf(`{"conn_id":%q,"frame":}`, connID))
		b.send(connID, sized(maxFrame-around))
		p.wantFrame(sized(maxFrame - around))

		p.send(sized(maxFrame + 1))
		p.wantClosed(1009, "")
		b.wantNotice(connID, 1009)

		p, connID = join(phones, b, b.serverID(connID))
		b.send(connID, sized(maxFrame-around+1))
		b.wantClosed(1009, "")
		// Its phone hears nothing, and is told when it speaks.
		wantQuiet(t, p.Peer)
	})
}

// serverID is that of a conn_id.
func (b *testBinary) serverID(connID string) string {
	return strings.TrimPrefix(connID[:strings.LastIndexByte(connID, '-')], "client-")
}

func TestRoute_InvalidJSON_1007(t *testing.T) {
	t.Parallel()
	eachPlacement(t, func(t *testing.T, phones, binaries *node) {
		id := newServerID()
		b := binaries.binary(id)
		for _, frame := range []string{
			`1},"close_code":4999,"x":{"a":1`, `1,"close_code":4999`, `1},"conn_id":"x"`, `{}{}`, `1 2`, ``, ` `, `{`, `nul`, `{"a":1,}`,
			"\"\xff\"", "\"a\nb\"", "\ufeff1", "1\x00", `'a'`, `NaN`, `01`, strings.Repeat("[", 10_001) + strings.Repeat("]", 10_001),
		} {
			p, connID := join(phones, b, id)
			p.send(frame)
			p.wantClosed(1007, "frame is not valid JSON")
			b.wantNotice(connID, 1007) // and nothing before it
			await(t, "it is gone", func() bool { return len(connIDs(phones.reg, id)) == 0 })
			silent := phones.phone(id)
			connID = connIDs(phones.reg, id)[0]
			silent.send(frame)
			silent.wantClosed(1007, "frame is not valid JSON")
			b.wantNotice(connID, 1007) // also of one that it has never heard of
		}
		wantQuiet(t, b.Peer)
		await(t, "none is attached", func() bool { return len(connIDs(phones.reg, id)) == 0 })
	})
}

func TestRoute_NothingAfterAnInvalidFrame(t *testing.T) {
	t.Parallel()
	eachPlacement(t, func(t *testing.T, phones, binaries *node) {
		p, b, connID := meet(phones, binaries)
		p.send(`"before"`)
		p.send(`{`)
		_ = p.Send(soon(t), []byte(`"after"`)) // the connection may have gone
		b.wantFrame(`"before"`)
		b.wantNotice(connID, 1007)
		wantQuiet(t, b.Peer)
	})
}

func TestRoute_TokenOnTheFirstEnvelopeOnly(t *testing.T) {
	t.Parallel()
	eachPlacement(t, func(t *testing.T, phones, binaries *node) {
		id := newServerID()
		b := binaries.binary(id)
		for i, token := range []string{markToken, markToken + `"\<>` + "\t\u00e9\u2028", "not \xff text " + markToken} {
			p := phones.phone(id, func(o *testenv.PhoneOptions) { o.Token = token })
			for n := range 3 {
				p.send(fmt.Sprint(n))
				e := b.next()
				if e.HasToken != (n == 0) {
					t.Errorf("token %d, envelope %d: %q", i, n, e.Raw)
				}
				if want := strings.ToValidUTF8(token, "\ufffd"); n == 0 && e.Token != want {
					t.Errorf("token %q, want %q", e.Token, want)
				}
				if n == 0 && i == 0 {
					if want := fmt.Sprintf(`{"conn_id":%q,"token":%q,"frame":0}`, e.ConnID, markToken); string(e.Raw) != want {
						t.Errorf("got %s, want %s", e.Raw, want)
					}
				}
			}
		}
	})
	eachPlacement(t, func(t *testing.T, phones, binaries *node) {
		id := newServerID()
		b := binaries.binary(id)
		phones.phone(id).send("1")
		if e := b.next(); e.HasToken {
			t.Errorf("forward-token is off, got %s", e.Raw)
		}
	}, func(s *settings) { s.gateway.NoToken = true })
}

func TestRoute_MalformedEnvelopes_DroppedCountedLoggedOnce(t *testing.T) {
	t.Parallel()
	eachPlacement(t, func(t *testing.T, phones, binaries *node) {
		p, b, connID := meet(phones, binaries)
		id := fmt.Sprintf("%q", connID)
		for kind, messages := range map[string][]string{
			"syntax":       {``, `{`, `{"conn_id":` + id + `,"frame":{"a":}}`, `{"conn_id":` + id + `,"frame":1,}`, `x`},
			"not_object":   {`[]`, `null`, `1`, `"x"`},
			"trailing":     {`{"conn_id":` + id + `,"frame":1} x`, `{"conn_id":` + id + `,"frame":1}{}`},
			"conn_id":      {`{"frame":1}`, `{"conn_id":"","frame":1}`, `{"conn_id":7,"frame":1}`, `{"conn_id":null,"frame":1}`, `{}`},
			"close_code":   {`{"conn_id":` + id + `,"close_code":65536}`, `{"conn_id":` + id + `,"close_code":-1}`, `{"conn_id":` + id + `,"frame":1,"close_code":"4000"}`, `{"conn_id":` + id + `,"close_code":1.5}`},
			"empty":        {`{"conn_id":` + id + `}`, `{"conn_id":` + id + `,"frame":null}`, `{"conn_id":` + id + `,"close_code":0}`, `{"conn_id":` + id + `,"close_code":null,"frame":null}`},
			"unknown_conn": {`{"conn_id":"x","frame":1}`, `{"conn_id":"x","close_code":4000}`, `{"conn_id":"` + connID + `x","frame":1}`},
			"push_wake":    {`{"push_wake":{"platform":"fcm","token":"` + markToken + `"}}`},
		} {
			for _, m := range messages {
				b.sendRaw(m)
			}
			name := fmt.Sprintf(`pyrycode_relay_envelopes_dropped_total{kind=%q}`, kind)
			await(t, name, func() bool { return binaries.metric(name) == fmt.Sprint(len(messages)) })
			binaries.wantEvent("envelope_dropped", map[string]string{"kind": kind})
			logged := 0
			for _, e := range binaries.log.all("envelope_dropped") {
				if e.attrs["kind"] == kind {
					logged++
				}
			}
			if logged != 1 {
				t.Errorf("%s was logged %d times, want once", kind, logged)
			}
		}
		b.sendRaw(`{"conn_id":` + id + `,"close_code":0,"frame":"still there"}`)
		p.wantFrame(`"still there"`)
		wantQuiet(t, b.Peer)
	})
}

func TestRoute_BinaryCannotAddressAnothersPhone(t *testing.T) {
	t.Parallel()
	eachPlacement(t, func(t *testing.T, phones, binaries *node) {
		p, b, connID := meet(phones, binaries)
		_, other, _ := meet(phones, binaries)
		other.send(connID, `"stolen"`)
		other.sendClose(connID, 4401, "")
		wantQuiet(t, other.Peer)
		b.send(connID, `"mine"`)
		p.wantFrame(`"mine"`)
		wantQuiet(t, p.Peer)
	})
}

func TestRoute_OrderBothWays(t *testing.T) {
	t.Parallel()
	const frames = 3000
	eachPlacement(t, func(t *testing.T, phones, binaries *node) {
		p, b, connID := meet(phones, binaries)
		ctx := soon(t)
		var wg sync.WaitGroup
		defer wg.Wait()
		pad := strings.Repeat("x", 300)
		wg.Go(func() {
			for i := range frames {
				if err := p.Send(ctx, fmt.Appendf(nil, `[%d,%q]`, i, pad)); err != nil {
					t.Error(err)
					return
				}
			}
		})
		wg.Go(func() {
			for i := range frames {
				if err := b.Send(ctx, connID, fmt.Appendf(nil, `[%d,%q]`, i, pad)); err != nil {
					t.Error(err)
					return
				}
			}
		})
		for i := range frames {
			want := fmt.Sprintf(`[%d,%q]`, i, pad)
			b.wantFrame(want)
			p.wantFrame(want)
		}
		await(t, "frames to the binary are counted", func() bool {
			return binaries.metric(`pyrycode_relay_frames_forwarded_total{direction="phone_to_binary"}`) == fmt.Sprint(frames+1)
		})
		await(t, "frames to the phone are counted", func() bool {
			return phones.metric(`pyrycode_relay_frames_forwarded_total{direction="binary_to_phone"}`) == fmt.Sprint(frames)
		})
	})
}

// A phone that reads too slowly is closed, and its sibling does not notice.
func TestRoute_SlowPhone_BacklogFull(t *testing.T) {
	t.Parallel()
	eachPlacement(t, func(t *testing.T, phones, binaries *node) {
		slow, b, slowID := meet(phones, binaries)
		sibling, siblingID := join(phones, b, b.serverID(slowID))
		slow.Pause()
		frame := `"` + strings.Repeat("x", 60_000) + `"`
		closed := make(chan struct{})
		go func() {
			defer close(closed)
			for {
				e, err := b.NextEnvelope(soon(t))
				if err != nil || e.HasClose {
					if e.ConnID != slowID || e.CloseCode != 1011 {
						t.Errorf("binary got %.100q, %v, want a notice of 1011", e.Raw, err)
					}
					return
				}
			}
		}()
		for i, over := 0, false; !over; i++ {
			b.send(slowID, frame)
			b.send(siblingID, fmt.Sprint(i))
			sibling.wantFrame(fmt.Sprint(i))
			select {
			case <-closed:
				over = true
			default:
			}
			if i > 1000 {
				t.Fatal("60 MB wait for a phone that does not read")
			}
		}
		slow.Unpause()
		for {
			_, err := slow.Next(soon(t))
			if info := (testenv.CloseInfo{}); errors.As(err, &info) {
				if info.Code != 1011 || info.Reason != "phone backlog full" {
					t.Errorf("slow phone: %v", info)
				}
				break
			} else if err != nil {
				t.Fatal(err)
			}
		}
		b.send(siblingID, `"on"`)
		sibling.wantFrame(`"on"`)
	}, func(s *settings) { s.bus.Backlog = 1 << 20 })
}

// A binary that stops reading stops its phones, and nothing is lost.
func TestRoute_SlowBinary_Backpressure(t *testing.T) {
	t.Parallel()
	eachPlacement(t, func(t *testing.T, phones, binaries *node) {
		p, b, _ := meet(phones, binaries)
		b.Pause()
		pad := strings.Repeat("x", 200_000)
		sent, stop := 0, make(chan struct{})
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		progress := make(chan int, 1000)
		done := make(chan struct{})
		go func() {
			defer close(done)
			for ; sent < 400; sent++ {
				select {
				case <-stop:
					return
				default:
				}
				if err := p.Send(ctx, fmt.Appendf(nil, `[%d,%q]`, sent, pad)); err != nil {
					t.Error(err)
					return
				}
				progress <- sent
			}
		}()
		for blocked := false; !blocked; {
			select {
			case <-progress:
			case <-time.After(500 * time.Millisecond):
				blocked = true
			case <-done:
				t.Fatal("80 MB went to a binary that does not read")
			}
		}
		b.Unpause()
		close(stop)
		<-done
		for i := range sent {
			b.wantFrame(fmt.Sprintf(`[%d,%q]`, i, pad))
		}
		p.send(`"last"`)
		b.wantFrame(`"last"`)
	})
}

// Phones that come, send and leave fill a binary that reads slowly: the phone whose
// frame finds no room is closed, the binary is not, and it gets what it was owed.
func TestRoute_PhonesComeAndGo_BinaryThatReadsSlowlyStays(t *testing.T) {
	t.Parallel()
	eachPlacement(t, func(t *testing.T, phones, binaries *node) {
		id := newServerID()
		b := binaries.binary(id)
		b.Pause()
		frame := `"` + strings.Repeat("x", 60_000) + `"`
		turnedAway := func() bool {
			return slices.ContainsFunc(phones.log.all("phone_unregistered"), func(e event) bool { return e.attrs["code"] == "1011" })
		}
		for dials := 0; !turnedAway(); dials++ {
			if dials == 500 {
				t.Fatal("30 MB went to a binary that does not read")
			}
			p := phones.phone(id)
			_ = p.Send(soon(t), []byte(frame)) // fails if the relay closes meanwhile
			_ = p.Close(4000, "")              // as this does
			await(t, "no phone is attached", func() bool { return len(connIDs(phones.reg, id)) == 0 })
		}
		b.Unpause()
		// Not those that came before the binary's node knew that the last one had gone.
		attached := len(phones.log.all("phone_registered"))
		sent := make(map[string]bool) // by phones that have not gone
		for noticed := 0; noticed < attached; {
			e := b.next()
			switch {
			case !e.HasClose && string(e.Frame) == frame && !sent[e.ConnID]:
				sent[e.ConnID] = true
			case e.HasClose && (e.CloseCode == 4000 || !sent[e.ConnID]):
				delete(sent, e.ConnID)
				noticed++
			default:
				t.Fatalf("got %.100q, want a phone's frame and then its notice", e.Raw)
			}
		}
		if len(sent) > 0 {
			t.Errorf("%d phones have gone without a notice", len(sent))
		}
		await(t, "no phone is attached", func() bool { return len(connIDs(phones.reg, id)) == 0 })
		p := phones.phone(id)
		p.send(`"hello"`)
		b.wantFrame(`"hello"`)
	}, func(s *settings) {
		s.registry.MaxPhones, s.bus.Window, s.gateway.MaxFrameBytes, s.gateway.WriteTimeout = 1, 1<<10, 64<<10, time.Minute
	})
}

// A binary that takes nothing for the write timeout is closed, and its phones'
// sessions are in doubt.
func TestRoute_BinaryTakesNothing_WriteTimeout(t *testing.T) {
	t.Parallel()
	eachPlacement(t, func(t *testing.T, phones, binaries *node) {
		p, b, _ := meet(phones, binaries)
		b.Pause()
		frame := []byte(`"` + strings.Repeat("x", 200_000) + `"`)
		for ctx := soon(t); p.Send(ctx, frame) == nil; {
		}
		info, err := p.Closed(soon(t))
		if err != nil || info.Code != 4404 || info.Reason != "binary is away" {
			t.Errorf("phone: %v, %v, want 4404 binary is away", info, err)
		}
		await(t, "the binary is gone", func() bool { return binaries.gw.held.Load() == 0 })
	}, func(s *settings) { s.gateway.WriteTimeout = 500 * time.Millisecond })
}

// A phone that takes nothing for the write timeout is gone, below the backlog too.
func TestRoute_PhoneTakesNothing_WriteTimeout(t *testing.T) {
	t.Parallel()
	eachPlacement(t, func(t *testing.T, phones, binaries *node) {
		p, b, connID := meet(phones, binaries)
		sibling, siblingID := join(phones, b, b.serverID(connID))
		p.Pause()
		frame := `"` + strings.Repeat("x", 100_000) + `"`
		for range 100 { // fills the sockets' buffers; the rest waits
			b.send(connID, frame)
		}
		b.wantNotice(connID, 1001)
		b.send(siblingID, "1")
		sibling.wantFrame("1")
	}, func(s *settings) { s.gateway.WriteTimeout, s.bus.Backlog = 500*time.Millisecond, 64<<20 })
}

// A peer that pings while it does not read has as long as any other to read on.
func TestRoute_SlowPhone_Pings(t *testing.T) {
	t.Parallel()
	eachPlacement(t, func(t *testing.T, phones, binaries *node) {
		p, b, connID := meet(phones, binaries)
		p.Pause()
		const frames = 100
		pad := strings.Repeat("x", 100_000)
		for i := range frames {
			b.send(connID, fmt.Sprintf("[%d,%q]", i, pad))
		}
		pinged := make(chan struct{})
		go func() {
			defer close(pinged)
			_ = p.Ping(soon(t)) // its pong may be left out
		}()
		pass(6500 * time.Millisecond)
		p.Unpause()
		for i := range frames {
			p.wantFrame(fmt.Sprintf("[%d,%q]", i, pad))
		}
		p.send("1")
		b.wantFrame("1")
		p.Drop()
		<-pinged
	}, func(s *settings) { s.gateway.WriteTimeout, s.bus.Backlog = time.Minute, 64<<20 })
}

// The HTTP server's own time-outs end with the upgrade.
func TestRoute_HTTPServerTimeouts(t *testing.T) {
	t.Parallel()
	n := newCluster(t, 1)[0]
	srv := httptest.NewUnstartedServer(n.gw.Handler())
	const short = 2 * time.Second
	srv.Config.ReadTimeout, srv.Config.WriteTimeout, srv.Config.IdleTimeout = short, short, short
	srv.Start()
	defer srv.Close()
	n.url = "ws" + strings.TrimPrefix(srv.URL, "http")
	p, b, connID := meet(n, n)
	pass(short + time.Second)
	p.send("1")
	b.wantFrame("1")
	b.send(connID, "2")
	p.wantFrame("2")
}

// maskedFrame is a client's WebSocket frame.
func maskedFrame(first byte, payload []byte) []byte {
	f := []byte{first, 0x80}
	switch n := len(payload); {
	case n < 126:
		f[1] |= byte(n)
	default:
		f[1] |= 126
		f = append(f, byte(n>>8), byte(n))
	}
	f = append(f, 0, 0, 0, 0) // a mask that changes nothing
	return append(f, payload...)
}

func TestRoute_MessageTimeout(t *testing.T) {
	t.Parallel()
	short := func(s *settings) {
		s.gateway.MessageTimeout, s.gateway.PingInterval = 300*time.Millisecond, time.Hour // no ping breaks the silence
	}
	for name, begun := range map[string][]byte{
		"HalfAPayload":        maskedFrame(0x81, []byte(`"hello"`))[:8],
		"OneByteOfAHeader":    {0x81},
		"OneFragment":         maskedFrame(0x01, []byte(`"hello`)),
		"FragmentThenPing":    append(maskedFrame(0x01, []byte(`"hello`)), maskedFrame(0x89, nil)...),
		"MessageThenOneByte":  append(maskedFrame(0x81, []byte(`1`)), 0x81),
		"PingThenOneByte":     append(maskedFrame(0x89, nil), 0x81),
		"HalfAControlPayload": maskedFrame(0x89, []byte("ping"))[:7],
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			eachPlacement(t, func(t *testing.T, phones, binaries *node) {
				id := newServerID()
				b := binaries.binary(id)
				_ = b
				c := phones.rawDial(id)
				// No limit on silence before it begins.
				c.SetReadDeadline(time.Now().Add(600 * time.Millisecond))
				if n, err := c.Read(make([]byte, 1)); !isTimeout(err) {
					t.Fatalf("silence: %d, %v", n, err)
				}
				start := time.Now()
				if _, err := c.Write(begun); err != nil {
					t.Fatal(err)
				}
				c.SetReadDeadline(time.Now().Add(patience))
				if _, err := io.Copy(io.Discard, c); isTimeout(err) {
					t.Fatal("not closed")
				}
				if took := time.Since(start); took < 250*time.Millisecond {
					t.Errorf("closed after %v", took)
				}
				await(t, "unregistered", func() bool { return len(connIDs(phones.reg, id)) == 0 })
			}, short)
		})
	}
}

func isTimeout(err error) bool {
	var e net.Error
	return errors.As(err, &e) && e.Timeout()
}

func TestRoute_SilenceHasNoLimit(t *testing.T) {
	t.Parallel()
	eachPlacement(t, func(t *testing.T, phones, binaries *node) {
		p, b, connID := meet(phones, binaries)
		for range 3 {
			pass(400 * time.Millisecond) // longer than the message timeout
			p.send("1")
			b.wantFrame("1")
			b.send(connID, "2")
			p.wantFrame("2")
			if err := errors.Join(p.Ping(soon(t)), b.Ping(soon(t))); err != nil {
				t.Fatal(err)
			}
		}
	}, func(s *settings) { s.gateway.MessageTimeout = 200 * time.Millisecond })
}

// What a client sends together with its handshake is not lost.
func TestRoute_EarlyFrames(t *testing.T) {
	t.Parallel()
	n := newCluster(t, 1)[0]
	id := newServerID()
	b := n.binary(id)
	c, err := net.Dial("tcp", strings.TrimPrefix(n.http, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	message := fmt.Appendf(nil, "GET /v1/client HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"+
		"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nUser-Agent: raw/1\r\nX-Pyrycode-Server: %s\r\nX-Pyrycode-Token: x\r\n\r\n", id)
	long := `"` + strings.Repeat("y", 3000) + `"`
	for i := range 5 {
		message = append(message, maskedFrame(0x81, fmt.Appendf(nil, "%d", i))...)
	}
	message = append(message, maskedFrame(0x81, []byte(long))...)
	if _, err := c.Write(message); err != nil {
		t.Fatal(err)
	}
	for i := range 5 {
		b.wantFrame(fmt.Sprint(i))
	}
	b.wantFrame(long)
}
