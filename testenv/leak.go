package testenv

import (
	"fmt"
	"net/http"
	"os"

	"go.uber.org/goleak"
)

// leakChecks is how often VerifyNoLeaks looks, each time for about half a
// second: a nats-server that was shut down lets go of its last goroutines late.
const leakChecks = 10

// VerifyNoLeaks calls run, which is (*testing.M).Run, and then checks that no
// goroutine is left of those started meanwhile, after a few seconds at most. It
// returns run's exit code, or 1 if goroutines leaked; those are printed to
// stderr. A failed run is not checked. Use:
//
//	func TestMain(m *testing.M) { os.Exit(testenv.VerifyNoLeaks(m.Run)) }
func VerifyNoLeaks(run func() int) int {
	before := goleak.IgnoreCurrent()
	if code := run(); code != 0 {
		return code
	}
	http.DefaultTransport.(*http.Transport).CloseIdleConnections()
	if err := leaks(before, leakChecks); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// leaks looks up to checks times for goroutines that are not in before. It
// needs no exception for nats-server, which leaves none in the end.
func leaks(before goleak.Option, checks int) (err error) {
	for range checks {
		if err = goleak.Find(before); err == nil {
			return nil
		}
	}
	return err
}
