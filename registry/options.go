package registry

import (
	"context"

	"github.com/pyrycode/pyrycode-relay/bus"
)

// Option adds to ClaimServer or RegisterPhone what a plain Conn cannot do.
type Option func(*options)

type options struct {
	ctx     context.Context
	recv    bus.Receiver
	link    *bus.Link
	evict   func(error)
	ping    func(context.Context) error
	version string
	remote  string
	noProbe bool
}

func optionsFor(conn Conn, opts []Option) options {
	o := options{
		ctx:   context.Background(),
		evict: func(error) { conn.Close() },
		ping:  func(context.Context) error { return nil },
	}
	for _, opt := range opts {
		opt(&o)
	}
	if o.recv == nil {
		o.recv = plainReceiver{conn}
	}
	return o
}

// WithContext bounds the call. Default: the time-outs of protocol.md alone.
func WithContext(ctx context.Context) Option { return func(o *options) { o.ctx = ctx } }

// WithReceiver hands frames to recv instead of conn.Send. Each is a whole
// envelope for a binary.
func WithReceiver(recv bus.Receiver) Option { return func(o *options) { o.recv = recv } }

// WithLink attaches a phone by a link that the caller made with Bus.NewLink, in
// order to send over it. Its receiver gets the phone's frames.
func WithLink(l *bus.Link) Option { return func(o *options) { o.link = l } }

// OnEvict is called, and must not block, when a binary has lost its server-id to
// another connection. Default: conn.Close.
func OnEvict(f func(error)) Option { return func(o *options) { o.evict = f } }

// WithPing proves that a binary is alive: f sends a ping now and returns nil when
// its pong came. Default: a connection counts as alive until it is released.
func WithPing(f func(context.Context) error) Option { return func(o *options) { o.ping = f } }

// WithVersion is what the binary says of its version.
func WithVersion(v string) Option { return func(o *options) { o.version = v } }

// WithRemote is the peer's address, for log lines.
func WithRemote(addr string) Option { return func(o *options) { o.remote = addr } }

// WithoutProbe makes a claim return ErrHeld where only a ping to the incumbent
// can decide.
func WithoutProbe() Option { return func(o *options) { o.noProbe = true } }

// plainReceiver hands frames to a connection that is nothing but a Conn.
type plainReceiver struct{ conn Conn }

func (p plainReceiver) Deliver(l *bus.Link, buf []byte) {
	frame := bus.Frame(buf)
	if err := p.conn.Send(frame); err != nil {
		l.Abort(bus.ErrLinkLost)
		return
	}
	l.Consumed(1, len(frame))
}

func (p plainReceiver) End(l *bus.Link, _ error) {
	if p.conn.ConnID() == l.ConnID() {
		p.conn.Close() // a phone; a binary outlives its phones
	}
}
