package registry

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// NATS marks the end of a key by a message that expects no revision: if it was decided
// on before a claim over the ending grace, it must not erase that claim, which was
// acknowledged. By chance, one of some hundred is hit on R3.
func TestClaimAtTheEndOfAGrace_IsNotErased(t *testing.T) {
	for _, w := range []*world{alone, cluster} { // not beside others: it takes both cores
		t.Run(w.name, func(t *testing.T) { claimAtTheEndOfGraces(t, newScene(t, w)) })
	}
}

func claimAtTheEndOfGraces(t *testing.T, s *scene) {
	const keys = 300
	s.cfg.Grace = time.Second
	n := s.node()
	var claimed, erased atomic.Int64
	var claims sync.WaitGroup
	for i := range keys {
		claims.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			pause(ctx, time.Duration(i)*5*time.Millisecond)
			id := fmt.Sprint("id", i)
			first, err := n.claim(id)
			if err != nil {
				return
			}
			first.release()
			pause(ctx, time.Second+time.Duration(i%100)*3*time.Millisecond)
			b, err := n.claim(id)
			if err != nil {
				return
			}
			claimed.Add(1)
			pause(ctx, time.Second)
			if e, ok := s.entry(id); !ok || e.Session != b.session() {
				erased.Add(1)
			}
		})
	}
	claims.Wait()
	if claimed.Load() == 0 || erased.Load() > 0 {
		t.Errorf("%d of %d claims were acknowledged and erased", erased.Load(), claimed.Load())
	}
}
