package bus

import (
	"os"
	"testing"

	"github.com/pyrycode/pyrycode-relay/testenv"
)

func TestMain(m *testing.M) { os.Exit(testenv.VerifyNoLeaks(m.Run)) }
