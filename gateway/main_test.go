package gateway

import (
	"flag"
	"fmt"
	"os"
	"testing"

	"github.com/pyrycode/pyrycode-relay/testenv"
)

// natsURL is of the one NATS server that the package's tests share. Each cluster of
// gateways in them has buckets of its own.
var natsURL string

func TestMain(m *testing.M) {
	flag.Parse()
	if f := flag.Lookup("test.parallel"); f.Value.String() == f.DefValue {
		_ = f.Value.Set("8") // they wait more than they work
	}
	os.Exit(testenv.VerifyNoLeaks(func() int {
		return detector.Verify(func() int {
			server, err := testenv.StartServer(testenv.ServerOptions{Memory: true, Detector: detector})
			if err != nil {
				fmt.Fprintln(os.Stderr, err)
				return 1
			}
			defer server.Close()
			natsURL = server.URL()
			return m.Run()
		})
	}))
}

// markToken and markFrame are in every token and in many frames that the tests send.
const (
	markToken = "t0ken-of-a-test"
	markFrame = "fr4me-of-a-test"
)

// detector looks through all that the tests' nodes log, count, and tell NATS by
// anything but the data of messages.         (protocol.md: Log events, last line)
var (
	detector = testenv.NewDetector(markToken, markFrame, testenv.DefaultToken, "Sec-Websocket", "pyrycode-testenv/")
	logged   = detector.Writer("the log")
	exposed  = detector.Writer("/metrics")
)

// startNATS starts a server for one test, which can be isolated.
func startNATS(t *testing.T) *testenv.Server {
	t.Helper()
	server, err := testenv.StartServer(testenv.ServerOptions{Memory: true, Proxied: true, Detector: detector})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(server.Close)
	return server
}
