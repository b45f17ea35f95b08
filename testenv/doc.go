// Package testenv is the world around a relay, for tests and for anyone who
// integrates with one: NATS servers, faults between processes, and the two
// peers of the wire contract.
//
//   - StartServer and StartCluster run real nats-servers with JetStream in this
//     process. They can be stopped, killed, restarted, put into lame duck mode
//     and, behind proxies, isolated: their bytes are held and nothing is closed.
//   - Proxy is a TCP proxy that holds, delays, resets and refuses.
//   - DialPhone and DialBinary are real peers, built on the WebSocket library of
//     the shipped clients. They know the headers and the routing envelope and
//     nothing else of a relay.
//   - Listener is a network in memory that works inside testing/synctest bubbles.
//   - Detector fails a test binary in which a part of a token or of a frame turns
//     up in a log, a metric, or in subjects, headers and KV values of its servers.
//   - VerifyNoLeaks fails a test binary that leaves goroutines behind.
//
// Everything listens on 127.0.0.1 only. The package imports no other room of
// the project and no package testing, so programs may use the peers too.
//
// # Guarantee and bound
//
// When Hold, Isolate or Pause returns, not one more byte passes until Resume,
// Heal or Unpause. What was held is then delivered in order, unless an end gave
// up on its connection meanwhile. A Proxy keeps at most 32 MiB per direction of
// a connection in its own memory; a peer's queue of received messages is
// unbounded, because a consumer that is slow must not look like a phone that is
// slow. A killed server runs in this process still, so its files are closed
// properly: power loss is not simulated.
//
// # Goroutines
//
// A Proxy has one goroutine that accepts, and five per connection; Close waits
// for all of them. A peer has one that reads (and those of its library); Close
// and Drop wait for it. A Listener has none.
//
// # Lock order
//
// Server.mu, link.mu, Proxy.mu, valve.mu, from the outside in. line.writing and
// socket.reading are held during I/O, and only ever waited for without any of
// the others. Of a detector: the mutex of a Writer, then Detector.mu; a Writer is
// used with none of the others held, and Detector.mu is a leaf.
package testenv
