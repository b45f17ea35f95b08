package gateway

import (
	"errors"

	"github.com/pyrycode/pyrycode-relay/bus"
	"github.com/pyrycode/pyrycode-relay/registry"
)

// closeCode is a WebSocket close code with its constant reason. The table is the
// only place where codes exist.                    (protocol.md: Close codes)
type closeCode struct {
	code   int
	reason string
	now    bool // do not wait for what is queued: the peer does not take it anyway
}

var (
	codeShutdown    = closeCode{code: 1001, reason: "shutting down"}
	codeNotJSON     = closeCode{code: 1007, reason: "frame is not valid JSON"}
	codeTooBig      = closeCode{code: 1009}
	codeProtocol    = closeCode{code: 1002}
	codeHeartbeat   = closeCode{code: 1011, reason: "heartbeat timeout"}
	codeDisplaced   = codeHeartbeat
	codeTooSlow     = closeCode{code: 1011, reason: "heartbeat timeout", now: true} // a binary that takes too little
	codeBacklog     = closeCode{code: 1011, reason: "phone backlog full", now: true}
	codeLinkLost    = closeCode{code: 1011, reason: "relay link lost"}
	codeUndecided   = closeCode{code: 1011, reason: "claim undecided"}
	codeNoServer    = closeCode{code: 4404, reason: "no server with that id"}
	codeReclaimed   = closeCode{code: 4404, reason: "binary reclaimed server-id"}
	codeAway        = closeCode{code: 4404, reason: "binary is away"}
	codeGatewayGone = closeCode{code: 4404, reason: "binary's gateway is gone"}
	codeConflict    = closeCode{code: 4409, reason: "server-id already claimed"}
	codeTooMany     = closeCode{code: 4429, reason: "too many phones for server-id"}
	codeGraceOver   = closeCode{code: 1000}
)

// Codes that only say how a connection ended.
const (
	statusNone      = 1005 // a close frame without a status; as a directive: send such a one
	statusGoingAway = 1001 // what a close notice says when nobody said anything
)

// codeFor maps what the rooms below return to what a peer is closed with. Every
// sentinel of theirs that can end a connection is here.
func codeFor(err error) closeCode {
	var directive bus.CodeError
	if errors.As(err, &directive) {
		return closeCode{code: int(directive)}
	}
	for _, row := range codeTable {
		if errors.Is(err, row.err) {
			return row.code
		}
	}
	return codeLinkLost
}

var codeTable = []struct {
	err  error
	code closeCode
}{
	{bus.ErrLinkLost, codeLinkLost},
	{bus.ErrNodeGone, codeGatewayGone},
	{bus.ErrReclaimed, codeReclaimed},
	{bus.ErrMoved, codeReclaimed}, // its frames had a session already, so it cannot move
	{bus.ErrAway, codeAway},
	{bus.ErrGraceOver, codeGraceOver},
	{bus.ErrBacklog, codeBacklog},
	{bus.ErrNoSession, codeNoServer},
	{bus.ErrTooManyPhones, codeTooMany},
	{bus.ErrClosed, codeLinkLost},
	{bus.ErrNoResponders, codeLinkLost},
	{bus.ErrVersion, codeLinkLost},
	{registry.ErrNoServer, codeNoServer},
	{registry.ErrTooManyPhones, codeTooMany},
	{registry.ErrServerIDConflict, codeConflict},
	{registry.ErrDisplaced, codeDisplaced},
	{registry.ErrUndecided, codeUndecided},
	{registry.ErrNotReady, codeUndecided},
	{registry.ErrHeld, codeUndecided},
	{registry.ErrClosed, codeLinkLost},
}

// noticeCode is what a binary is told about a phone whose link ended with err.
func noticeCode(err error) int {
	if errors.Is(err, bus.ErrNodeGone) {
		return statusGoingAway // the phone's gateway died, nobody knows how it ended
	}
	return codeFor(err).code
}

// sendable reports whether a code may be in a close frame. For any other one the
// socket is dropped.                        (protocol.md: The routing envelope)
func sendable(code int) bool {
	switch {
	case code == 1004, code == 1006, code < 1000, 1015 <= code && code <= 2999, code > 4999:
		return false
	}
	return true
}
