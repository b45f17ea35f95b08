package testenv

import (
	"strings"
	"testing"

	"go.uber.org/goleak"
)

func TestVerifyNoLeaksFindsGoroutine(t *testing.T) {
	before := goleak.IgnoreCurrent()
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() { <-stop; close(stopped) }()
	if err := leaks(before, 1); err == nil || !strings.Contains(err.Error(), "TestVerifyNoLeaksFindsGoroutine") {
		t.Errorf("found %v; want the goroutine of this test", err)
	}
	close(stop)
	<-stopped
	if err := leaks(before, leakChecks); err != nil {
		t.Error(err)
	}
}

func TestVerifyNoLeaksKeepsExitCode(t *testing.T) {
	if got := VerifyNoLeaks(func() int { return 3 }); got != 3 {
		t.Errorf("got %d; want 3", got)
	}
}
