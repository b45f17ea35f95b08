// Package bus carries frames between nodes. A gateway holds sockets, the registry
// says who holds whom, the bus moves frames: it has the NATS connection (external
// or embedded), the names that are safe on it, the messages between nodes, and
// links. A Link is the path of one phone connection: the phone's end on the node
// that holds the phone, the binary's end on the node that holds the binary, which
// may be the same. It is the same code then, and needs no NATS.
//
// Start reading at frame.go, the one table of what nodes say to each other;
// linkstate.go is a link's end without goroutines, clock or NATS.
//
// # Guarantee
//
// In each direction of a link, what Deliver gets is exactly what Send or Offer
// took, in order, none missing, none twice, byte for byte, up to the end of the
// link. The end is visible: whoever did not close the link itself is told by End,
// once, after the last frame. Close comes after every frame before it. A message of
// another session, or of an earlier attempt to open, finds no link.
//
// A link survives what NATS loses: a cut connection, a restarted server, a slow
// consumer. Unacknowledged data is sent again when the other end reports a gap,
// when it does not answer for a second, and when NATS is back. After
// Config.LinkTimeout without progress both ends are lost, visibly; an end that takes
// frames of the other one waits up to twice as long, for the acknowledgement that is
// behind them. A link with nothing under way outlives an outage of any length.
//
// # Bound
//
// Each direction of a link holds at most Config.Window and one frame on its way
// to a receiver that does not consume. Send blocks there, for 15 s at most, and then
// ends the link; Offer goes on to Config.Backlog, and then ends it, or to a window
// while all links together have more than Config.TotalBacklog waiting. A phone's frames
// that wait for a binary that is away are bounded like those of Send, and by 8 s. What is
// counted is the length of frames; the buffers that hold them may be twice as large.
//
// # States of a link
//
//	state      frames queue  go out  ends by
//	unbound    yes           no      Close, Fail; Open → opening
//	opening    yes           no      accepted → open or held; refused, no answer → unbound
//	held       yes           no      8 s after the first frame (ErrAway); the other side's ErrMoved → unbound
//	open       yes           yes     Close, Abort, Fail, the other side, LinkTimeout
//	closing    no            yes     its CLOSE is acknowledged, or LinkTimeout → resetting
//	resetting  no            no      its RESET is answered, or a minute
//	over       no            no      off the tables
//
// held is a phone's end whose binary is in its grace: it has no credit. Only an
// end that has sent and received nothing may go back to unbound. The application
// is told at the first step out of open or held; closing and resetting are the
// bus's own business with the other node.
//
// # What is not guaranteed
//
//   - That a frame which Send took arrives: the link may end first. Frames that
//     were not consumed when it ends are in doubt; the receiver may have them.
//   - That both ends give the same reason. One that hears nothing says ErrLinkLost.
//   - That both ends end at the same time. An end tells the other for a minute after
//     LinkTimeout. If it could not, an idle other end notices at its next frame, or
//     when its own NATS connection comes back, or when the registry says EndNode.
//   - That a Deliver under way is over when Close or Fail returns.
//   - Taken arrives or does not.
//   - Nothing protects against a hostile node: whoever may publish on the subjects
//     of the relay is trusted. Lies about acks and credit end the one link.
//
// # Goroutines
//
//   - dispatch: NATS' callback goroutine of the bus's one subscription. It takes
//     every message from other nodes in order, looks up and hands over. It calls
//     Handler.Open, Moved, Ended, Taken and the Receivers; none of them may block.
//   - pumpLoop: publishes for all links, looks at the clock while one waits for
//     something, and calls End and Ended where time ran out.
//   - one for each CHALLENGE that is being answered, in Handler.Alive.
//
// Close ends all three and waits for them. Between two ends on one node, frames are
// delivered on the goroutine that sent them or that made room for them.
//
// # Lock order
//
// Link.mu, then Bus.mu or Bus.pumpMu; never those two together, never two links'
// mu at once. Handler, Receivers and NATS are called without any of them.
package bus
