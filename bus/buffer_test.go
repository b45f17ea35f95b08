package bus

import (
	"bytes"
	"runtime/debug"
	"slices"
	"testing"
)

func TestBuffer_RoomForTheFrame(t *testing.T) {
	for _, n := range []int{0, 1, 128 - Headroom, 129 - Headroom, 300, 8 << 10, 128<<10 - Headroom, 128 << 10, 256 << 10} {
		b := NewBuffer(n)
		if len(b) != Headroom || cap(b) < Headroom+n {
			t.Errorf("NewBuffer(%d): length %d and capacity %d, want %d and %d", n, len(b), cap(b), Headroom, Headroom+n)
		}
		if got := cap(b); got > 128 && got > 2*(Headroom+n) {
			t.Errorf("NewBuffer(%d) has %d bytes, twice what it needs", n, got)
		}
		before := &b[0]
		b[0] = 0 // as a header does
		b = append(b, make([]byte, n)...)
		if &b[0] != before {
			t.Errorf("NewBuffer(%d) had no room for its frame", n)
		}
		Free(b)
	}
}

// What was read into a large buffer does not keep it.
func TestFit(t *testing.T) {
	for _, n := range []int{0, 1, 76, 77, 78, 300, 4000, 70_000} {
		for _, room := range []int{n, n + 1, 2 * n, 10*n + 1000} {
			buf := append(NewBuffer(room), bytes.Repeat([]byte("x"), n)...)
			buf[0] = 0
			got := Fit(buf)
			if !bytes.Equal(Frame(got), bytes.Repeat([]byte("x"), n)) {
				t.Errorf("a frame of %d bytes in a buffer for %d has changed", n, room)
			}
			if want := cap(NewBuffer(n)); cap(got) > want {
				t.Errorf("a frame of %d bytes in a buffer for %d keeps %d bytes, want %d", n, room, cap(got), want)
			}
		}
	}
}

// Free takes what is no buffer too: a message of NATS, or nothing.
func TestFree_WhatIsNoBuffer(t *testing.T) {
	foreign := bytes.Repeat([]byte{1}, 300)
	Free(foreign)
	Free(nil)
	Free(make([]byte, 0, 64))
	Free(make([]byte, 1<<20))
	if !bytes.Equal(foreign, bytes.Repeat([]byte{1}, 300)) {
		t.Error("a slice that is no buffer was written to")
	}
}

func raceEnabled() bool {
	info, ok := debug.ReadBuildInfo()
	return ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}

// allocationLimit is what a test of a path without allocations allows for each run: with
// the race detector a sync.Pool drops one item in four.
func allocationLimit() float64 {
	if raceEnabled() {
		return 1
	}
	return 0
}

func TestBuffer_DoesNotAllocate(t *testing.T) {
	frame := make([]byte, 300)
	n := testing.AllocsPerRun(1000, func() { Free(append(NewBuffer(len(frame)), frame...)) })
	if n > allocationLimit() {
		t.Errorf("%v allocations, want none", n)
	}
}

// A frame between two peers of one node.
func TestLink_LocalFrame_DoesNotAllocate(t *testing.T) {
	r, eater := newLocalRig(t), new(eater)
	r.held.lets(eater, false)
	p := r.phones.NewLink("s", "c", eater)
	if err := r.phones.Open(t.Context(), p, r.binaries.Node(), r.session); err != nil {
		t.Fatal(err)
	}
	frame := make([]byte, 300)
	n := testing.AllocsPerRun(5000, func() {
		if err := p.Send(append(NewBuffer(len(frame)), frame...)); err != nil {
			t.Fatal(err)
		}
	})
	if n > allocationLimit() {
		t.Errorf("%v allocations a frame, want none", n)
	}
	if eater.frames < 5000 {
		t.Errorf("%d frames arrived", eater.frames)
	}
}

// eater reads everything at once.
type eater struct{ frames int }

func (e *eater) Deliver(l *Link, buf []byte) {
	e.frames++
	l.Consumed(1, len(Frame(buf)))
	Free(buf)
}

func (e *eater) End(*Link, error) {}
