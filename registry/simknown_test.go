package registry

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// Schedules that chance finds too seldom: each attacks one rule.
func TestSimulation_KnownSchedules(t *testing.T) {
	t.Parallel()
	const ms = time.Millisecond
	for _, tt := range []struct {
		name  string
		steps []step
	}{
		{"LeaderOfBeforeNamesTheOneOfBefore_NobodyIsEvictedByIt", []step{
			{After: 0, Do: "claim", Node: 2},
			{After: 500 * ms, Do: "release"},
			{After: 1500 * ms, Do: "split", Node: 0, For: 40_000 * ms, A: true},
			{After: 9500 * ms, Do: "claim", Node: 1}, // there is a new leader
			{After: 500 * ms, Do: "move", Node: 1, For: 20_000 * ms},
		}},
		{"LeaseCameBack_OthersAreNotDeadBecauseTheirsHasNot", []step{
			{After: 0, Do: "claim", Node: 1},
			{After: 1000 * ms, Do: "away", Node: 0, For: 8 * 24_000 * ms},
			{After: 0, Do: "away", Node: 2, For: 8 * 24_000 * ms},
			{After: 0, Do: "away", Node: 1, For: 8 * 25_500 * ms},
			{After: 24_600 * ms, Do: "dial", Node: 0},
		}},
		{"LeaseIsOver_NothingIsDecidedByTheLeaderOfBefore", []step{
			{After: 0, Do: "split", Node: 2, For: 35_000 * ms, A: true, B: true},
			{After: 10_000 * ms, Do: "claim", Node: 1},
			{After: 5200 * ms, Do: "dial", Node: 2},
			{After: 1000 * ms, Do: "dial", Node: 2},
			{After: 1000 * ms, Do: "dial", Node: 2},
		}},
		{"LeaseCameBack_ItsTablesAreAHint", []step{
			{After: 0, Do: "claim", Node: 1},
			{After: 1000 * ms, Do: "away", Node: 1, For: 8 * 30_000 * ms},
			{After: 25_000 * ms, Do: "claim", Node: 0},
			{After: 1000 * ms, Do: "dial once ready", Node: 1},
		}},
		{"LeaseCameBack_ItsOwnBinaryIsThere", []step{ // its entry was reaped, and its grace is over
			{After: 0, Do: "claim", Node: 1},
			{After: 1000 * ms, Do: "away", Node: 1, For: 8 * 50_000 * ms},
			{After: 30_000 * ms, Do: "dial once ready", Node: 1},
		}},
		{"SilentForASecond_IsNotDeadForALookUp", []step{
			{After: 0, Do: "claim", Node: 1},
			{After: 5000 * ms, Do: "held", Node: 1, For: 10_000 * ms}, // nobody responds from 6 s on
			{After: 4200 * ms, Do: "dial", Node: 0},
			{After: 500 * ms, Do: "dial", Node: 2},
			{After: 500 * ms, Do: "dial", Node: 0},
		}},
		{"SilentForASecond_IsNotDeadForPhones", []step{
			{After: 0, Do: "claim", Node: 1},
			{After: 500 * ms, Do: "dial", Node: 0},
			{After: 500 * ms, Do: "dial", Node: 2},
			{After: 3000 * ms, Do: "away", Node: 1, For: 8 * 2000 * ms},
		}},
		{"ClaimsDuringAPing_WaitForTheNext", []step{
			{After: 0, Do: "claim", Node: 1},
			{After: 1000 * ms, Do: "claim", Node: 0},
			{After: 200 * ms, Do: "claim", Node: 2},
			{After: 50 * ms, Do: "claim", Node: 1},
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for seed := range uint64(20) { // the length of elections, and so on
				synctest.Test(t, func(t *testing.T) {
					w := newSimWorld(seed)
					w.run(seed, tt.steps)
					if len(w.broken) > 0 {
						t.Errorf("seed %d: %s\n%s", seed, strings.Join(w.broken, "\n"), w.history.String())
					}
				})
			}
		})
	}
}
