// Package gateway holds the sockets of one relay node: it answers upgrades,
// reads and writes WebSocket messages, and keeps every limit that a peer can
// feel. Who holds whom it asks the registry; how frames travel is the bus's.
//
// # The path of a frame
//
// From a phone to its binary, phone on node A, binary on node B:
//
//	phone → socket.next, conn.readMessage     A: the phone's read loop
//	      → phone.message                     one JSON value? splice the envelope around it
//	      → bus.Link.Send                     numbered; blocks while a window is on its way
//	      → NATS <B>.server.<token>           or a call, if A is B
//	      → binary.Deliver                    B: the dispatch goroutine; must not block
//	      → outbox → socket.write → binary    B: the outbox's writer, then Link.Consumed: credit
//
// From a binary to one of its phones:
//
//	binary → socket.next, conn.readMessage    B: the binary's read loop; never blocks on a phone
//	       → binary.handle                    find the frame's bounds in the envelope, and the link
//	       → bus.Link.Offer                   4 MiB may wait; over that this phone is closed
//	       → NATS <A>.phone.<token>           or a call
//	       → phone.Deliver                    A: the dispatch goroutine
//	       → outbox → socket.write → phone    A: the outbox's writer, then Link.Consumed
//
// No JSON value is ever built from a frame: its bytes are copied into an envelope,
// or cut out of one.
//
// # Guarantees
//
// What a phone sent is in the binary's envelopes bit for bit, in order, once, and
// the other way round; or the phone is closed. A close never overtakes a message
// (outbox). A ping is answered between two writes. What can be refused before the 101
// is refused there, because that is what makes a binary back off; every upgrade is
// answered within 5 s (registry: decideTimeout). A peer that is closed gets its code unless it takes
// nothing for the write time-out.
//
// Not guaranteed: that a frame which the socket took reached the peer. A peer whose
// connection breaks has lost the frames on their way, and its session with them:
// its phones are closed when the binary claims again (registry).
//
// # An upgrade
//
// serveClient and serveServer: limit per address (429) → cap (503) → headers (400)
// → handshake (the library: 426, 405, 400) → the registry's decision, made before
// the 101 goes out (upgrader.Hijack) and told as 503, or after the 101 as a close
// code. A binary whose claim needs a probe is upgraded and parked (binary.finishClaim).
//
// # Goroutines
//
// Per connection: the reader (Gateway.run), which ends last and awaits the others;
// the outbox's writer, while there is something to write, or to close; one for a claim
// that needs a probe. Per gateway: heartbeatLoop, while there is a connection. It writes
// the ping itself where nothing else is written and the socket takes it at once.
//
// # Memory
//
// A connection that rests has no buffers but the library's small ones. What a system call
// reads goes to a buffer of 64 KiB that the connection has until all of it has been handled,
// so also while Send blocks; what is written is put together in one of 32 KiB that belongs to
// the writer. A frame is in one buffer (bus.NewBuffer) from the reader that made it to the
// writer that frees it, if both peers are on this node; else to the acknowledgement.
//
// Deliver and End run on the bus's goroutines and do not block.
//
// # Locks
//
// Gateway.mu, binary.mu, control.mu, wire.mu and wire.out are leaves: nothing is called
// with one of them held that takes another. outbox.mu comes before control.mu. wire.out
// alone is held across I/O.
package gateway
