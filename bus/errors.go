package bus

import (
	"errors"
	"fmt"
)

// How a link ends, and why an OPEN is refused. Each travels between gateways as
// one Reason byte (frame.go); Receiver.End and Open return the same values on
// either side.
var (
	// ErrLinkLost is returned when the path could not be kept free of gaps:
	// nothing was acknowledged for Config.LinkTimeout (for twice as long, if frames
	// of the other side came meanwhile), or the other side broke
	// the link protocol.
	ErrLinkLost = errors.New("link lost")
	// ErrNodeGone is returned when the node at the other end has died.
	ErrNodeGone = errors.New("node gone")
	// ErrReclaimed is returned when another connection took the server-id.
	ErrReclaimed = errors.New("server-id reclaimed")
	// ErrMoved is returned when a link that never carried a frame must be opened
	// again, because the session it waited for has been replaced.
	ErrMoved = errors.New("session moved")
	// ErrAway is returned when a phone sent a frame while its binary was gone.
	ErrAway = errors.New("binary is away")
	// ErrGraceOver is returned when the binary did not come back in time.
	ErrGraceOver = errors.New("grace window over")
	// ErrBacklog is returned when more than Config.Backlog waits for one phone.
	ErrBacklog = errors.New("backlog full")
	// ErrNoSession is returned when the node asked does not hold the session.
	ErrNoSession = errors.New("no such session")
	// ErrTooManyPhones is returned when the session has no room for a phone.
	ErrTooManyPhones = errors.New("too many phones")
	// ErrVersion is returned when two nodes have no version of the link protocol in
	// common: their releases are too far apart.
	ErrVersion = errors.New("no common version of the link protocol")
	// ErrClosed is returned by calls on a link that has ended or is ending.
	ErrClosed = errors.New("link closed")
	// ErrNoResponders is returned when nobody listens on a node's subject: the
	// node is dead, or is changing its NATS server right now.
	ErrNoResponders = errors.New("no responders")
)

// CodeError ends a link with a WebSocket close code that a peer chose. The bus
// carries it and gives it no meaning.
type CodeError uint16

func (e CodeError) Error() string { return fmt.Sprintf("closed with code %d", uint16(e)) }

// errViolation is returned when the other end of a link broke the protocol.
var errViolation = errors.New("link protocol violation")
