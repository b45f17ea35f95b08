package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// The functions of this file make the set function of an option.

func text(p *string) func(string) error {
	return length(p, 0, 4*kib)
}

func length(p *string, least, most int) func(string) error {
	return func(s string) error {
		if len(s) < least || len(s) > most {
			return fmt.Errorf("want %d to %d bytes", least, most)
		}
		*p = s
		return nil
	}
}

// optional lets a flag be empty.
func optional(set func(string) error) func(string) error {
	return func(s string) error {
		if s == "" {
			return nil
		}
		return set(s)
	}
}

func address(p *string) func(string) error {
	return func(s string) error {
		_, port, err := net.SplitHostPort(s)
		if err == nil {
			_, err = strconv.ParseUint(port, 10, 16)
		}
		if err != nil {
			return errors.New("want an address with a port, e.g. 127.0.0.1:8080 or :8080")
		}
		*p = s
		return nil
	}
}

var hostName = regexp.MustCompile(`^([a-z0-9]([a-z0-9-]*[a-z0-9])?\.)+[a-z]([a-z0-9-]*[a-z0-9])?$`)

func domain(p *string) func(string) error {
	return func(s string) error {
		s = strings.ToLower(s)
		if !hostName.MatchString(s) {
			return errors.New("want one host name in ASCII, e.g. relay.example.com")
		}
		*p = s
		return nil
	}
}

func prefixes(p *[]netip.Prefix) func(string) error {
	return optional(func(s string) error {
		var list []netip.Prefix
		for cidr := range strings.SplitSeq(s, ",") {
			prefix, err := netip.ParsePrefix(strings.TrimSpace(cidr))
			if err != nil {
				return errors.New("want CIDRs separated by commas, e.g. 10.0.0.0/8,192.0.2.7/32")
			}
			list = append(list, prefix.Masked())
		}
		*p = list
		return nil
	})
}

func natsURLs(p *string) func(string) error {
	return func(s string) error {
		list := strings.Split(s, ",")
		for i, entry := range list {
			list[i] = strings.TrimSpace(entry)
			u, err := url.Parse(list[i])
			if err != nil || !slices.Contains([]string{"nats", "tls", "ws", "wss"}, u.Scheme) || u.Hostname() == "" {
				return errors.New("want URLs separated by commas, each nats, tls, ws or wss, e.g. nats://127.0.0.1:4222")
			}
		}
		*p = strings.Join(list, ",")
		return nil
	}
}

var bucketChars = regexp.MustCompile(`^[A-Za-z0-9_-]{1,64}$`)

func bucketName(p *string) func(string) error {
	return func(s string) error {
		if !bucketChars.MatchString(s) {
			return errors.New("want 1 to 64 of A-Z, a-z, 0-9, _ and -")
		}
		*p = s
		return nil
	}
}

func duration(p *time.Duration, least time.Duration) func(string) error {
	return func(s string) error {
		d, err := time.ParseDuration(s)
		if err != nil || d < least {
			return fmt.Errorf("want a duration of at least %v, e.g. 20s", least)
		}
		*p = d
		return nil
	}
}

// wholeSeconds is for durations that become a NATS TTL.
func wholeSeconds(p *time.Duration) func(string) error {
	return func(s string) error {
		d, err := time.ParseDuration(s)
		if err != nil || d < time.Second || d%time.Second != 0 {
			return errors.New("want whole seconds, at least 1s, e.g. 30s")
		}
		*p = d
		return nil
	}
}

func boolean(p *bool) func(string) error {
	return func(s string) error {
		b, err := strconv.ParseBool(s)
		if err != nil {
			return errors.New("want true or false")
		}
		*p = b
		return nil
	}
}

func integer(p *int, least, most int) func(string) error {
	return func(s string) error {
		n, err := strconv.Atoi(s)
		if err != nil || n < least || n > most {
			return fmt.Errorf("want a whole number from %d to %d", least, most)
		}
		*p = n
		return nil
	}
}

func replicas(p *int) func(string) error {
	return func(s string) error {
		n, err := strconv.Atoi(s)
		if err != nil || !slices.Contains([]int{0, 1, 3, 5}, n) {
			return errors.New("want 0 (by cluster size), 1, 3 or 5")
		}
		*p = n
		return nil
	}
}

// size takes bytes, or KiB or MiB with that suffix.
func size(p *int, least, most int) func(string) error {
	return func(s string) error {
		unit := 1
		if digits, ok := strings.CutSuffix(s, "KiB"); ok {
			s, unit = digits, kib
		} else if digits, ok := strings.CutSuffix(s, "MiB"); ok {
			s, unit = digits, mib
		}
		n, err := strconv.Atoi(s)
		if err != nil || n < 0 || n > most/unit || n*unit < least {
			return fmt.Errorf("want %d to %d bytes, e.g. 262144 or 256KiB", least, most)
		}
		*p = n * unit
		return nil
	}
}

func oneOf(p *string, values ...string) func(string) error {
	return func(s string) error {
		if !slices.Contains(values, s) {
			return fmt.Errorf("want one of %s", strings.Join(values, ", "))
		}
		*p = s
		return nil
	}
}
