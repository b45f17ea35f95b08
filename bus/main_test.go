package bus

import (
	"bytes"
	"encoding/binary"
	"log/slog"
	"os"
	"strings"
	"testing"

	"github.com/pyrycode/pyrycode-relay/testenv"
)

func TestMain(m *testing.M) {
	os.Exit(testenv.VerifyNoLeaks(func() int { return detector.Verify(m.Run) }))
}

// markFrame is in every frame that the tests' links carry, if it has room.
const markFrame = "fr4me-of-a-test"

// detector looks through what the tests' nodes log, and what they tell NATS by
// anything but the data of messages.         (protocol.md: Log events, last line)
var (
	detector = testenv.NewDetector(markFrame)
	logger   = slog.New(slog.NewTextHandler(detector.Writer("the log"), &slog.HandlerOptions{Level: slog.LevelDebug}))
)

func startNATS(t *testing.T, opts testenv.ServerOptions) *testenv.Server {
	t.Helper()
	opts.Detector = detector
	s, err := testenv.StartServer(opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// textFrame is a frame to send; unmarked gives back the text of what arrived.
func textFrame(text string) []byte { return frameBuf(markFrame + text) }
func unmarked(frame []byte) string { return strings.TrimPrefix(string(frame), markFrame) }

// sizedFrame is a frame of size bytes to send.
func sizedFrame(size int) []byte {
	marks := bytes.Repeat([]byte(markFrame), size/len(markFrame)+1)
	return frameBuf(string(marks[:size]))
}

// numberedFrame is a frame of 8 bytes or more to send, for checkNumber.
func numberedFrame(i uint64, size int) []byte {
	buf := sizedFrame(size)
	if size > 8 {
		buf[len(buf)-1] = byte(i) //nolint:gosec // the low byte
	}
	binary.BigEndian.PutUint64(buf[Headroom:], i)
	return buf
}
