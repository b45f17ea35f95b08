package registry

import (
	"slices"
	"time"

	"github.com/pyrycode/pyrycode-relay/bus"
)

// fault has begin happen now, and end after d.
func (w *simWorld) fault(s step, d time.Duration, nodes []*simNode, smaller bool, begin, end func()) {
	w.mu.Lock()
	w.noteLocked("%s node %d for %s %v %v", s.Do, s.Node, d, s.A, s.B)
	w.faults++
	now := time.Now()
	for _, n := range nodes {
		n.cuts = append(n.cuts, interval{from: now})
		if smaller {
			n.less = append(n.less, interval{from: now})
		}
	}
	w.mu.Unlock()
	begin()
	w.spawn(func() {
		w.sleep(d)
		end()
		w.mu.Lock()
		defer w.mu.Unlock()
		w.noteLocked("end of %s node %d", s.Do, s.Node)
		w.faults--
		w.calmAt = time.Now()
		for _, n := range nodes {
			n.cuts = closed(n.cuts, now)
			n.less = closed(n.less, now)
		}
	})
}

// closed ends the interval of list that began at from.
func closed(list []interval, from time.Time) []interval {
	for i := range list {
		if list[i].from.Equal(from) && list[i].to.IsZero() {
			list[i].to = time.Now()
			break
		}
	}
	return list
}

func (w *simWorld) do(s step) {
	w.mu.Lock()
	n := w.nodes[s.Node]
	everybody := slices.Clone(w.nodes[:])
	w.mu.Unlock()
	serverID := simIDs[s.ID]
	switch s.Do {
	case "claim":
		w.spawn(func() { _, _ = w.claim(n, serverID) })
	case "dial":
		w.spawn(func() { w.dial(n, serverID) })
	case "dial once ready": // of many phones one is there at once
		w.spawn(func() {
			for end := time.Now().Add(30 * time.Second); n.Ready() != nil && time.Now().Before(end); {
				w.sleep(2 * simDelay)
			}
			w.dial(n, serverID)
		})
	case "release":
		if b := w.connected(serverID, s.A); b != nil {
			w.leave(b, "release")
		}
	case "mute":
		if b := w.connected(serverID, s.A); b != nil {
			w.mu.Lock()
			b.mute, b.muted = !b.mute, time.Now()
			w.noteLocked("mute %s: %v", b.id, b.mute)
			w.mu.Unlock()
		}
	case "hang up":
		if p := w.takePhone(); p != nil {
			w.spawn(func() { p.at.UnregisterPhone(p.serverID, p.id) })
		}
	case "split":
		w.split(s, n)
	case "move":
		w.move(s, n)
	case "held": // noticed after two pings, at most
		w.fault(s, s.For, []*simNode{n}, false,
			func() {
				n.port.setState(portHeld)
				w.spawn(func() {
					w.sleep(min(s.For, 6*time.Second))
					n.port.setStateIf(portHeld, portAway)
				})
			},
			func() { n.port.setState(portLinked) })
	case "away":
		w.fault(s, s.For/8, []*simNode{n}, false,
			func() { n.port.setState(portAway) }, func() { n.port.setState(portLinked) })
	case "election":
		w.fault(s, s.For/4, nil, false, func() { w.stall(s.For / 4) }, func() {})
	case "rough":
		w.fault(s, s.For, nil, false,
			func() { w.setRough(20) }, func() { w.setRough(0) })
	case "nats down":
		w.fault(s, s.For, everybody, false,
			func() {
				w.stall(s.For)
				w.setDown(true)
			},
			func() {
				if s.A { // it had its store in memory
					w.nodesKV.wipe()
					w.holdKV.wipe()
				}
				w.setDown(false)
				for _, n := range everybody { // not all at once
					w.fault(step{Do: "late", Node: s.Node}, w.net.upTo(3*time.Second), []*simNode{n}, false,
						func() { n.port.setState(portAway) }, func() { n.port.setState(portLinked) })
					w.spawn(func() { // and those who lost their connections meanwhile are there at once
						w.sleep(w.net.upTo(3 * time.Second))
						w.dial(n, serverID)
						_, _ = w.claim(n, serverID)
					})
				}
			})
	case "wipe":
		w.fault(s, 0, nil, false, func() {
			if s.A || s.B {
				w.holdKV.wipe()
			}
			if !s.A || !s.B {
				w.nodesKV.wipe()
			}
		}, func() {})
	case "kill":
		w.kill(s, n)
	}
}

func (p *simPort) setStateIf(is, to portState) {
	p.net.mu.Lock()
	defer p.net.mu.Unlock()
	if p.state == is {
		p.state = to
	}
}

// setDown cuts all nodes off, those that start meanwhile too, or lets them back.
func (w *simWorld) setDown(down bool) {
	w.mu.Lock()
	w.down = down
	nodes := slices.Clone(w.all)
	w.mu.Unlock()
	state := portLinked
	if down {
		state = portAway
	}
	for _, n := range nodes {
		n.port.setState(state)
	}
}

func (w *simWorld) stall(d time.Duration) {
	w.cluster.mu.Lock()
	defer w.cluster.mu.Unlock()
	w.cluster.stalls = append(w.cluster.stalls, interval{time.Now(), time.Now().Add(d)})
}

func (w *simWorld) setRough(percent int) {
	w.cluster.mu.Lock()
	defer w.cluster.mu.Unlock()
	w.cluster.rough = percent
}

// split puts n's server on a side of its own. With A, the leader is there too.
func (w *simWorld) split(s step, n *simNode) {
	w.net.mu.Lock()
	already := w.net.split
	w.net.mu.Unlock()
	if already {
		return
	}
	w.fault(s, s.For, []*simNode{n}, true,
		func() {
			w.cluster.mu.Lock()
			w.cluster.splitAt = time.Now()
			if s.A {
				w.cluster.oldLeads = time.Now().Add(12500*time.Millisecond + w.net.upTo(20*time.Second))
			}
			w.cluster.mu.Unlock()
			if s.A {
				w.stall(min(s.For, 4*time.Second+w.net.upTo(5*time.Second)))
			}
			w.net.mu.Lock()
			w.net.split, w.net.closed = true, s.B
			w.net.minority = map[bus.NodeID]bool{n.port.id: true}
			w.net.changedLocked()
			w.net.mu.Unlock()
		},
		func() {
			w.cluster.mu.Lock()
			w.cluster.healedAt, w.cluster.oldLeads = time.Now(), time.Time{}
			w.cluster.mu.Unlock()
			w.net.mu.Lock()
			w.net.split = false
			w.net.changedLocked()
			w.net.mu.Unlock()
			n.port.disturb()
		})
}

// move has n change to a server of the smaller side, which knows less than n does,
// until the split heals.
func (w *simWorld) move(s step, n *simNode) {
	w.net.mu.Lock()
	split := w.net.split && !w.net.minority[n.port.id]
	w.net.mu.Unlock()
	if !split {
		return
	}
	w.fault(s, s.For, []*simNode{n}, true,
		func() {
			w.net.mu.Lock()
			w.net.minority[n.port.id] = true
			w.net.changedLocked()
			w.net.mu.Unlock()
			n.port.disturb()
		},
		func() {
			w.net.mu.Lock()
			delete(w.net.minority, n.port.id)
			w.net.changedLocked()
			w.net.mu.Unlock()
			n.port.disturb()
		})
}

func (p *simPort) disturb() {
	p.net.mu.Lock()
	tell := p.disturbed
	p.net.mu.Unlock()
	for _, f := range tell {
		f()
	}
}

// kill ends n as SIGKILL would, and starts another in its place.
func (w *simWorld) kill(s step, n *simNode) {
	n.port.setState(portDead)
	w.mu.Lock()
	n.dead = true
	w.noteLocked("kill %s", n.port.id)
	for _, b := range w.binaries {
		if b.at == n && b.gone.IsZero() {
			b.gone = time.Now()
		}
	}
	w.mu.Unlock()
	w.sleep(s.For / 100)
	w.startNode(s.Node)
}
