package gateway

import "testing"

func TestOutbox_BinaryThatTakesTooLittle_IsClosed(t *testing.T) {
	t.Parallel()
	const size, fit = 1 << 10, 100
	b := &binary{}
	b.init(&Gateway{}, kindBinary, "b", func(int) {})
	b.out.limit = fit * (size + messageOverhead)
	for i := range fit {
		if !b.out.put(message{p: make([]byte, size)}) {
			t.Fatalf("message %d of %d refused", i, fit)
		}
	}
	if b.out.put(message{p: make([]byte, 1)}) {
		t.Error("a message over the limit was queued")
	}
	if code, closing := b.out.closed(); !closing || code != codeTooSlow {
		t.Errorf("closing %v with %+v, want %+v", closing, code, codeTooSlow)
	}
	if left := b.abandon(); len(left) != 0 {
		t.Errorf("%d messages left, want none", len(left))
	}
}
