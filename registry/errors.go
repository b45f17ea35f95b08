package registry

import "errors"

var (
	// ErrNoServer is returned when nobody holds the server-id: a leader read said
	// so while this node's lease was fresh, or the holder itself, or the holder's
	// node is dead.
	ErrNoServer = errors.New("no server with that id")
	// ErrTooManyPhones is returned when the server-id has Config.MaxPhones.
	ErrTooManyPhones = errors.New("too many phones for server-id")
	// ErrServerIDConflict is returned when the incumbent answered a ping that was
	// sent after the claim began.
	ErrServerIDConflict = errors.New("server-id already claimed")
	// ErrHeld is returned by a claim WithoutProbe when only a probe can decide.
	ErrHeld = errors.New("server-id held")
	// ErrUndecided is returned when the KV or the holder's node did not answer in
	// time. Nothing follows from it.
	ErrUndecided = errors.New("undecided")
	// ErrNotReady is returned while this node cannot decide anything; Ready gives
	// the reason.
	ErrNotReady = errors.New("node not ready")
	// ErrDisplaced is what a binary's OnEvict is told when another connection took
	// its server-id.
	ErrDisplaced = errors.New("displaced by another connection")
	// ErrClosed is returned when the connection given has been released already.
	ErrClosed = errors.New("connection closed")
)

// What a CAS write can end with, besides success.
var (
	// errLost: another revision is there. Only this proves that a write failed.
	errLost = errors.New("lost the compare and swap")
	// errUnknown: it may have been written or not, or may yet be.
	errUnknown = errors.New("outcome unknown")
)

// errMisfit: a bucket is there that was made for other settings than this node has.
var errMisfit = errors.New("bucket of other settings")
