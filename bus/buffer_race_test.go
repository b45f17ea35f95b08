//go:build race

package bus

import (
	"bytes"
	"testing"
)

// An empty message of a peer writes nothing to its buffer.
func TestBuffer_FreedAsItWas(*testing.T) {
	for range 100 { // some are used again
		Free(NewBuffer(0))
	}
}

func TestBuffer_MisuseIsFound(t *testing.T) {
	panics := func(what string, f func()) {
		defer func() {
			if recover() == nil {
				t.Errorf("%s: no panic", what)
			}
		}()
		f()
	}
	b := append(NewBuffer(300), make([]byte, 300)...)
	Free(b)
	if b[Headroom] != freed {
		t.Errorf("a freed buffer still holds its frame")
	}
	panics("freed twice", func() { markFree(b) })
	panics("written to when freed", func() {
		c := bytes.Repeat([]byte{freed}, 64)
		c[5] = 'x'
		markUsed(c)
	})
}
