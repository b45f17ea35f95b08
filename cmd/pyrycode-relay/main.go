// Command pyrycode-relay joins phones to the binary they belong to, over any
// number of nodes. See `pyrycode-relay -h`.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
)

// Exit codes.
const (
	exitOK     = 0
	exitFailed = 1 // at run time
	exitUsage  = 2 // the command line or the environment is wrong
)

func main() {
	os.Exit(mainExit(os.Args[1:], console{os.Environ(), os.Stdout, os.Stderr}))
}

// console is what a subcommand has besides its arguments.
type console struct {
	environ        []string
	stdout, stderr io.Writer
}

// mainExit runs a subcommand and returns the exit code of the program.
func mainExit(args []string, c console) int {
	name := "serve"
	if len(args) > 0 && !isFlag(args[0]) {
		name, args = args[0], args[1:]
	}
	switch name {
	case "serve":
		if len(args) > 0 && (args[0] == "--version" || args[0] == "-version") {
			return printVersion(c)
		}
		return serve(args, c)
	case "smoke":
		return smoke(args, c)
	case "status":
		return status(args, c)
	case "bench":
		return bench(args, c)
	case "version":
		return printVersion(c)
	}
	return c.usageError(fmt.Errorf("unknown subcommand %q: want serve, smoke, status, bench or version", name))
}

func isFlag(arg string) bool { return strings.HasPrefix(arg, "-") }

func printVersion(c console) int {
	fmt.Fprintln(c.stdout, versionLine())
	return exitOK
}

// serve runs a node until a signal or a failure ends it.
func serve(args []string, c console) int {
	cfg, err := parseConfig(args, c.environ)
	if errors.Is(err, flag.ErrHelp) {
		printUsage(c.stdout, c.environ)
		return exitOK
	}
	if err != nil {
		return c.usageError(err)
	}
	log := newLogger(c.stderr, cfg.logFormat, cfg.logLevel, cfg.gatewayID)
	ctx, stop := untilSignal()
	defer stop()
	tuneGC()
	go giveBackMemory(ctx)
	if err := run(ctx, cfg, log); err != nil {
		log.Error("failed", "error", err)
		return exitFailed
	}
	return exitOK
}

// untilSignal returns a context that ends with the first SIGINT or SIGTERM. The
// second one has its default action, however soon it comes: the program ends at
// once. The caller must call cancel.
func untilSignal() (ctx context.Context, cancel context.CancelFunc) {
	ctx, cancel = context.WithCancel(context.Background())
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	go func() {
		select {
		case <-signals:
		case <-ctx.Done():
		}
		signal.Stop(signals) // before the drain begins, and says so
		cancel()
		select {
		case second := <-signals: // it came before Stop
			_ = syscall.Kill(os.Getpid(), second.(syscall.Signal)) // cannot fail for itself
		default:
		}
	}()
	return ctx, cancel
}

// usageError prints err in one line.
func (c console) usageError(err error) int {
	fmt.Fprintf(c.stderr, "pyrycode-relay: %s\n", strings.ReplaceAll(err.Error(), "\n", " "))
	return exitUsage
}

// parseTool parses the flags of a subcommand other than serve. If ok is false,
// help or an error has been printed, and the program is to exit with code.
func (c console) parseTool(flags *flag.FlagSet, args []string) (code int, ok bool) {
	flags.SetOutput(io.Discard)
	switch err := parseFlags(flags, args); {
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprintf(c.stdout, "usage: %s [flags]\n\n", flags.Name())
		flags.SetOutput(c.stdout)
		flags.PrintDefaults()
		return exitOK, false
	case err != nil:
		return c.usageError(err), false
	}
	return exitOK, true
}
