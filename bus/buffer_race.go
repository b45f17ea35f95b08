//go:build race

package bus

// freed fills every freed buffer in a program with the race detector, as tests are: so
// who still reads it gets nonsense, and who writes to it or frees it again is found out.
const freed = 0xDB

func markFree(b []byte) {
	if allFreed(b) {
		panic("bus: a buffer was freed twice")
	}
	for i := range b {
		b[i] = freed
	}
}

// markUsed is for a buffer that is used again. One that stays as it is, because its frame
// is empty, must not look like one that was freed.
func markUsed(b []byte) {
	if !allFreed(b) {
		panic("bus: a buffer was written to after it was freed")
	}
	b[0] = 0
}

func allFreed(b []byte) bool {
	for _, c := range b {
		if c != freed {
			return false
		}
	}
	return true
}
