package bus

import (
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// Thousands are woken at once on one processor: whoever else can run has a turn all the
// same, each time after a few of their steps.
func TestYield_OthersRunBetweenTheStepsOfACrowd(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	const many, stepsEach = 2000, 5
	var steps atomic.Int64
	var all sync.WaitGroup
	begin := make(chan struct{})
	for range many {
		all.Go(func() {
			<-begin
			for range stepsEach {
				Yield()
				for end := time.Now().Add(20 * time.Microsecond); time.Now().Before(end); { //nolint:revive // a step
				}
				steps.Add(1)
			}
		})
	}
	runtime.Gosched() // all wait
	close(begin)
	turns, most := 0, int64(0)
	for before := int64(0); before < many*stepsEach; turns++ {
		runtime.Gosched()
		now := steps.Load()
		before, most = now, max(most, now-before)
	}
	all.Wait()
	t.Logf("%d turns, at most %d steps between two", turns, most)
	if most > 4*yieldSteps {
		t.Errorf("%d steps between two turns of somebody else, want %d or a few more", most, yieldSteps)
	}
}
