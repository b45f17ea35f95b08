package testenv

import (
	"cmp"
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"net/url"
)

// What a peer sends in a header that its options leave empty.
const (
	DefaultToken     = "testenv-token"
	DefaultVersion   = "0.0.0-testenv"
	DefaultUserAgent = "pyrycode-testenv/1"
)

// DialFunc dials a network address, like (*net.Dialer).DialContext and
// (*Listener).Dial.
type DialFunc func(ctx context.Context, network, addr string) (net.Conn, error)

// PhoneOptions is how a phone introduces itself. Empty fields send no header,
// but for Token and UserAgent, which have defaults.
type PhoneOptions struct {
	ServerID, Token, UserAgent, DeviceName string

	Header      http.Header // wins over the above; a nil value removes the header
	DialContext DialFunc    // default: net.Dialer
	TLS         *tls.Config // for wss
}

// BinaryOptions is how a binary introduces itself. Empty fields send no header,
// but for Version and UserAgent, which have defaults.
type BinaryOptions struct {
	ServerID, Version, UserAgent string

	Header      http.Header // wins over the above; a nil value removes the header
	DialContext DialFunc    // default: net.Dialer
	TLS         *tls.Config // for wss
}

// RefusedError is returned when a dial was answered by anything but 101.
type RefusedError struct {
	Status int
	Header http.Header
	Body   string // the first 1,024 bytes
}

func (e *RefusedError) Error() string {
	return fmt.Sprintf("upgrade refused: %d %s", e.Status, http.StatusText(e.Status))
}

// DialPhone connects a phone to the relay at a URL like ws://host:port, path
// /v1/client. It returns a *RefusedError if the relay answered with an HTTP
// status. ctx bounds the dial only.
func DialPhone(ctx context.Context, relay string, o PhoneOptions) (*Phone, error) {
	p, err := dial(ctx, relay+"/v1/client", map[string]string{
		"X-Pyrycode-Server":      o.ServerID,
		"X-Pyrycode-Token":       cmp.Or(o.Token, DefaultToken),
		"X-Pyrycode-Device-Name": o.DeviceName,
		"User-Agent":             cmp.Or(o.UserAgent, DefaultUserAgent),
	}, o.Header, o.DialContext, o.TLS)
	if err != nil {
		return nil, fmt.Errorf("dial phone: %w", err)
	}
	return &Phone{p}, nil
}

// DialBinary connects a binary to the relay at a URL like ws://host:port, path
// /v1/server. It returns a *RefusedError if the relay answered with an HTTP
// status. ctx bounds the dial only.
func DialBinary(ctx context.Context, relay string, o BinaryOptions) (*Binary, error) {
	p, err := dial(ctx, relay+"/v1/server", map[string]string{
		"X-Pyrycode-Server":  o.ServerID,
		"X-Pyrycode-Version": cmp.Or(o.Version, DefaultVersion),
		"User-Agent":         cmp.Or(o.UserAgent, DefaultUserAgent),
	}, o.Header, o.DialContext, o.TLS)
	if err != nil {
		return nil, fmt.Errorf("dial binary: %w", err)
	}
	return &Binary{p}, nil
}

// header returns the non-empty fields, overridden by extra.
func header(fields map[string]string, extra http.Header) http.Header {
	h := make(http.Header)
	for k, v := range fields {
		if v != "" {
			h.Set(k, v)
		}
	}
	for k, v := range extra {
		h[http.CanonicalHeaderKey(k)] = v
	}
	if h["User-Agent"] == nil {
		h["User-Agent"] = []string{""} // otherwise net/http sends its own
	}
	return h
}

func hostPort(u *url.URL) string {
	if u.Port() != "" {
		return u.Host
	}
	if u.Scheme == "wss" || u.Scheme == "https" {
		return net.JoinHostPort(u.Hostname(), "443")
	}
	return net.JoinHostPort(u.Hostname(), "80")
}
