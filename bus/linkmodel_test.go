package bus

import (
	"bytes"
	"encoding/binary"
	"errors"
	"flag"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"
)

const (
	modelWindow  = 2000
	modelBacklog = 20_000
	modelFrame   = 700 // bytes of the largest frame
)

// TestLinkStateModel runs two ends over a simulated bus that loses, duplicates,
// delays, reorders what was under way when it restarts, and partitions. After each
// step the invariants hold; in the end, when the bus has healed, both ends agree.
// `make model` runs more schedules.
func TestLinkStateModel(t *testing.T) {
	t.Parallel() // it is the only one of this room that reads rapid's flags
	setDefault(t, "rapid.checks", "10000")
	setDefault(t, "rapid.steps", "60")
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld(t)
		t.Repeat(map[string]func(*rapid.T){
			"":         func(t *rapid.T) { w.check() },
			"send":     w.send,
			"send2":    w.send, // twice as often
			"consume":  w.consume,
			"consume2": w.consume,
			"pass":     func(t *rapid.T) { w.advance(t, w.delay+ackDelay) },
			"deliver":  func(t *rapid.T) { w.advance(t, time.Duration(rapid.IntRange(0, 50).Draw(t, "ms"))*time.Millisecond) },
			"wait": func(t *rapid.T) {
				w.advance(t, time.Duration(rapid.IntRange(1, 30).Draw(t, "100ms"))*100*time.Millisecond)
			},
			"lose":      w.lose,
			"duplicate": w.duplicate,
			"restart":   w.restart,
			"partition": w.partition,
			"heal":      func(*rapid.T) { w.heal() },
			"disturb":   func(*rapid.T) { w.disturb() },
			"close":     w.close,
			"outage":    w.outage,
			"fail":      w.fail,
		})
		w.settle(t)
	})
}

// setDefault sets a flag of rapid that was not set by hand, for this test.
func setDefault(t *testing.T, name, value string) {
	f := flag.Lookup(name)
	if before := f.Value.String(); before == f.DefValue {
		set := func(v string) {
			if err := f.Value.Set(v); err != nil {
				t.Fatal(err)
			}
		}
		set(value)
		t.Cleanup(func() { set(before) })
	}
}

// modelEnd is a linkState in use, and what has gone in and come out.
type modelEnd struct {
	st    linkState
	other *modelEnd
	wire  []flight // towards this end
	cut   bool     // nothing reaches this end

	given     [][]byte // frames given to send
	kept      int      // how many of them the CLOSE follows; -1: no CLOSE
	took      int      // frames that were delivered
	pending   []int    // costs of frames that the socket has not taken
	closed    bool     // by this side
	ended     error    // told to the receiver
	forgotten bool     // not in the table any more
}

// flight is a message under way.
type flight struct {
	m  Message
	at time.Time
}

func (e *modelEnd) over() bool { return e.closed || e.ended != nil }

type world struct {
	*rapid.T
	now           time.Time
	phone, binary *modelEnd
	delay         time.Duration
}

func newWorld(t *rapid.T) *world {
	cfg := Config{Window: modelWindow}.withDefaults()
	cfg2 := Config{Window: rapid.SampledFrom([]int{modelWindow, modelWindow / 8, modelWindow * 8}).Draw(t, "binary's window")}.withDefaults()
	w := &world{T: t, now: epoch, delay: time.Millisecond}
	w.phone = &modelEnd{st: newLinkState(cfg), kept: -1}
	w.binary = &modelEnd{st: newLinkState(cfg2), kept: -1, other: w.phone}
	w.phone.other = w.binary
	w.phone.st.open(w.binary.st.granted)
	w.binary.st.open(w.phone.st.granted)
	w.binary.st.await(w.now)
	w.phone.st.confirm(rapid.Bool().Draw(t, "missed"))
	w.run(w.phone)
	return w
}

func (w *world) either(t *rapid.T) *modelEnd {
	if rapid.Bool().Draw(t, "phone") {
		return w.phone
	}
	return w.binary
}

// send gives an end frames until it says no, as Link.Send and Link.Offer do.
func (w *world) send(t *rapid.T) {
	e := w.either(t)
	for range rapid.IntRange(1, 40).Draw(t, "frames") {
		frame := make([]byte, rapid.IntRange(4, modelFrame).Draw(t, "size"))
		binary.BigEndian.PutUint32(frame, uint32(len(e.given))) //nolint:gosec // small
		for i := range frame[4:] {
			frame[4+i] = byte(len(e.given) + i) //nolint:gosec // wraps
		}
		switch {
		case e.over():
			return
		case e == w.phone && e.st.full():
			return // Send blocks
		case e == w.binary && e.st.outstanding()+frameCost(len(frame)) > modelBacklog:
			w.end(e, ErrBacklog, true)
			return
		}
		e.st.send(append(make([]byte, Headroom), frame...), w.now)
		e.given = append(e.given, frame)
		w.run(e)
	}
}

func (w *world) end(e *modelEnd, err error, urgent bool) {
	if e.over() {
		return
	}
	e.closed = true
	e.st.close(err, urgent)
	e.kept = int(e.st.lastSeq) - 1 //nolint:gosec // small
	w.run(e)
}

func (w *world) close(t *rapid.T) {
	if rarely(t) {
		w.end(w.either(t), CodeError(4401), rapid.Bool().Draw(t, "urgent"))
	}
}

func (w *world) fail(t *rapid.T) {
	if rarely(t) {
		w.failEnd(w.either(t), ErrNodeGone)
	}
}

// rarely is true one time in sixteen: a link that is closed has little left to show.
func rarely(t *rapid.T) bool { return rapid.Uint64().Draw(t, "rarely")%16 == 11 }

// failEnd is Link.Fail.
func (w *world) failEnd(e *modelEnd, err error) {
	e.st.lose(err, w.now)
	if !e.over() {
		e.ended = err
	}
	w.run(e)
}

func (w *world) consume(t *rapid.T) {
	e := w.either(t)
	w.consumeSome(e, rapid.IntRange(0, len(e.pending)).Draw(t, "frames"))
}

func (w *world) consumeSome(e *modelEnd, n int) {
	for _, size := range e.pending[:n] {
		e.st.consume(frameCost(size), w.now)
	}
	e.pending = e.pending[n:]
	w.run(e)
}

func (w *world) lose(t *rapid.T) {
	e := w.either(t)
	if n := len(e.wire); n > 0 {
		from := rapid.IntRange(0, n-1).Draw(t, "from")
		e.wire = slices.Delete(e.wire, from, min(n, from+rapid.IntRange(1, 10).Draw(t, "count")))
	}
}

func (w *world) duplicate(t *rapid.T) {
	e := w.either(t)
	if n := len(e.wire); n > 0 {
		f := e.wire[rapid.IntRange(0, n-1).Draw(t, "which")]
		w.put(e, flight{f.m, f.at.Add(time.Duration(rapid.IntRange(0, 3000).Draw(t, "later")) * time.Millisecond)})
	}
}

// restart gives what is under way new times, in any order, and may change the
// delay of what follows.
func (w *world) restart(t *rapid.T) {
	w.delay = time.Duration(rapid.IntRange(0, 400).Draw(t, "delay")) * time.Millisecond
	for _, e := range []*modelEnd{w.phone, w.binary} {
		wire := e.wire
		e.wire = nil
		for _, f := range wire {
			w.put(e, flight{f.m, w.now.Add(time.Duration(rapid.IntRange(0, 1000).Draw(t, "at")) * time.Millisecond)})
		}
	}
	w.disturb()
}

func (w *world) disturb() {
	for _, e := range []*modelEnd{w.phone, w.binary} {
		e.st.probeNow(w.now)
		w.run(e)
	}
}

func (w *world) partition(t *rapid.T) { w.either(t).cut = true }

// outage is longer than an end that has failed goes on telling.
func (w *world) outage(t *rapid.T) {
	if rarely(t) {
		w.phone.cut, w.binary.cut = true, true
		w.advance(t, (resetTries+15)*probeInterval)
	}
}

func (w *world) heal() {
	w.phone.cut, w.binary.cut = false, false
}

func (w *world) put(e *modelEnd, f flight) {
	i := len(e.wire)
	for i > 0 && e.wire[i-1].at.After(f.at) {
		i--
	}
	e.wire = slices.Insert(e.wire, i, f)
}

// run is Link.run: what the end has to say goes onto the wire.
func (w *world) run(e *modelEnd) {
	if e.forgotten {
		return
	}
	for n := 0; ; n++ {
		m, _, ok := e.st.next(w.now)
		if !ok {
			break
		}
		if n > 10_000 {
			w.Fatal("it does not stop talking")
		}
		if m.Kind == KindData {
			e.st.join(&m, make([]byte, 2*modelFrame), w.now)
		}
		w.publish(e.other, m)
	}
	e.forgotten = e.st.done()
}

func (w *world) publish(to *modelEnd, m Message) {
	if to.cut {
		return
	}
	at := w.now.Add(w.delay)
	if n := len(to.wire); n > 0 && to.wire[n-1].at.After(at) {
		at = to.wire[n-1].at
	}
	to.wire = append(to.wire, flight{m, at})
}

// advance lets time pass, in ticks, and messages arrive.
func (w *world) advance(t *rapid.T, d time.Duration) {
	for until := w.now.Add(d); ; {
		for _, e := range []*modelEnd{w.phone, w.binary} {
			for len(e.wire) > 0 && !e.wire[0].at.After(w.now) {
				f := e.wire[0]
				e.wire = e.wire[1:]
				if !e.cut {
					w.arrive(t, e, f.m)
				}
			}
			if err := e.st.tick(w.now); err != nil && !e.forgotten {
				w.failEnd(e, err)
			}
			w.run(e)
		}
		if !w.now.Before(until) {
			return
		}
		w.now = w.now.Add(min(tickInterval, until.Sub(w.now)))
	}
}

// arrive is Bus.handleLink, Link.handleFrames and Link.handle.
func (w *world) arrive(t *rapid.T, e *modelEnd, m Message) {
	if m.Kind == KindFrames {
		for i, frame := range framesOf(m) {
			one := m
			one.Kind, one.Seq, one.Payload = KindData, m.Seq+uint64(i), frame //nolint:gosec // an index
			w.arrive(t, e, one)
		}
		return
	}
	if m.Kind == KindReset {
		w.publish(e.other, Message{Kind: KindAck, Reason: flagReset})
	}
	if e.forgotten {
		if m.Kind == KindProbe || m.Kind == KindClose {
			w.publish(e.other, Message{Kind: KindReset, Reason: reasonLinkLost})
		}
		return
	}
	frame, end := e.st.receive(m, w.now)
	switch {
	case errors.Is(end, errViolation):
		t.Fatalf("an honest peer broke the protocol with %s", describe(m))
	case frame != nil && e.closed:
		e.st.consume(frameCost(len(frame)), w.now)
	case frame != nil:
		w.take(t, e, frame)
	case end != nil && !e.over():
		e.ended = end
		if m.Kind == KindClose && (e.took != e.other.kept || !e.other.closed) {
			t.Fatalf("ended after %d frames, the close was behind %d", e.took, e.other.kept)
		}
	}
	w.run(e)
}

func (w *world) take(t *rapid.T, e *modelEnd, frame []byte) {
	if e.ended != nil {
		t.Fatalf("a frame after %v", e.ended)
	}
	if e.took >= len(e.other.given) || !bytes.Equal(frame, e.other.given[e.took]) {
		t.Fatalf("frame %d is not what was sent", e.took)
	}
	e.took++
	e.pending = append(e.pending, len(frame))
}

// check holds after every step.
func (w *world) check() {
	const frame = modelFrame + frameOverhead
	for _, e := range []*modelEnd{w.phone, w.binary} {
		queued := uint64(0)
		for i := range e.st.out.Len() {
			queued += e.st.out.At(i).cost
		}
		bound := uint64(modelWindow + frame)
		if e == w.binary {
			bound = modelBacklog
		}
		if queued > bound {
			w.Fatalf("%d bytes queued, want at most %d", queued, bound)
		}
		if n := e.st.taken - e.st.consumed; n > e.st.window+frame {
			w.Fatalf("%d bytes taken and not consumed, want at most %d", n, e.st.window+frame)
		}
		if !e.forgotten && e.st.idle() && !e.over() && e.st.acked != e.st.lastSeq && e.st.credit > e.st.offset {
			w.Fatalf("idle with %d of %d acknowledged", e.st.acked, e.st.lastSeq)
		}
	}
}

// rest lets both sockets take everything, and time pass.
func (w *world) rest(t *rapid.T) {
	for range 40 {
		w.advance(t, time.Second/2)
		w.consumeSome(w.phone, len(w.phone.pending))
		w.consumeSome(w.binary, len(w.binary.pending))
	}
	w.advance(t, time.Second)
	w.check()
}

// sound reports whether the end must survive if the bus works from now on.
func (w *world) sound(e *modelEnd) bool {
	return !e.over() && (e.st.waitingSince.IsZero() || w.now.Sub(e.st.waitingSince) < e.st.timeout/2)
}

// settle heals the bus, lets both sockets take everything and time pass: then
// either all has arrived and both ends are idle, or both have ended.
func (w *world) settle(t *rapid.T) {
	w.heal()
	p, b := w.phone, w.binary
	sound := w.sound(p) && w.sound(b)
	w.rest(t)
	if sound && (p.over() || b.over()) {
		t.Fatalf("a link that could be saved was lost: %v, %v", p.ended, b.ended)
	}
	if gaveUp := p.st.resetsLeft < 0 || b.st.resetsLeft < 0; gaveUp {
		w.disturb() // nobody has told the other end; it asks when its own connection comes back
		w.rest(t)
	}
	if p.over() != b.over() {
		t.Fatalf("one end is left: phone %v %v, binary %v %v", p.closed, p.ended, b.closed, b.ended)
	}
	for _, e := range []*modelEnd{p, b} {
		if len(e.wire) > 0 || !e.st.idle() && !e.forgotten {
			t.Fatalf("it does not come to rest: %d messages under way, %+v", len(e.wire), e.st)
		}
		if e.over() && !e.forgotten {
			t.Fatalf("an end that is over is still on the table: %+v", e.st)
		}
		if !e.over() && e.took != len(e.other.given) {
			t.Fatalf("%d of %d frames arrived", e.took, len(e.other.given))
		}
		if !e.over() && e.st.full() {
			t.Fatalf("Send would block: %d bytes are not known to be consumed", e.st.outstanding())
		}
	}
	w.now = w.now.Add(time.Hour)
	w.advance(t, 0)
	if len(p.wire)+len(b.wire) > 0 {
		t.Fatal("an idle link talks")
	}
}
