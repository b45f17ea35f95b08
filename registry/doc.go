// Package registry says who holds whom: which node has the binary of a server-id,
// over the whole cluster, and which phones are attached to it. Nodes agree through
// two NATS KV buckets; what a node has connected itself is in its tables. The
// package knows no WebSocket and no close code: it returns the errors of errors.go.
//
// # Guarantees and their bounds
//
//   - One current session per server-id. It is the one that the KV names, and only
//     a compare-and-swap write changes that. Every link is bound to a session, and a
//     holder refuses any session that is not its own. A holder that was superseded
//     closes its binary (OnEvict with ErrDisplaced) and its phones when it is told,
//     or by a sweep: one begins as soon as its NATS connection is back, or 5 s after its
//     path to the KV is.
//   - ErrServerIDConflict is returned only after the incumbent answered a ping that
//     was sent after the claim began. Claims that gather for probeEvery share one.
//   - ErrNoServer is returned only if a leader read while this node's lease was fresh
//     found no entry, or the holder's node itself does not know the session, or that
//     node is dead: its lease is gone (and this node's has been unbroken for a whole
//     TTL), or nobody responded for 4 s without a break, and the KV took a renewal of
//     this node's lease that began meanwhile (on the side of a split that cannot decide,
//     everybody is silent). The same ends links to a node.
//   - From the instant that ClaimServer returned nil, RegisterPhone finds the binary
//     on every node: the session is in the tables before it is in the KV, and a
//     replica that lags is asked no further than for a hint. A node whose lease was
//     missing, or whose NATS connection was disturbed, asks the leader until a sweep
//     that began after that is done: its own tables may be old.
//   - Connected means registered: whatever happens to the KV, a binary that is
//     connected is there again within one sweep of the KV answering.
//   - A node whose LeaseTTL is not that of the nodes bucket decides nothing: it would go
//     by a lease that the others have let go.
//   - MaxPhones holds over the cluster, because the holder has the one attach table.
//   - A claim without a probe, and a look-up, take 4.5 s at most; a claim with a probe
//     10 s (parkTimeout), or ProbeTimeout and one KV call if that is longer.
//
// Not guaranteed:
//
//   - While the cluster is split, a phone on the side that is cut off may reach the
//     old connection of its binary, until that node's sweep sees the new one.
//   - A node on the side of an isolated stream leader may read old entries, as long
//     as its lease counts as fresh (three quarters of the TTL): it may say
//     ErrNoServer of a server-id that was claimed on the other side meanwhile.
//   - Where the KV loses the entry of a connected binary, a claim on another node goes
//     over nothing, without a ping, until the holder's next sweep. On the holder's own
//     node its table counts as the entry.
//   - A grace ends within a second of its time, later if the KV has no leader.
//   - Entry.Since and Version are for people; nothing is decided by them.
//   - The binary of a node that died is not probed: it has no connection.
//
// # A holding
//
// A holding is one binary connection of this node. sessions has it from its claim to
// its end, current from install to its end.
//
//	state     in the KV         claim by another           phone         left by
//	claiming  nothing, or held  ErrHeld, or a ping         attaches      install → held; claim fails → over
//	held      held, no TTL      ErrHeld, or a ping         attaches      ReleaseServer → grace; another session in the KV → over
//	grace     grace, with TTL   succeeds at once           attaches and  another session in the KV → over; time is up → over
//	                                                       its frames wait
//	over      nothing of it     -                          is refused    -
//
// A holding that ends tells its phones why: ErrReclaimed (another session),
// ErrGraceOver, ErrNodeGone (Stop), ErrNoSession (the claim failed). Phones that came
// in the grace have no session to lose: instead of ErrReclaimed they get ErrMoved,
// and their node attaches them to the new session with what they have sent.
//
// # Who writes which key, and what if the write is lost, late or doubled
//
// All writes are CAS on the key's revision. "Lost" is not applied, "late" is applied
// after its writer took it for lost, "doubled" is applied once and tried again.
//
//	nodes/<node>: the lease, by that node alone, every LeaseTTL/5 and when another one
//	falls silent; ended by the bucket's TTL or by Stop
//		lost     tried again after 500 ms; after ¾ TTL the node decides nothing
//		late     the next write loses, reads what is there, and goes over it
//		doubled  as late
//	presence/<token> = held: by ClaimServer over nothing (if this node does not hold
//	it), over grace, over the entry of a dead node or of an incumbent without a pong; by
//	the sweep over nothing
//		lost     tried again until time is up, then ErrUndecided
//		late     found by reading back, the session is its own: the claim succeeds,
//		         unless this node holds a later one; after ErrUndecided the sweep
//		         looks for it for 30 s and removes it (orphans). Until then its node refuses phones and is no incumbent
//		doubled  the second one loses, and finds the first
//	presence/<token> = grace, with TTL: by ReleaseServer over the own entry; by one of
//	the other nodes over the entry of a node whose lease is gone (the one with the
//	lowest id at once, the others a sweep later)
//		lost     the sweep writes it again; grace over before that: the entry is an
//		         orphan, and removed
//		late     over another session's entry it loses; over the own one it only
//		         starts the TTL again
//		doubled  as late
//	presence/<token> removed: by the sweep, of an orphan, if the session is its own
//		lost     at the next sweep
//		late     loses to whoever claimed meanwhile
//
// errLost (wrong last sequence) is the only proof that a write failed. Everything
// else, error 10164 and time-outs included, is errUnknown: read back from the leader
// and compare the session. (docs/adr/0003, 0004)
//
// A revision is never used twice, not even by a bucket that was lost and made anew.
// The sweep compares with a replica that has every write that the leader had when it
// began. While the bucket is what it was when everything agreed (version), it compares
// only what is not written yet or was never compared, and everything once in ten minutes.
//
// A sweep reads in pages. What dead nodes held is found by the list of all keys, in the same
// pages, over as many sweeps as that takes: a dead node writes nothing meanwhile.
//
// A claim that finds an entry in its way looks first whether nobody is behind that any
// more, by any replica: the write that follows expects the revision it saw. While that is
// so, claims look before they write. For everything else they ask the leader. Claims that
// come before the question whether a node is dead has begun share it. Between two steps a
// claim yields to whatever else can run (bus.Yield).
//
// # Goroutines
//
// Start begins three, and Stop waits for them: leaseLoop (keeps the lease, makes the
// buckets), sweepLoop (compares holdings with the KV, removes orphans, ends what dead
// nodes held; up to sweepWorkers more while it does), watchLoop (asks the nodes that
// links lead to; one more for each of these). Each Taken and each Moved has one of its
// own until it is settled; a grace has a timer. Calls run on their caller's.
//
// # Locks
//
// Registry.mu comes last: it is never held across a call of bus, of a connection or of
// the KV. bus calls Open and Ended with no link's mu held; they take Registry.mu
// only. lease.mu is independent of it, and held across nothing but Bus.Connected; the
// callback that the transport is given (OnDisturbed) takes it and does not block.
package registry
