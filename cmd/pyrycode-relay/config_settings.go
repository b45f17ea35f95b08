package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"regexp"
	"strings"
)

// setting is a value and where it was found: a flag or a variable.
type setting struct{ source, value string }

// parseEnviron returns the settings of environ by flag name.
func parseEnviron(options []option, environ []string) (map[string]setting, error) {
	known := make(map[string]string, len(options))
	for _, o := range options {
		known[envName(o.name)] = o.name
	}
	found := make(map[string]setting)
	for _, variable := range environ {
		name, value, _ := strings.Cut(variable, "=")
		if !strings.HasPrefix(name, envPrefix) || serviceLink.MatchString(variable) {
			continue
		}
		option, ok := known[name]
		if !ok {
			return nil, fmt.Errorf("unknown variable %q: unset it, or take one named after a flag, as %s for --nats-url", name, envName("nats-url"))
		}
		found[option] = setting{name, value}
	}
	return found, nil
}

func envName(flag string) string {
	return envPrefix + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}

// serviceLink matches what Kubernetes puts into the environment of every pod
// beside a Service called pyrycode-relay or pyrycode-relay-…: nobody's mistake.
var serviceLink = regexp.MustCompile(`^[^=]+_(SERVICE_HOST=|SERVICE_PORT(_[^=]+)?=|PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?=|PORT=(tcp|udp|sctp)://)`)

// parseArgs returns the settings of args by flag name.
func parseArgs(options []option, args []string) (map[string]setting, error) {
	found := make(map[string]setting)
	flags := flag.NewFlagSet("pyrycode-relay", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	for _, o := range options {
		record := func(value string) error {
			found[o.name] = setting{"--" + o.name, value}
			return nil
		}
		if o.isBool {
			flags.BoolFunc(o.name, o.usage, record)
		} else {
			flags.Func(o.name, o.usage, record)
		}
	}
	if err := parseFlags(flags, args); err != nil {
		return nil, err
	}
	return found, nil
}

// parseFlags parses args, none of which may be positional. Its error is one
// line, or flag.ErrHelp.
func parseFlags(flags *flag.FlagSet, args []string) error {
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		return err
	case err != nil:
		return fmt.Errorf("%w: %s -h lists the flags", err, flags.Name())
	case flags.NArg() > 0:
		return fmt.Errorf("unexpected argument %q: only flags may follow, and a false one is written --flag=false", redact(flags.Arg(0)))
	}
	return nil
}

// credentials is what precedes the host in a URL, and a little more.
var credentials = regexp.MustCompile(`(?s).*@`)

// redact makes a value that may be a URL fit for an error.
func redact(value string) string {
	return credentials.ReplaceAllString(value, "…@")
}
