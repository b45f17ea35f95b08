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

func checkFree(b []byte) {
	if !allFreed(b) {
		panic("bus: a buffer was written to after it was freed")
	}
}

func allFreed(b []byte) bool {
	for _, c := range b {
		if c != freed {
			return false
		}
	}
	return true
}
