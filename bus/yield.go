package bus

import (
	"runtime"
	"sync"
	"time"
)

const (
	// yieldSteps is how many steps of a crowd are taken before everybody else has a turn:
	// about a millisecond on one core.
	yieldSteps = 8
	// yieldBusy says that others were waiting: a turn of theirs took longer.
	yieldBusy = 200 * time.Microsecond
	// pollEvery is how often a process in which somebody always waits looks at its sockets.
	// Left alone, Go does so every 10 to 20 ms then, and a round trip waits for that twice.
	pollEvery = 2 * time.Millisecond
	// pollPause is long enough for that: a process in which nobody can run polls at once.
	pollPause = 50 * time.Microsecond
)

// yielders is everybody who calls Yield. There is one of it, as there is one scheduler.
var yielders struct {
	mu     sync.Mutex // waited for in turn; held while others run
	steps  int
	polled time.Time
}

// Yield lets others run before the caller goes on. Whoever may be one of thousands calls it
// between two steps of some 100 µs each: connections that are accepted, upgrades, claims
// after each answer. Else 10,000 binaries that come back at once are a queue in front of
// every frame, and Go hardly looks at the network meanwhile. Where nobody waits it costs
// next to nothing.                                          (docs/adr/0006)
func Yield() {
	yielders.mu.Lock()
	defer yielders.mu.Unlock()
	if yielders.steps++; yielders.steps < yieldSteps {
		return
	}
	yielders.steps = 0
	start := time.Now()
	runtime.Gosched() // behind everybody who can run now
	if now := time.Now(); now.Sub(start) > yieldBusy && now.Sub(yielders.polled) > pollEvery {
		time.Sleep(pollPause) // nobody can run, so the process polls its sockets
		yielders.polled = time.Now()
	}
}
