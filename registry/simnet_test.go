package registry

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/pyrycode/pyrycode-relay/bus"
)

// simNet carries messages between the simulated nodes, in virtual time and in the
// order of their publishing, while the path between two nodes is open.
type simNet struct {
	mu    sync.Mutex
	rng   *rand.Rand
	ports map[bus.NodeID]*simPort

	// The split of the NATS cluster, if there is one. Guarded by mu.
	split    bool
	minority map[bus.NodeID]bool // the nodes whose servers are on the smaller side
	closed   bool                // the routes are closed, not held: NATS says "no responders"
}

type portState int

const (
	portLinked portState = iota
	portHeld             // cut off without knowing it
	portAway             // cut off, and aware of it
	portDead
)

// simPort is one node's connection to NATS: a bus.Transport.
type simPort struct {
	net *simNet
	id  bus.NodeID

	// Guarded by net.mu.
	state     portState
	telling   bool      // it is back, and those who want to know of it have not all been told
	off       time.Time // since when it has no way to a majority; zero: it has
	subject   string    // up to its wildcard
	inbox     chan simMsg
	answers   map[string]chan *nats.Msg
	disturbed []func()
	requests  int
	deaf      map[bus.NodeID][]time.Time // when NATS said to a HELLO that nobody listens there
	unheard   map[bus.NodeID][]time.Time // when it said so to anything
}

type simMsg struct {
	from *simPort
	due  time.Time
	*nats.Msg
}

func newSimNet(seed uint64) *simNet {
	return &simNet{rng: rand.New(rand.NewPCG(seed, 0)), ports: make(map[bus.NodeID]*simPort)} //nolint:gosec // a simulation's
}

func (n *simNet) port(id bus.NodeID) *simPort {
	p := &simPort{net: n, id: id, answers: make(map[string]chan *nats.Msg), deaf: make(map[bus.NodeID][]time.Time), unheard: make(map[bus.NodeID][]time.Time)}
	n.mu.Lock()
	n.ports[id] = p
	n.mu.Unlock()
	return p
}

// upTo draws a duration.
func (n *simNet) upTo(d time.Duration) time.Duration {
	n.mu.Lock()
	defer n.mu.Unlock()
	return time.Duration(n.rng.Int64N(int64(d)))
}

// chance draws true with probability percent/100.
func (n *simNet) chance(percent int) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.rng.IntN(100) < percent
}

// openLocked reports whether messages pass from p to q now.
func (n *simNet) openLocked(p, q *simPort) bool {
	return p.state == portLinked && q.state == portLinked && (!n.split || n.minority[p.id] == n.minority[q.id])
}

// changedLocked notes who is cut off now.
func (n *simNet) changedLocked() {
	for _, p := range n.ports {
		switch off := p.state != portLinked || n.split && n.minority[p.id]; {
		case !off:
			p.off = time.Time{}
		case p.off.IsZero():
			p.off = time.Now()
		}
	}
}

// setState changes p's connection, and tells its bus when it is back.
func (p *simPort) setState(s portState) {
	p.net.mu.Lock()
	before := p.state
	if before == portDead {
		s = portDead
	}
	p.state = s
	p.net.changedLocked()
	var tell []func()
	if s == portLinked && before != portLinked {
		tell = p.disturbed
	}
	p.telling = len(tell) > 0
	p.net.mu.Unlock()
	for _, f := range tell {
		f()
	}
	p.net.mu.Lock()
	p.telling = false
	p.net.mu.Unlock()
}

func (p *simPort) Connected() bool {
	p.net.mu.Lock()
	defer p.net.mu.Unlock()
	return !p.telling && (p.state == portLinked || p.state == portHeld)
}

func (p *simPort) OnDisturbed(f func()) {
	p.net.mu.Lock()
	defer p.net.mu.Unlock()
	p.disturbed = append(p.disturbed, f)
}

// simDelay is how long a message travels.
const simDelay = time.Millisecond

func (p *simPort) Subscribe(subject string, f func(*nats.Msg)) (stop func(), err error) {
	inbox, done := make(chan simMsg, 10_000), make(chan struct{})
	p.net.mu.Lock()
	p.subject, p.inbox = strings.TrimSuffix(subject, ">"), inbox
	p.net.mu.Unlock()
	go func() {
		defer close(done)
		for m := range inbox {
			time.Sleep(time.Until(m.due)) //nolint:forbidigo // virtual time
			p.net.mu.Lock()
			open := p.net.openLocked(m.from, p)
			p.net.mu.Unlock()
			if open {
				f(m.Msg)
			}
		}
	}()
	return func() {
		p.net.mu.Lock()
		p.inbox = nil
		p.net.mu.Unlock()
		close(inbox)
		<-done
	}, nil
}

var errSimLost = errors.New("simulation: connection lost")

func (p *simPort) Publish(subject, replyTo string, data []byte) error {
	data = bytes.Clone(data)
	p.net.mu.Lock()
	defer p.net.mu.Unlock()
	if p.state == portAway || p.state == portDead {
		return errSimLost
	}
	if rest, ok := strings.CutPrefix(subject, "answer."); ok {
		p.answerLocked(rest, data)
		return nil
	}
	if to := p.net.reader(subject); to != nil && p.net.openLocked(p, to) {
		to.inbox <- simMsg{p, time.Now().Add(simDelay), &nats.Msg{Subject: subject, Reply: replyTo, Data: data}}
	}
	return nil
}

// answerLocked brings an answer to whoever asked; rest is its node's id and a number.
func (p *simPort) answerLocked(rest string, data []byte) {
	i := strings.LastIndexByte(rest, '.')
	to := p.net.ports[bus.NodeID(rest[:i])]
	c := to.answers[rest[i+1:]]
	delete(to.answers, rest[i+1:])
	if c != nil && p.net.openLocked(p, to) {
		c <- &nats.Msg{Data: data}
	}
}

// reader returns the port that subscribes to subject.
func (n *simNet) reader(subject string) *simPort {
	for _, p := range n.ports {
		if p.inbox != nil && strings.HasPrefix(subject, p.subject) {
			return p
		}
	}
	return nil
}

// deafTo counts how often NATS has said to p since t that nobody listens at node.
func (p *simPort) deafTo(node bus.NodeID, t time.Time) (n int) {
	p.net.mu.Lock()
	defer p.net.mu.Unlock()
	for _, heard := range p.deaf[node] {
		if !heard.Before(t) {
			n++
		}
	}
	return n
}

// silence is how long ago NATS said for the first time since t, to p or to q, that
// nobody listens at the other one; 0: never.
func (p *simPort) silence(q *simPort, t time.Time) (d time.Duration) {
	p.net.mu.Lock()
	defer p.net.mu.Unlock()
	for _, heard := range slices.Concat(p.unheard[q.id], q.unheard[p.id]) {
		if !heard.Before(t) {
			d = max(d, time.Since(heard))
		}
	}
	return d
}

// nodeOf is the node that reads subject: pyrycode.relay.v1.<node>.…
func nodeOf(subject string) bus.NodeID { return bus.NodeID(strings.Split(subject, ".")[3]) }

func (p *simPort) Request(ctx context.Context, subject string, data []byte) (*nats.Msg, error) {
	p.net.mu.Lock()
	p.requests++
	number, answer := strconv.Itoa(p.requests), make(chan *nats.Msg, 1)
	p.answers[number] = answer
	to := p.net.reader(subject)
	known := to != nil && (to.state == portLinked || to.state == portHeld) &&
		(!p.net.split || !p.net.closed || p.net.minority[p.id] == p.net.minority[to.id])
	deaf := p.state == portLinked && !known
	if node := nodeOf(subject); deaf {
		p.unheard[node] = append(p.unheard[node], time.Now())
		if strings.HasSuffix(subject, ".node") {
			p.deaf[node] = append(p.deaf[node], time.Now())
		}
	}
	p.net.mu.Unlock()
	time.Sleep(simDelay) //nolint:forbidigo // virtual time
	if deaf {
		return nil, bus.ErrNoResponders
	}
	if err := p.Publish(subject, "answer."+string(p.id)+"."+number, data); err != nil {
		return nil, err
	}
	select {
	case m := <-answer:
		time.Sleep(simDelay) //nolint:forbidigo // virtual time
		return m, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}
