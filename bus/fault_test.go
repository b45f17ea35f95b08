package bus

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pyrycode/pyrycode-relay/testenv"
)

// faultLinks is how many links are in use while a fault lasts. Some of them end
// before it does.
const (
	faultLinks  = 20
	faultEnding = 5
)

// faultRig is two nodes beside a cluster of three real NATS servers, each node by a
// way of its own that can be cut and held.
type faultRig struct {
	*rig
	cluster *testenv.Cluster
	ways    [2]*way // of the phones' node, of the binaries'
}

// way is a node's connection to NATS: a proxy that leads to one server at a time.
type way struct {
	*testenv.Proxy
	cluster *testenv.Cluster
	server  int // that it leads to
}

// lead makes the way lead to another server from the next connection on.
func (w *way) lead(to int) {
	w.server = to
	w.SetTarget(strings.TrimPrefix(w.cluster.Servers[to].URL(), "nats://"))
}

func newFaultRig(t *testing.T, configure func(*Conn)) *faultRig {
	t.Helper()
	cluster, err := testenv.StartCluster(testenv.ClusterOptions{Memory: true, Proxied: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(cluster.Close)
	r := &faultRig{rig: &rig{T: t, session: NewSessionID()}, cluster: cluster}
	for i := range r.ways {
		proxy, err := testenv.NewProxy("")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(proxy.Close)
		r.ways[i] = &way{Proxy: proxy, cluster: cluster}
		r.ways[i].lead(i)
	}
	cfg := Config{} // as shipped
	r.phones, r.mover = startBusOver(t, "nats://"+r.ways[0].Addr(), cfg, spoken, configure)
	r.binaries, r.held = startBusOver(t, "nats://"+r.ways[1].Addr(), cfg, spoken, configure)
	r.waitConnected()
	return r
}

// NATS fails in every way that was measured to lose messages, under traffic in both
// directions: no session ends but those that are closed, nothing is lost, doubled or
// out of order, and no close overtakes a frame.
func TestFault_EverySessionLives(t *testing.T) {
	for name, f := range map[string]struct {
		configure func(*Conn)
		fault     func(r *faultRig, tr *crowd)
	}{
		"the phones' server is killed":   {fault: func(r *faultRig, _ *crowd) { r.killAndMove(0) }},
		"the binaries' server is killed": {fault: func(r *faultRig, _ *crowd) { r.killAndMove(1) }},
		"the server of both is killed": {fault: func(r *faultRig, tr *crowd) {
			r.ways[1].lead(r.ways[0].server)
			r.ways[1].Cut()
			r.waitConnected()
			tr.progress()
			r.killAndMove(0, 1)
		}},
		"each server is killed in turn": {fault: func(r *faultRig, tr *crowd) {
			for i := range r.cluster.Servers {
				for n, w := range r.ways {
					if w.server != i {
						continue
					}
					r.cluster.Kill(i)
					w.lead((i + 1 + n) % 3)
				}
				r.waitConnected()
				tr.progress()
				if r.cluster.Servers[i].Running() {
					continue // nobody was on it
				}
				if err := r.cluster.Restart(i); err != nil {
					r.Fatal(err)
				}
			}
		}},
		"lame duck": {fault: func(r *faultRig, _ *crowd) {
			i := r.ways[0].server
			r.ways[0].lead(2)
			r.cluster.Servers[i].LameDuck()
		}},
		"connections are cut again and again": {fault: func(r *faultRig, tr *crowd) {
			for i := range 6 {
				r.ways[i%2].Cut()
				tr.progress()
			}
		}},
		"one node's network is held for 8 s": {fault: func(r *faultRig, _ *crowd) {
			r.ways[0].Hold()
			wait(r.T, 8*time.Second)
			r.ways[0].Resume()
		}},
		"the servers cannot hear each other for 5 s": {fault: func(r *faultRig, _ *crowd) {
			i := r.ways[1].server
			r.cluster.Isolate(i)
			wait(r.T, 5*time.Second)
			r.cluster.Heal(i)
		}},
		"slow consumer": {
			configure: func(c *Conn) { c.pending = 1500 },
			fault: func(r *faultRig, tr *crowd) {
				for range 5 {
					tr.stall.Store(true) // the binaries' dispatch goroutine
					eventually(r.T, "NATS drops messages", func() bool { return !tr.stall.Load() })
					tr.progress()
				}
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newFaultRig(t, f.configure)
			tr := r.startCrowd()
			tr.progress()
			tr.endSome(func() { f.fault(r, tr) })
			tr.progress()
			tr.finish()
			t.Logf("%d of %d sessions lived, %d were closed meanwhile, %d frames", tr.lived(), faultLinks-faultEnding, faultEnding, tr.frames.Load())
			r.empty()
		})
	}
}

// killAndMove kills the servers that the ways lead to, and leads these to the third.
func (r *faultRig) killAndMove(ways ...int) {
	r.Helper()
	for _, i := range ways {
		dead := r.ways[i].server
		r.ways[i].lead(2)
		r.cluster.Kill(dead)
	}
	r.waitConnected()
}

// crowd is links with numbered frames on their way in both directions. The
// receivers check the numbers.
type crowd struct {
	r      *faultRig
	pairs  [faultLinks]*pair
	frames atomic.Int64
	stall  atomic.Bool // the next frame to a binary stops the dispatch goroutine once
	stop   chan struct{}
	wg     sync.WaitGroup
}

// pair is one link with both its ends.
type pair struct {
	links [2]*Link
	recv  [2]*receiver
	mu    [2]sync.Mutex // held while sending
	sent  [2]uint64
	ended bool // closed by the test
}

// crowdPace is the pause between two frames of one link and direction.
const crowdPace = 10 * time.Millisecond

func (r *faultRig) startCrowd() *crowd {
	r.Helper()
	tr := &crowd{r: r, stop: make(chan struct{})}
	for i := range tr.pairs {
		p := &pair{}
		tr.pairs[i] = p
		for side := range p.recv {
			check := checkNumber(r.T)
			p.recv[side] = &receiver{t: r.T, onTake: func(l *Link, b []byte) {
				tr.frames.Add(1)
				if side == 1 && tr.stall.CompareAndSwap(true, false) {
					wait(r.T, time.Second)
				}
				check(l, b)
			}}
		}
		p.links[0], p.links[1] = r.connect(p.recv[0], p.recv[1])
		for side, l := range p.links {
			tr.wg.Go(func() { tr.send(p, side, l) })
		}
	}
	return tr
}

func (tr *crowd) send(p *pair, side int, l *Link) {
	tick := time.NewTicker(crowdPace)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-tr.stop:
			return
		}
		if !p.send(side, l, 1) {
			return
		}
	}
}

// send sends the next n frames of one end. It returns false when that has ended.
func (p *pair) send(side int, l *Link, n int) bool {
	p.mu[side].Lock()
	defer p.mu[side].Unlock()
	return p.sendLocked(side, l, n)
}

func (p *pair) sendLocked(side int, l *Link, n int) bool {
	for range n {
		send := l.Send
		if l.side == binarySide {
			send = l.Offer
		}
		if send(numberedFrame(p.sent[side], 300)) != nil {
			return false
		}
		p.sent[side]++
	}
	return true
}

// endSome runs fault, and closes some links from either side meanwhile, each right
// behind a burst of frames, which must all come before the end.
func (tr *crowd) endSome(fault func()) {
	tr.r.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i, p := range tr.pairs[:faultEnding] {
			wait(tr.r.T, 100*time.Millisecond)
			side := i % 2
			p.mu[side].Lock() // nothing is sent between the burst and the close
			p.sendLocked(side, p.links[side], 100)
			p.links[side].Close(CodeError(4000 + i)) //nolint:gosec // small
			p.mu[side].Unlock()
		}
	}()
	fault()
	<-done
	for i, p := range tr.pairs[:faultEnding] {
		side := i % 2
		p.ended = true
		other := p.recv[1-side]
		if err := other.ended(); !errors.Is(err, CodeError(4000+i)) { //nolint:gosec // small
			tr.r.Errorf("link %d ended with %v, want %d", i, err, 4000+i)
		}
		p.mu[side].Lock()
		sent := p.sent[side]
		p.mu[side].Unlock()
		if got := other.count(); got != int(sent) { //nolint:gosec // small
			tr.r.Errorf("link %d: %d frames came before its end, want %d", i, got, sent)
		}
	}
}

// progress waits until what every link sends from now on arrives, in both
// directions.
func (tr *crowd) progress() {
	tr.r.Helper()
	for i, p := range tr.pairs {
		if i < faultEnding {
			continue
		}
		for side := range p.links {
			recv := p.recv[1-side]
			p.mu[side].Lock()
			want := int(p.sent[side]) + 2 //nolint:gosec // small
			p.mu[side].Unlock()
			eventually(tr.r.T, fmt.Sprintf("link %d goes on", i), func() bool {
				if ends := recv.told(); len(ends) > 0 {
					tr.r.Fatalf("link %d ended: %v", i, ends)
				}
				return recv.count() >= want
			})
		}
	}
}

// finish stops the traffic, checks that all of it has arrived, and closes.
func (tr *crowd) finish() {
	tr.r.Helper()
	close(tr.stop)
	tr.wg.Wait()
	for i, p := range tr.pairs[faultEnding:] {
		for side := range p.links {
			other := p.recv[1-side]
			eventually(tr.r.T, fmt.Sprintf("the last frame of link %d arrives", i), func() bool { return other.count() == int(p.sent[side]) }) //nolint:gosec // small
		}
	}
	for _, p := range tr.pairs[faultEnding:] {
		p.links[0].Close(CodeError(1000))
	}
}

// lived is how many links nothing but the test has ended.
func (tr *crowd) lived() (n int) {
	for _, p := range tr.pairs[faultEnding:] {
		if err := p.recv[1].ended(); errors.Is(err, CodeError(1000)) && len(p.recv[0].told()) == 0 {
			n++
		} else {
			tr.r.Errorf("a link ended with %v and %v, want 1000 at the binary's end only", p.recv[0].told(), err)
		}
	}
	return n
}

// A frame that its receiver has taken and not consumed is acknowledged soon, and no longer
// counted at its sender: neither waits for a PROBE.
func TestLink_SlowReceiver_AcknowledgesWithoutBeingAsked(t *testing.T) {
	r := newNATSRig(t)
	_, b := r.connect(r.slowReceiver(), r.newReceiver())
	for _, node := range []*Bus{r.phones, r.binaries} { // nobody looks at the clock for them any more
		eventually(t, "the links rest", func() bool { return strings.Contains(node.size(), "timed 0") })
	}
	start := time.Now()
	if err := b.Offer(frameBuf("x")); err != nil {
		t.Fatal(err)
	}
	eventually(t, "nothing is counted", func() bool { return r.binaries.Backlog() == 0 })
	if took := time.Since(start); took >= probeInterval {
		t.Errorf("that took %v: it was asked", took)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.st.acked != 1 || b.counted != 0 {
		t.Errorf("acknowledged up to %d, %d bytes counted, want 1 and none", b.st.acked, b.counted)
	}
}
