package main

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"strings"
	"syscall"
	"testing"

	"github.com/pyrycode/pyrycode-relay/testenv"
)

func TestMain(m *testing.M) {
	flag.Parse()
	if f := flag.Lookup("test.parallel"); f.Value.String() == f.DefValue {
		_ = f.Value.Set("3") // they wait more than they work, but those with tight bounds need a CPU
	}
	os.Exit(testenv.VerifyNoLeaks(func() int {
		return detector.Verify(func() int {
			defer endShared()
			if err := buildPrograms(); err != nil {
				fmt.Fprintln(os.Stderr, err)
				return 1
			}
			return m.Run()
		})
	}))
}

// markFrame is in the frames of all phones and binaries that meet.
const markFrame = "fr4me-of-a-test"

// detector looks through what all nodes log, here and as processes, and what they
// tell the shared NATS servers by anything but the data of messages.
//
//	(protocol.md: Log events, last line)
var detector = testenv.NewDetector(markFrame, testenv.DefaultToken, testenv.DefaultUserAgent)

// invoke runs the program with args in an empty environment.
func invoke(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errOut bytes.Buffer
	code = mainExit(args, console{stdout: &out, stderr: &errOut})
	return code, out.String(), errOut.String()
}

func isOneLine(s string) bool {
	return strings.Count(s, "\n") == 1 && strings.HasSuffix(s, "\n")
}

func TestUsageErrors(t *testing.T) {
	for _, tt := range []struct {
		args []string
		want string // part of the line
	}{
		{nil, "--insecure-listen"},
		{[]string{"serve"}, "--insecure-listen"},
		{[]string{"--nonsense"}, "-nonsense"},
		{[]string{"fly"}, `unknown subcommand "fly": want serve, smoke, status, bench or version`},
		{[]string{"a\nb"}, "unknown subcommand"},
		{[]string{"--no\nsense"}, "-no sense"},
		{[]string{"smoke", "--nonsense"}, "pyrycode-relay smoke -h"},
		{[]string{"status", "now"}, `"now"`},
	} {
		code, out, errOut := invoke(t, tt.args...)
		if code != 2 || out != "" || !isOneLine(errOut) || !strings.Contains(errOut, tt.want) {
			t.Errorf("%q: got exit %d, output %q, error %q; want exit 2 and one line with %q", tt.args, code, out, errOut, tt.want)
		}
	}
}

func TestHelp(t *testing.T) {
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"-h"}, "--lease-ttl"},
		{[]string{"--help"}, "--lease-ttl"},
		{[]string{"serve", "-h"}, "--lease-ttl"},
		{[]string{"smoke", "-h"}, "-url2"},
		{[]string{"status", "--help"}, "-live"},
	} {
		code, out, errOut := invoke(t, tt.args...)
		if code != 0 || errOut != "" || !strings.Contains(out, tt.want) {
			t.Errorf("%q: got exit %d, output %q, error %q; want exit 0 and an output with %q", tt.args, code, out, errOut, tt.want)
		}
	}
}

func TestVersion(t *testing.T) {
	for _, arg := range []string{"version", "--version", "-version"} {
		code, out, errOut := invoke(t, arg)
		if code != 0 || errOut != "" || !isOneLine(out) || !strings.Contains(out, runtime.Version()) {
			t.Errorf("%s: got exit %d, output %q, error %q; want exit 0 and one line", arg, code, out, errOut)
		}
	}
}

func TestDescribeVersion(t *testing.T) {
	built := func(version string, settings ...debug.BuildSetting) *debug.BuildInfo {
		return &debug.BuildInfo{Main: debug.Module{Version: version}, Settings: settings}
	}
	revision := debug.BuildSetting{Key: "vcs.revision", Value: "0123456789abcdef"}
	for _, tt := range []struct {
		stamped string
		info    *debug.BuildInfo
		want    string
	}{
		{"v1.2.3", built("v9.9.9"), "v1.2.3"},
		{"", built("v1.2.3"), "v1.2.3"},
		{"", built("(devel)", revision), "0.0.0-unknown+0123456789ab"},
		{"", built("", revision, debug.BuildSetting{Key: "vcs.modified", Value: "true"}), "0.0.0-unknown+0123456789ab-dirty"},
		{"", built("(devel)"), "0.0.0-unknown+unknown"},
		{"", nil, "0.0.0-unknown+unknown"},
	} {
		if got := describeVersion(tt.stamped, tt.info); got != tt.want {
			t.Errorf("describeVersion(%q, %+v): got %q, want %q", tt.stamped, tt.info, got, tt.want)
		}
	}
}

func TestUntilSignal(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM} {
		ctx, stop := untilSignal()
		if err := syscall.Kill(os.Getpid(), sig); err != nil {
			t.Fatal(err)
		}
		<-ctx.Done()
		stop()
	}
}
