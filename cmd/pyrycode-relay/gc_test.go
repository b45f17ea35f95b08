package main

import (
	"runtime"
	"testing"
)

func TestGCPercent(t *testing.T) {
	for live, want := range map[uint64]int{
		0: 600, 4 << 20: 600, 12 << 20: 200, 24 << 20: 100, 600 << 20: 100, 1 << 40: 100,
	} {
		if got := gcPercent(live); got != want {
			t.Errorf("%d MiB are live: %d %%, want %d", live>>20, got, want)
		}
	}
}

func TestAfterGC_EachTime(t *testing.T) {
	calls := make(chan struct{}, 100)
	afterGC(func() {
		select {
		case calls <- struct{}{}:
		default: // the test is over
		}
	})
	for i := range 3 {
		<-calls // or the test times out
		runtime.GC()
		t.Logf("call %d", i+1)
	}
	<-calls
}
