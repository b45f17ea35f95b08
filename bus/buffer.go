package bus

import (
	"math/bits"
	"sync"
	"unsafe"
)

// A buffer carries one frame: Headroom bytes for the link, then the frame. It has one
// owner at a time, who may free it: whoever made it, until Send or Offer takes it; then
// the link, until the frame is acknowledged; or, if the other end is on this node or it
// came with others in one message, the receiver, from Deliver on. A buffer that nobody
// frees is left to the garbage collector, so to free is never needed and to free twice
// is never right.

// Buffers that are used again have a power of two as capacity, from 1<<minBufferBits to
// 1<<maxBufferBits.
const (
	minBufferBits = 7
	maxBufferBits = 17
)

// freeBuffers holds freed buffers by size, each as a pointer to its first byte: a slice
// would be allocated anew to be put there.
var freeBuffers [maxBufferBits - minBufferBits + 1]sync.Pool

// NewBuffer returns a buffer for a frame of n bytes. It is Headroom bytes long, with
// room for the frame behind.
func NewBuffer(n int) []byte {
	size := Headroom + n
	class := max(bits.Len(uint(size-1)), minBufferBits) - minBufferBits //nolint:gosec // positive
	if class >= len(freeBuffers) {
		return make([]byte, Headroom, size)
	}
	size = 1 << (class + minBufferBits)
	if p, ok := freeBuffers[class].Get().(*byte); ok {
		b := unsafe.Slice(p, size) //nolint:gosec // Free: the first of that many bytes
		markUsed(b)
		return b[:Headroom]
	}
	return make([]byte, Headroom, size)
}

// Free gives up b, and all of the memory up to its capacity, which nobody else may have. It
// does nothing with a slice that does not have the capacity of a buffer.
func Free(b []byte) {
	size := cap(b)
	class := bits.Len(uint(size)) - 1 - minBufferBits //nolint:gosec // positive
	if class < 0 || class >= len(freeBuffers) || size != 1<<(class+minBufferBits) {
		return
	}
	b = b[:size]
	markFree(b)
	freeBuffers[class].Put(&b[0])
}

// Frame is the frame in a buffer.
func Frame(buf []byte) []byte { return buf[Headroom:] }

// Fit returns buf, or its frame in a buffer that is not larger than the frame needs: one
// that waits for its peer holds no more memory than is counted for it, or twice as much.
func Fit(buf []byte) []byte {
	size := len(buf)
	if class := max(bits.Len(uint(size-1)), minBufferBits); cap(buf) <= 1<<class { //nolint:gosec // at least Headroom
		return buf
	}
	small := append(NewBuffer(size-Headroom), Frame(buf)...)
	Free(buf)
	return small
}
