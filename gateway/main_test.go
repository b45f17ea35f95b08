package gateway

import (
	"bytes"
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
		server, err := testenv.StartServer(testenv.ServerOptions{Memory: true})
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer server.Close()
		natsURL = server.URL()
		if code := m.Run(); code != 0 {
			return code
		}
		return grepForSecrets()
	}))
}

// markToken and markFrame are in every token and in many frames that the tests send.
const (
	markToken = "t0ken-of-a-test"
	markFrame = "fr4me-of-a-test"
)

// grepForSecrets looks through all that the tests' nodes have logged, counted and
// written to the KV.                          (protocol.md: Log events, last line)
func grepForSecrets() int {
	written.mu.Lock()
	defer written.mu.Unlock()
	for _, mark := range []string{markToken, markFrame, "Sec-Websocket", "pyrycode-testenv/"} {
		if i := bytes.Index(written.text, []byte(mark)); i >= 0 {
			line := written.text[bytes.LastIndexByte(written.text[:i], '\n')+1:]
			fmt.Fprintf(os.Stderr, "%q was written: %.300s\n", mark, line)
			return 1
		}
	}
	return 0
}
