package main

import (
	"context"
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

// garbageFloor is about how much garbage the heap may hold at least before it is collected,
// stacks not counted; on a node with more than that live, as much as is live, which is
// Go's default. What is live on a small node is so little that the collector would run
// hundreds of times a second by what NATS allocates for each message.
//
//	(docs/performance.md: Memory)
const garbageFloor = 24 << 20

// tuneGC keeps the garbage collector at that, unless the operator has set GOGC.
func tuneGC() {
	if os.Getenv("GOGC") == "" {
		afterGC(setGCPercent)
	}
}

// afterGC calls f now and after each collection.
func afterGC(f func()) {
	f()
	type cycle struct{ _ *byte }
	runtime.SetFinalizer(new(cycle), func(*cycle) { afterGC(f) })
}

func setGCPercent() {
	live := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
	metrics.Read(live)
	debug.SetGCPercent(gcPercent(live[0].Value.Uint64()))
}

// gcPercent is what debug.SetGCPercent wants for so many live bytes.
func gcPercent(live uint64) int {
	live = max(live, 4<<20)                     // before the first collection it is 0
	return max(100, int(garbageFloor*100/live)) //nolint:gosec // at most 600
}

const (
	// calmCheck is how often it is looked at whether there is memory to give back.
	calmCheck = 2 * time.Second
	// calmAllocs is how many bytes may be allocated in that time by a node on which
	// nothing is going on: heartbeats and the lease.
	calmAllocs = 4 << 20
	// worthGivingBack is what a collection ahead of its time is done for.
	worthGivingBack = 16 << 20
)

// giveBackMemory collects the garbage and returns free memory to the system while
// nothing else is going on, after the rush of a redial for one: else what 10,000
// handshakes left would stay until the next rush.
func giveBackMemory(ctx context.Context) {
	m := []metrics.Sample{
		{Name: "/gc/heap/allocs:bytes"}, {Name: "/gc/heap/live:bytes"},
		{Name: "/memory/classes/heap/objects:bytes"}, {Name: "/memory/classes/heap/free:bytes"},
	}
	ticker := time.NewTicker(calmCheck)
	defer ticker.Stop()
	for before := uint64(0); ; {
		metrics.Read(m)
		allocs, live, objects, free := m[0].Value.Uint64(), m[1].Value.Uint64(), m[2].Value.Uint64(), m[3].Value.Uint64()
		garbage := objects - min(objects, live)
		if allocs-before < calmAllocs && garbage+free > max(worthGivingBack, live/4) {
			debug.FreeOSMemory()
		}
		before = allocs
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
	}
}
