//go:build race

package bus

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
