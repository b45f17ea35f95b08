package bus

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/pyrycode/pyrycode-relay/testenv"
)

const patience = 20 * time.Second // of a test for what must happen; a loaded machine needs seconds

// receiver is a socket: it keeps what it is given, and checks that it is called
// as Receiver promises.
type receiver struct {
	t    *testing.T
	hold bool // consume only when told; static

	mu     sync.Mutex
	frames [][]byte
	eaten  int // frames that were consumed
	ends   []error
	in     bool
	onTake func(l *Link, p []byte) // called in Deliver
}

func (r *receiver) Deliver(l *Link, buf []byte) {
	p := Frame(buf)
	r.enter()
	r.mu.Lock()
	if len(r.ends) > 0 {
		r.t.Errorf("Deliver after End(%v)", r.ends[0])
	}
	r.frames = append(r.frames, p)
	onTake := r.onTake
	if !r.hold {
		r.eaten++
	}
	r.mu.Unlock()
	if onTake != nil {
		onTake(l, p)
	}
	r.leave()
	if !r.hold {
		l.Consumed(1, len(p))
	}
}

func (r *receiver) End(l *Link, err error) {
	r.enter()
	if h, ok := l.bus.handler.(*holder); ok && l.side == binarySide && !h.knowsEnd(l) {
		r.t.Error("End before Ended: whoever dials because of it finds the place taken")
	}
	r.mu.Lock()
	r.ends = append(r.ends, err)
	if len(r.ends) > 1 {
		r.t.Errorf("End for the second time: %v", r.ends)
	}
	r.mu.Unlock()
	r.leave()
}

func (r *receiver) enter() { r.setIn(true) }
func (r *receiver) leave() { r.setIn(false) }
func (r *receiver) setIn(in bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.in == in {
		r.t.Error("two calls of one receiver at once")
	}
	r.in = in
}

// consume takes the next n frames that wait.
func (r *receiver) consume(l *Link, n int) {
	for range n {
		r.mu.Lock()
		p := r.frames[r.eaten]
		r.eaten++
		r.mu.Unlock()
		l.Consumed(1, len(p))
	}
}

// taken is how many frames were consumed.
func (r *receiver) taken() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.eaten
}

func (r *receiver) count() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.frames)
}

func (r *receiver) texts() (texts []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, p := range r.frames {
		texts = append(texts, unmarked(p))
	}
	return texts
}

// told is what End was called with so far.
func (r *receiver) told() []error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.ends)
}

// ended waits for the end and returns why.
func (r *receiver) ended() error {
	r.t.Helper()
	var err error
	eventually(r.t, "the receiver is told the end", func() bool {
		if ends := r.told(); len(ends) > 0 {
			err = ends[0]
		}
		return err != nil
	})
	return err
}

func (r *receiver) wants(frames ...string) {
	r.t.Helper()
	eventually(r.t, fmt.Sprintf("%d frames arrive", len(frames)), func() bool { return r.count() >= len(frames) })
	if got := r.texts(); !slices.Equal(got, frames) {
		r.t.Fatalf("received %q, want %q", got, frames)
	}
}

// eventually waits for a state that nobody announces.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("it does not happen: %s", what)
		}
	}
}

// holder is a Handler that does what the test says.
type holder struct {
	mu    sync.Mutex
	open  func(l *Link) (Receiver, bool, error)
	links map[*Link]bool // let in by Open; true: Ended
	moved chan *Link
	alive func(ctx context.Context, serverID string, session SessionID) bool
	taken chan string
	extra int // calls of Ended that are one too many
}

func newHolder() *holder {
	return &holder{links: make(map[*Link]bool), moved: make(chan *Link, 100), taken: make(chan string, 100)}
}

func (h *holder) Open(l *Link) (Receiver, bool, error) {
	h.mu.Lock()
	open := h.open
	h.links[l] = false
	h.mu.Unlock()
	recv, grace, err := open(l)
	if err != nil {
		h.mu.Lock()
		delete(h.links, l)
		h.mu.Unlock()
	}
	return recv, grace, err
}

func (h *holder) Ended(l *Link) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if ended, ok := h.links[l]; !ok || ended {
		h.extra++
	}
	h.links[l] = true
}

func (h *holder) knowsEnd(l *Link) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.links[l]
}

func (h *holder) Moved(l *Link) { h.moved <- l }

func (h *holder) Alive(ctx context.Context, serverID string, session SessionID) bool {
	return h.alive(ctx, serverID, session)
}

func (h *holder) Taken(serverID string, _ SessionID) { h.taken <- serverID }

// lets makes the holder let every phone in, to recv.
func (h *holder) lets(recv Receiver, grace bool) {
	h.opens(func(*Link) (Receiver, bool, error) { return recv, grace, nil })
}

func (h *holder) opens(open func(*Link) (Receiver, bool, error)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.open = open
}

// attached lists the binary's ends that have not ended.
func (h *holder) attached() (links []*Link) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for l, ended := range h.links {
		if !ended {
			links = append(links, l)
		}
	}
	return links
}

// rig is a phone's node and a binary's node, which may be one.
type rig struct {
	*testing.T
	phones, binaries *Bus
	held             *holder // of binaries
	mover            *holder // of phones
	session          SessionID
	url              string // of the NATS between them, if there is one
}

var testConfig = Config{Window: 64 << 10, Backlog: 256 << 10}

// onBoth runs a contract test over both transports.
func onBoth(t *testing.T, test func(t *testing.T, r *rig)) {
	t.Run("in process", func(t *testing.T) { test(t, newLocalRig(t)) })
	t.Run("NATS", func(t *testing.T) { test(t, newNATSRig(t)) })
}

// newLocalRig has a NATS connection that never comes up: links within a node do
// not need it.
func newLocalRig(t *testing.T) *rig {
	b, h := startBus(t, "nats://127.0.0.1:1", testConfig)
	return &rig{T: t, phones: b, binaries: b, held: h, mover: h, session: NewSessionID()}
}

func newNATSRig(t *testing.T) *rig {
	url := startNATS(t, testenv.ServerOptions{}).URL()
	r := &rig{T: t, session: NewSessionID(), url: url}
	r.phones, r.mover = startBus(t, url, testConfig)
	r.binaries, r.held = startBus(t, url, testConfig)
	r.waitConnected()
	return r
}

func startBus(t *testing.T, url string, cfg Config) (*Bus, *holder) {
	t.Helper()
	return startBusOver(t, url, cfg, spoken, nil)
}

// startBusOver starts a bus that speaks v. configure, if not nil, may change its
// connection before.
func startBusOver(t *testing.T, url string, cfg Config, v Versions, configure func(*Conn)) (*Bus, *holder) {
	t.Helper()
	node := NewNodeID("gw")
	conn, err := Dial(ConnConfig{URL: url}, node, logger)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(conn.Close)
	b, h := New(conn, node, cfg, logger), newHolder()
	b.versions = v
	if configure != nil {
		configure(conn)
	}
	if err := b.Start(h); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Close)
	t.Cleanup(func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		if h.extra > 0 {
			t.Errorf("%d calls of Ended too many", h.extra)
		}
	})
	return b, h
}

// waitConnected returns when each node hears the other.
func (r *rig) waitConnected() {
	r.Helper()
	eventually(r.T, "the nodes hear each other", func() bool {
		return r.phones.Hello(r.Context(), r.binaries.Node()) == nil && r.binaries.Hello(r.Context(), r.phones.Node()) == nil
	})
}

func (r *rig) newReceiver() *receiver  { return &receiver{t: r.T} }
func (r *rig) slowReceiver() *receiver { return &receiver{t: r.T, hold: true} }

// connect opens a link between two receivers and returns both ends.
func (r *rig) connect(phone, binary *receiver) (p, b *Link) {
	r.Helper()
	r.held.opens(func(l *Link) (Receiver, bool, error) {
		b = l
		return binary, false, nil
	})
	p = r.phones.NewLink("server.1", NewConnID("server.1"), phone)
	if err := r.phones.Open(r.Context(), p, r.binaries.Node(), r.session); err != nil {
		r.Fatalf("Open: %v", err)
	}
	return p, b
}

// empty waits until nothing is left of any link.
func (r *rig) empty() {
	r.Helper()
	for _, b := range []*Bus{r.phones, r.binaries} {
		eventually(r.T, "the tables are empty", func() bool { return b.size() == "links 0, nodes 0, timed 0, ready 0" })
	}
	if left := r.held.attached(); len(left) > 0 {
		r.Fatalf("%d links were let in and never ended", len(left))
	}
	if n := r.binaries.Backlog(); n != 0 {
		r.Fatalf("%d bytes are counted for links that are gone", n)
	}
}

func (b *Bus) size() string {
	b.mu.RLock()
	defer b.mu.RUnlock()
	b.pumpMu.Lock()
	defer b.pumpMu.Unlock()
	return fmt.Sprintf("links %d, nodes %d, timed %d, ready %d", len(b.links), len(b.nodes), len(b.timed), len(b.ready))
}

func sendAll(t *testing.T, l *Link, texts ...string) {
	t.Helper()
	for _, s := range texts {
		if err := l.Send(textFrame(s)); err != nil {
			t.Fatalf("Send(%q): %v", s, err)
		}
	}
}

func TestLink_NumberedFramesBothWaysAtSpeed(t *testing.T) {
	onBoth(t, func(t *testing.T, r *rig) {
		const frames = 10_000 // each way
		p, b := r.connect(&receiver{t: t, onTake: checkNumber(t)}, &receiver{t: t, onTake: checkNumber(t)})
		var wg sync.WaitGroup
		for _, l := range []*Link{p, b} {
			wg.Go(func() {
				for i := range uint64(frames) {
					size := 9 + i%300
					if i%500 == 250 {
						size = 256 << 10
					}
					if err := l.Send(numberedFrame(i, int(size))); err != nil {
						t.Errorf("Send: %v", err)
						return
					}
				}
			})
		}
		wg.Wait()
		for _, l := range []*Link{p, b} {
			eventually(t, "all frames arrive", func() bool { return l.recv.(*receiver).count() >= frames })
			if got := l.recv.(*receiver).count(); got != frames {
				t.Errorf("got %d frames, want %d", got, frames)
			}
		}
		p.Close(CodeError(1000))
		if err := b.recv.(*receiver).ended(); !errors.Is(err, CodeError(1000)) {
			t.Errorf("ended with %v, want code 1000", err)
		}
		r.empty()
	})
}

func checkNumber(t *testing.T) func(*Link, []byte) {
	next := uint64(0)
	return func(_ *Link, p []byte) {
		if got := binary.BigEndian.Uint64(p); got != next || len(p) > 8 && p[len(p)-1] != byte(got) { //nolint:gosec // the low byte
			t.Errorf("got frame %d of %d bytes, want %d", got, len(p), next)
		}
		next++
	}
}

func TestLink_ReceiverThatDoesNotConsume_BlocksSend(t *testing.T) {
	onBoth(t, func(t *testing.T, r *rig) {
		slow := r.slowReceiver()
		p, b := r.connect(r.newReceiver(), slow)
		const size = 1000 - frameOverhead
		perWindow := (testConfig.Window + 999) / 1000
		var sent sync.WaitGroup
		var mu sync.Mutex
		returned := 0
		sent.Go(func() {
			for range 2 * perWindow {
				if err := p.Send(sizedFrame(size)); err != nil {
					t.Errorf("Send: %v", err)
				}
				mu.Lock()
				returned++
				mu.Unlock()
			}
		})
		eventually(t, "a window arrives", func() bool { return slow.count() == perWindow })
		mu.Lock()
		if returned > perWindow {
			t.Errorf("Send took %d frames, the window is %d", returned, perWindow)
		}
		mu.Unlock()

		// No sibling notices.
		other := r.newReceiver()
		p2, _ := r.connect(r.newReceiver(), other)
		sendAll(t, p2, "not blocked")
		other.wants("not blocked")

		slow.consume(b, perWindow)
		eventually(t, "the rest arrives", func() bool { return slow.count() == 2*perWindow })
		sent.Wait()
	})
}

// A receiver that takes nothing holds up a sender for a time that the sender's peer
// bears, and no longer.
func TestLink_ReceiverThatTakesNothing_SendGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHolder()
		b := newLocalBus(t, h)
		binary, phone := &receiver{t: t, hold: true}, &receiver{t: t}
		h.lets(binary, false)
		p := b.NewLink("s", "c", phone)
		if err := b.Open(t.Context(), p, b.Node(), NewSessionID()); err != nil {
			t.Fatal(err)
		}
		var err error
		start := time.Now()
		for err == nil {
			start = time.Now()
			err = p.Send(sizedFrame(1000))
		}
		if d := time.Since(start); d != pauseTimeout || !errors.Is(err, ErrLinkLost) {
			t.Errorf("Send returned %v after %v, want ErrLinkLost after %v", err, d, pauseTimeout)
		}
		synctest.Wait() // until the other end knows
		for _, recv := range []*receiver{phone, binary} {
			if ends := recv.told(); len(ends) != 1 || !errors.Is(ends[0], ErrLinkLost) {
				t.Errorf("ended with %v, want ErrLinkLost", ends)
			}
		}
	})
}

// One that takes a little at a time is not given up.
func TestLink_ReceiverThatIsSlow_SendGoesOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHolder()
		b := newLocalBus(t, h)
		slow, phone := &receiver{t: t, hold: true}, &receiver{t: t}
		h.lets(slow, false)
		p := b.NewLink("s", "c", phone)
		if err := b.Open(t.Context(), p, b.Node(), NewSessionID()); err != nil {
			t.Fatal(err)
		}
		const size, frames = 1000, 300
		done := make(chan struct{})
		go func() {
			defer close(done)
			for range frames {
				if err := p.Send(sizedFrame(size)); err != nil {
					t.Errorf("Send: %v", err)
					return
				}
			}
		}()
		perQuarter := testConfig.Window / 4 / (size + frameOverhead)
		for slow.count() < frames {
			time.Sleep(pauseTimeout - time.Second) //nolint:forbidigo // in a bubble
			synctest.Wait()
			slow.consume(h.attached()[0], min(perQuarter+1, slow.count()-slow.taken()))
			synctest.Wait()
		}
		<-done
		p.Close(CodeError(1000))
	})
}

func TestLink_CloseUnblocksSend(t *testing.T) {
	onBoth(t, func(t *testing.T, r *rig) {
		slow := r.slowReceiver()
		p, b := r.connect(r.newReceiver(), slow)
		blocked := make(chan error)
		go func() {
			for {
				if err := p.Send(sizedFrame(8000)); err != nil {
					blocked <- err
					return
				}
			}
		}()
		eventually(t, "a window arrives", func() bool { return slow.count()*(8000+frameOverhead) >= testConfig.Window })
		b.Close(ErrReclaimed)
		if err := <-blocked; !errors.Is(err, ErrClosed) {
			t.Errorf("Send: %v, want ErrClosed", err)
		}
		if err := p.recv.(*receiver).ended(); !errors.Is(err, ErrReclaimed) {
			t.Errorf("ended with %v, want ErrReclaimed", err)
		}
		r.empty()
		slow.consume(b, slow.count()) // after the end
		r.empty()
	})
}

func TestLink_BacklogOfAPhone_EndsItsLink(t *testing.T) {
	onBoth(t, func(t *testing.T, r *rig) {
		slow := r.slowReceiver()
		_, b := r.connect(slow, r.newReceiver())
		const cost = 1000
		took := 0
		var err error
		for err == nil {
			if err = b.Offer(sizedFrame(cost - frameOverhead)); err == nil {
				took++
			}
		}
		if !errors.Is(err, ErrBacklog) || took != testConfig.Backlog/cost {
			t.Errorf("Offer took %d frames and said %v, want %d and ErrBacklog", took, err, testConfig.Backlog/cost)
		}
		if err := slow.ended(); !errors.Is(err, ErrBacklog) {
			t.Errorf("the phone's end ended with %v, want ErrBacklog", err)
		}
		if n := slow.count() * cost; n > testConfig.Window+cost {
			t.Errorf("%d bytes reached a phone that reads nothing, the window is %d", n, testConfig.Window)
		}
		if err := b.Offer(textFrame("x")); !errors.Is(err, ErrClosed) {
			t.Errorf("Offer after the end: %v, want ErrClosed", err)
		}
		r.empty()
	})
}

// Many slow phones together get no more than all may have; each keeps a window.
func TestLink_BacklogOfAll_EndsTheLargest(t *testing.T) {
	onBoth(t, func(t *testing.T, r *rig) {
		r.binaries.cfg.TotalBacklog = testConfig.Backlog
		const links = 4
		var phones, ends [links]*Link
		var binaries [links]*receiver
		for i := range links {
			binaries[i] = r.newReceiver()
			phones[i], ends[i] = r.connect(r.slowReceiver(), binaries[i])
		}
		ended := 0
		for range 2 * testConfig.Backlog / 1000 {
			for i, l := range ends {
				if err := l.Offer(sizedFrame(1000)); errors.Is(err, ErrBacklog) {
					ended++
					if err := binaries[i].ended(); !errors.Is(err, ErrBacklog) {
						t.Errorf("ended with %v, want ErrBacklog", err)
					}
				}
				const frame, local = 1000 + frameOverhead, 2 // both ends of a link may be here
				if n, most := r.binaries.Backlog(), int64(testConfig.Backlog+links*local*(testConfig.Window+frame)); n > most {
					t.Fatalf("%d bytes wait, want at most %d", n, most)
				}
			}
		}
		if ended != links {
			t.Errorf("%d of %d links ended", ended, links)
		}
		for _, p := range phones {
			p.Close(CodeError(1000))
		}
		r.empty()
	})
}

func TestLink_CloseComesAfterTheLastFrame(t *testing.T) {
	onBoth(t, func(t *testing.T, r *rig) {
		phone, binary := r.newReceiver(), r.newReceiver()
		_, b := r.connect(phone, binary)
		sendAll(t, b, "1", "2", "3")
		b.Close(CodeError(4401))
		b.Close(CodeError(4402)) // does nothing
		if err := phone.ended(); !errors.Is(err, CodeError(4401)) {
			t.Errorf("ended with %v, want code 4401", err)
		}
		phone.wants("1", "2", "3")
		r.empty()
		if ends := binary.told(); len(ends) > 0 {
			t.Errorf("the side that closed was told %v", ends)
		}
	})
}

func TestLink_BothSidesCloseAtOnce(t *testing.T) {
	onBoth(t, func(t *testing.T, r *rig) {
		for range 50 {
			p, b := r.connect(r.newReceiver(), r.newReceiver())
			var wg sync.WaitGroup
			wg.Go(func() { p.Close(CodeError(1000)) })
			wg.Go(func() { b.Close(CodeError(1001)) })
			wg.Wait()
		}
		r.empty()
	})
}

func TestLink_AbortGivesUpWhatWasNotSent(t *testing.T) {
	onBoth(t, func(t *testing.T, r *rig) {
		slow := r.slowReceiver()
		_, b := r.connect(slow, r.newReceiver())
		for range 10 {
			if err := b.Offer(sizedFrame(testConfig.Window / 4)); err != nil && !errors.Is(err, ErrBacklog) {
				t.Fatal(err)
			}
		}
		b.Abort(ErrGraceOver)
		if err := slow.ended(); err == nil {
			t.Error("not ended")
		}
		if n := slow.count(); n > 4 {
			t.Errorf("%d frames arrived, the window has room for 4", n)
		}
		r.empty()
	})
}

func TestLink_FailEndsBothSides(t *testing.T) {
	onBoth(t, func(t *testing.T, r *rig) {
		phone, binary := r.newReceiver(), r.newReceiver()
		p, _ := r.connect(phone, binary)
		p.Fail(ErrNoSession)
		p.Fail(ErrAway) // does nothing
		for _, recv := range []*receiver{phone, binary} {
			if err := recv.ended(); !errors.Is(err, ErrNoSession) {
				t.Errorf("ended with %v, want ErrNoSession", err)
			}
		}
		r.empty()
	})
}

func TestLink_EndsWhileTheReceiverIsInDeliver_ToldAfterIt(t *testing.T) {
	for name, tt := range map[string]struct {
		end  func(l *Link)
		want error
	}{
		"fails": {func(l *Link) { l.Fail(ErrNoSession) }, ErrNoSession},
		"is offered too much": {func(l *Link) {
			for l.Offer(sizedFrame(testConfig.Window)) == nil {
			}
		}, ErrBacklog},
	} {
		t.Run(name, func(t *testing.T) {
			onBoth(t, func(t *testing.T, r *rig) {
				binary := r.newReceiver()
				in := make(chan *Link)
				ended := make(chan struct{})
				binary.onTake = func(l *Link, _ []byte) {
					in <- l
					<-ended
				}
				p, _ := r.connect(r.slowReceiver(), binary)
				done := make(chan struct{})
				go func() {
					defer close(done)
					_ = p.Send(textFrame("x"))
				}()
				tt.end(<-in) // the receiver complains if End comes now
				close(ended)
				if err := binary.ended(); !errors.Is(err, tt.want) {
					t.Errorf("ended with %v, want %v", err, tt.want)
				}
				<-done
				r.empty()
			})
		})
	}
}

func TestOpen_RefusedForEachReason(t *testing.T) {
	onBoth(t, func(t *testing.T, r *rig) {
		for _, want := range []error{ErrNoSession, ErrTooManyPhones, ErrReclaimed, CodeError(4000)} {
			r.held.opens(func(l *Link) (Receiver, bool, error) {
				if l.ServerID() != "a.b" || l.ConnID() != "conn" || l.Session() != r.session || l.Node() != r.phones.Node() {
					t.Errorf("asked for %q %q %s %s", l.ServerID(), l.ConnID(), l.Session(), l.Node())
				}
				return nil, false, want
			})
			phone := r.newReceiver()
			l := r.phones.NewLink("a.b", "conn", phone)
			if err := r.phones.Open(t.Context(), l, r.binaries.Node(), r.session); !errors.Is(err, want) {
				t.Errorf("Open: %v, want %v", err, want)
			}
			if l.Node() != "" || l.Session() != (SessionID{}) {
				t.Errorf("a refused link is bound to %s %s", l.Node(), l.Session())
			}
			r.empty()
			binary := r.newReceiver()
			r.held.lets(binary, false)
			sendAll(t, l, "queued") // it may be opened again
			if err := r.phones.Open(t.Context(), l, r.binaries.Node(), r.session); err != nil {
				t.Errorf("Open again: %v", err)
			}
			binary.wants("queued")
			if err := r.phones.Open(t.Context(), l, r.binaries.Node(), r.session); !errors.Is(err, ErrClosed) {
				t.Errorf("Open while bound: %v, want ErrClosed", err)
			}
			l.Close(CodeError(1000))
			if err := r.phones.Open(t.Context(), l, r.binaries.Node(), r.session); !errors.Is(err, ErrClosed) {
				t.Errorf("Open after Close: %v, want ErrClosed", err)
			}
			r.empty()
		}
	})
}

func TestOpen_PhoneLeavesMeanwhile(t *testing.T) {
	onBoth(t, func(t *testing.T, r *rig) {
		phone, binary := r.newReceiver(), r.newReceiver()
		l := r.phones.NewLink("s", "c", phone)
		r.held.opens(func(*Link) (Receiver, bool, error) {
			l.Close(CodeError(1001))
			return binary, false, nil
		})
		if err := r.phones.Open(t.Context(), l, r.binaries.Node(), r.session); !errors.Is(err, ErrClosed) {
			t.Errorf("Open: %v, want ErrClosed", err)
		}
		if err := binary.ended(); !errors.Is(err, CodeError(1001)) {
			t.Errorf("the binary's end ended with %v, want code 1001", err)
		}
		r.empty()
	})
}

func TestOpen_PhoneLeavesMeanwhileAndIsRefused(t *testing.T) {
	onBoth(t, func(t *testing.T, r *rig) {
		l := r.phones.NewLink("s", "c", r.newReceiver())
		sendAll(t, l, "x") // its clock runs
		r.held.opens(func(*Link) (Receiver, bool, error) {
			l.Fail(ErrLinkLost)
			return nil, false, ErrNoSession
		})
		if err := r.phones.Open(t.Context(), l, r.binaries.Node(), r.session); !errors.Is(err, ErrClosed) {
			t.Errorf("Open: %v, want ErrClosed", err)
		}
		r.empty()
	})
}

func TestOpen_BinaryClosesBeforeThePhoneKnows(t *testing.T) {
	onBoth(t, func(t *testing.T, r *rig) {
		phone := r.newReceiver()
		l := r.phones.NewLink("s", "c", phone)
		r.held.opens(func(b *Link) (Receiver, bool, error) {
			go b.Close(ErrReclaimed)
			return r.newReceiver(), false, nil
		})
		r.mover.opens(r.held.open)
		if err := r.phones.Open(t.Context(), l, r.binaries.Node(), r.session); err != nil && !errors.Is(err, ErrClosed) {
			t.Errorf("Open: %v", err)
		}
		if err := phone.ended(); !errors.Is(err, ErrReclaimed) {
			t.Errorf("ended with %v, want ErrReclaimed", err)
		}
	})
}

func TestOpen_NobodyThere(t *testing.T) {
	r := newNATSRig(t)
	l := r.phones.NewLink("s", "c", r.newReceiver())
	dead := NewNodeID("dead")
	if err := r.phones.Open(t.Context(), l, dead, r.session); !errors.Is(err, ErrNoResponders) {
		t.Errorf("Open: %v, want ErrNoResponders", err)
	}
	if err := r.phones.Hello(t.Context(), dead); !errors.Is(err, ErrNoResponders) {
		t.Errorf("Hello: %v, want ErrNoResponders", err)
	}
	r.empty()
}

func TestOpen_AnswerIsLost_AndTriedAgain(t *testing.T) {
	r := newNATSRig(t)
	binary, phone := r.newReceiver(), r.newReceiver()
	gaveUp := make(chan struct{})
	first := r.newReceiver()
	r.held.opens(func(*Link) (Receiver, bool, error) {
		<-gaveUp // no real one blocks
		return first, false, nil
	})
	l := r.phones.NewLink("s", "c", phone)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := r.phones.Open(ctx, l, r.binaries.Node(), r.session); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("Open: %v, want a deadline exceeded", err)
	}
	close(gaveUp)
	eventually(t, "the abandoned end ends", func() bool { return len(r.held.attached()) == 0 })
	if ends := first.told(); len(ends) > 0 {
		t.Errorf("the binary was told %v of a phone that it never had", ends)
	}
	r.held.lets(binary, false)
	if err := r.phones.Open(t.Context(), l, r.binaries.Node(), r.session); err != nil {
		t.Fatalf("Open again: %v", err)
	}
	sendAll(t, l, "1")
	binary.wants("1")
	for _, b := range r.held.attached() {
		sendAll(t, b, "2")
	}
	phone.wants("2")
	if n := len(r.held.attached()); n != 1 {
		t.Errorf("%d binary's ends, want 1", n)
	}
	l.Close(CodeError(1000))
	r.empty()
}

func TestLink_UnknownAtTheOtherNode_IsTold(t *testing.T) {
	r := newNATSRig(t)
	phone := r.newReceiver()
	p, b := r.connect(phone, r.newReceiver())
	b.forget(ErrNodeGone) // as if the node had lost it
	sendAll(t, p, "x")
	if err := phone.ended(); !errors.Is(err, ErrLinkLost) {
		t.Errorf("ended with %v, want ErrLinkLost", err)
	}
	p, b = r.connect(r.newReceiver(), r.newReceiver())
	p.forget(ErrNodeGone)
	b.Close(CodeError(1000)) // its CLOSE is answered by RESET
	r.empty()
}

func TestLink_OfAnotherServerID_IsUnknown(t *testing.T) {
	r := newNATSRig(t)
	p, b := r.connect(r.newReceiver(), r.newReceiver())
	m := Message{Kind: KindReset, Link: p.id, Session: r.session}
	r.phones.reply(tokenSubject(r.binaries.Node(), topicServer, "other"), m)
	m.Session = NewSessionID()
	r.phones.reply(tokenSubject(r.binaries.Node(), topicServer, b.token), m)
	sendAll(t, p, "still there")
	b.recv.(*receiver).wants("still there")
}

func TestLink_AttachedInGrace_MovesWithItsFrames(t *testing.T) {
	onBoth(t, func(t *testing.T, r *rig) {
		phone := r.newReceiver()
		p := r.phones.NewLink("s", "c", phone)
		r.held.lets(r.newReceiver(), true)
		if err := r.phones.Open(t.Context(), p, r.binaries.Node(), r.session); err != nil {
			t.Fatal(err)
		}
		sendAll(t, p, "1", "2", "3")
		for range 3 { // the new session may be replaced before it is reached
			for _, b := range r.held.attached() {
				b.Close(ErrMoved)
			}
			if l := <-r.mover.moved; l != p {
				t.Fatal("another link moved")
			}
			if p.Node() != "" {
				t.Errorf("a link that moves is bound to %s", p.Node())
			}
			r.session = NewSessionID()
			if err := r.phones.Open(t.Context(), p, r.binaries.Node(), r.session); err != nil {
				t.Fatal(err)
			}
		}
		for _, b := range r.held.attached() {
			b.Close(ErrMoved)
		}
		<-r.mover.moved
		binary := r.newReceiver()
		r.held.lets(binary, false)
		if err := r.phones.Open(t.Context(), p, r.binaries.Node(), NewSessionID()); err != nil {
			t.Fatal(err)
		}
		sendAll(t, p, "4")
		binary.wants("1", "2", "3", "4")
		for _, b := range r.held.attached() {
			sendAll(t, b, "a")
			phone.wants("a")
			b.Close(ErrMoved) // it has a session now, so it cannot move
		}
		if err := phone.ended(); !errors.Is(err, ErrMoved) {
			t.Errorf("ended with %v, want ErrMoved", err)
		}
		r.empty()
	})
}

func TestLink_FirstFrameInGrace_WaitsEightSeconds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHolder()
		b := newLocalBus(t, h)
		binary, phone := &receiver{t: t}, &receiver{t: t}
		h.lets(binary, true)
		p := b.NewLink("s", "c", phone)
		if err := b.Open(t.Context(), p, b.Node(), NewSessionID()); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Hour) //nolint:forbidigo // in a bubble
		synctest.Wait()
		if ends := phone.told(); len(ends) > 0 {
			t.Fatalf("a silent phone was told %v", ends)
		}
		start := time.Now()
		sendAll(t, p, "x")
		for len(phone.told()) == 0 {
			time.Sleep(tickInterval) //nolint:forbidigo // in a bubble
			synctest.Wait()
		}
		if d := time.Since(start); d < holdTimeout || d > holdTimeout+2*tickInterval {
			t.Errorf("told after %v, want %v", d, holdTimeout)
		}
		for _, recv := range []*receiver{phone, binary} {
			if ends := recv.told(); len(ends) != 1 || !errors.Is(ends[0], ErrAway) || recv.count() > 0 {
				t.Errorf("ended with %v after %q, want ErrAway", ends, recv.texts())
			}
		}
		synctest.Wait()
		if got := b.size(); got != "links 0, nodes 0, timed 1, ready 0" && got != "links 0, nodes 0, timed 0, ready 0" {
			t.Errorf("left: %s", got)
		}
	})
}

// newLocalBus is a bus without NATS, for links within it, in a bubble.
func newLocalBus(t *testing.T, h *holder) *Bus {
	b := New(&Conn{}, NewNodeID("gw"), testConfig, logger)
	b.handler = h
	b.pump.Go(b.pumpLoop)
	t.Cleanup(b.Close)
	return b
}

func TestLinks_ThatAreIdle_CostNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHolder()
		b := newLocalBus(t, h)
		var phones []*Link
		for i := range 20 {
			h.lets(&receiver{t: t}, i%2 == 0)
			p := b.NewLink("s", fmt.Sprint(i), &receiver{t: t})
			if err := b.Open(t.Context(), p, b.Node(), NewSessionID()); err != nil {
				t.Fatal(err)
			}
			if i%2 == 1 {
				sendAll(t, p, "x")
			}
			phones = append(phones, p)
		}
		time.Sleep(time.Second) //nolint:forbidigo // in a bubble
		synctest.Wait()
		if got := b.size(); got != "links 40, nodes 0, timed 0, ready 0" {
			t.Errorf("idle: %s, want nothing timed", got)
		}
		for _, p := range phones {
			p.Close(CodeError(1000))
		}
		time.Sleep(time.Second) //nolint:forbidigo // in a bubble
		synctest.Wait()
		if got := b.size(); got != "links 0, nodes 0, timed 0, ready 0" {
			t.Errorf("closed: %s", got)
		}
	})
}

func TestEndNode_EndsItsLinks(t *testing.T) {
	r := newNATSRig(t)
	phone, binary := r.newReceiver(), r.newReceiver()
	p, b := r.connect(phone, binary)
	if got := r.phones.LinkedNodes(); !slices.Equal(got, []NodeID{r.binaries.Node()}) {
		t.Errorf("linked nodes %v", got)
	}
	r.phones.EndNode(NewNodeID("another"))
	sendAll(t, p, "x")
	binary.wants("x")
	r.phones.EndNode(r.binaries.Node())
	r.binaries.EndNode(r.phones.Node())
	for _, recv := range []*receiver{phone, binary} {
		if err := recv.ended(); !errors.Is(err, ErrNodeGone) {
			t.Errorf("ended with %v, want ErrNodeGone", err)
		}
	}
	if err := b.Offer(textFrame("x")); !errors.Is(err, ErrClosed) {
		t.Errorf("Offer: %v, want ErrClosed", err)
	}
	r.empty()
}

func TestBusClose_EndsWhatIsLeft(t *testing.T) {
	onBoth(t, func(t *testing.T, r *rig) {
		slow := r.slowReceiver()
		p, _ := r.connect(r.newReceiver(), slow)
		blocked := make(chan error)
		go func() {
			for {
				if err := p.Send(sizedFrame(8000)); err != nil {
					blocked <- err
					return
				}
			}
		}()
		eventually(t, "a window arrives", func() bool { return slow.count()*(8000+frameOverhead) >= testConfig.Window })
		told, tells := r.connect(r.newReceiver(), r.newReceiver())
		tells.Close(ErrNodeGone) // just before
		r.binaries.Close()
		if err := told.recv.(*receiver).ended(); !errors.Is(err, ErrNodeGone) {
			t.Errorf("ended with %v, want ErrNodeGone", err)
		}
		r.phones.Close()
		if err := <-blocked; !errors.Is(err, ErrClosed) {
			t.Errorf("Send: %v, want ErrClosed", err)
		}
		if err := p.recv.(*receiver).ended(); !errors.Is(err, ErrLinkLost) {
			t.Errorf("ended with %v, want ErrLinkLost", err)
		}
		for _, b := range []*Bus{r.phones, r.binaries} {
			if len(b.links)+len(b.nodes) > 0 {
				t.Errorf("left: %s", b.size())
			}
		}
	})
}

func TestLinks_OpenedAndClosedInEveryWay_LeaveNothing(t *testing.T) {
	onBoth(t, func(t *testing.T, r *rig) {
		r.held.opens(func(l *Link) (Receiver, bool, error) {
			recv := &receiver{t: t}
			if l.ConnID() == "closed at once" {
				go l.Close(ErrReclaimed)
			}
			return recv, l.ConnID() == "grace", nil
		})
		ways := []struct {
			conn string
			end  func(p *Link)
		}{
			{"closes", func(p *Link) { p.Close(CodeError(1000)) }},
			{"aborts", func(p *Link) { p.Abort(ErrBacklog) }},
			{"fails", func(p *Link) { p.Fail(ErrLinkLost) }},
			{"sends and closes", func(p *Link) { _ = p.Send(textFrame("x")); p.Close(CodeError(1000)) }},
			{"sends and fails", func(p *Link) { _ = p.Send(textFrame("x")); p.Fail(ErrLinkLost) }},
			{"closed at once", func(p *Link) { _ = p.Send(textFrame("x")) }},
			{"grace", func(p *Link) { p.Close(CodeError(1000)) }},
			{"closes while opening", nil},
			{"fails while opening", nil},
		}
		var wg sync.WaitGroup
		for worker := range 8 {
			wg.Go(func() {
				for i := range 60 {
					way := ways[(i+worker)%len(ways)]
					p := r.phones.NewLink("s", way.conn, &receiver{t: t})
					var while sync.WaitGroup
					switch way.conn {
					case "closes while opening":
						while.Go(func() { p.Close(CodeError(1000)) })
					case "fails while opening":
						while.Go(func() { p.Fail(ErrLinkLost) })
					}
					if err := r.phones.Open(t.Context(), p, r.binaries.Node(), r.session); err != nil && !errors.Is(err, ErrClosed) {
						t.Errorf("Open: %v", err)
					}
					while.Wait()
					if way.end != nil {
						way.end(p)
					}
				}
			})
		}
		wg.Wait()
		r.empty()
	})
}

// Everything that may happen to a link at the same time does.
func TestLink_CalledFromEverywhereAtOnce(t *testing.T) {
	onBoth(t, func(t *testing.T, r *rig) {
		for round := range 40 {
			p, b := r.connect(&receiver{t: t, onTake: checkNumber(t)}, &receiver{t: t, onTake: checkNumber(t)})
			var wg sync.WaitGroup
			under := make(chan struct{}, 2) // traffic is
			for _, l := range []*Link{p, b} {
				wg.Go(func() {
					for i := range uint64(200) {
						if i == 50 {
							under <- struct{}{}
						}
						if l.Send(numberedFrame(i, 100)) != nil {
							return
						}
					}
				})
			}
			wg.Go(func() { r.phones.ProbeAll(); p.probe(time.Now()); b.probe(time.Now()) })
			<-under
			wg.Go(func() {
				switch round % 4 {
				case 0:
					p.Close(CodeError(1000))
				case 1:
					b.Abort(ErrReclaimed)
				case 2:
					b.Fail(ErrLinkLost)
				case 3:
					p.Fail(ErrLinkLost)
				}
			})
			wg.Go(func() { b.Close(ErrGraceOver) })
			wg.Wait()
		}
		r.empty()
	})
}

func TestChallenge_AsksTheNodeThatHolds(t *testing.T) {
	onBoth(t, func(t *testing.T, r *rig) {
		r.held.alive = func(_ context.Context, serverID string, s SessionID) bool {
			return serverID == "a.b" && s == r.session
		}
		if alive, err := r.phones.Challenge(t.Context(), r.binaries.Node(), "a.b", r.session); !alive || err != nil {
			t.Errorf("got %v, %v, want alive", alive, err)
		}
		if alive, err := r.phones.Challenge(t.Context(), r.binaries.Node(), "a.b", NewSessionID()); alive || err != nil {
			t.Errorf("got %v, %v, want gone", alive, err)
		}
		r.phones.Taken(r.binaries.Node(), "a.b", r.session)
		if got := <-r.held.taken; got != "a.b" {
			t.Errorf("taken %q, want a.b", got)
		}
	})
}

func TestChallenge_UnderWayWhenTheBusCloses(t *testing.T) {
	r := newNATSRig(t)
	asked := make(chan struct{})
	r.held.alive = func(ctx context.Context, _ string, _ SessionID) bool {
		close(asked)
		<-ctx.Done()
		return false
	}
	answer := make(chan bool)
	go func() {
		alive, err := r.phones.Challenge(t.Context(), r.binaries.Node(), "s", r.session)
		if err != nil {
			t.Errorf("Challenge: %v", err)
		}
		answer <- alive
	}()
	<-asked
	r.binaries.Close() // waits for it
	if <-answer {
		t.Error("alive, want gone")
	}
}

func TestDispatch_CountsWhatNoRelaySends(t *testing.T) {
	r := newNATSRig(t)
	nc, err := nats.Connect(r.url)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	node := r.binaries.Node()
	good := (&Message{Kind: KindAck}).encode()
	for subject, data := range map[string][]byte{
		nodeSubject(node):                                nil,
		nodeSubject(node) + ".x":                         good,
		tokenSubject(node, "other", "s"):                 good,
		tokenSubject(node, topicServer, "s.t"):           good,
		tokenSubject(node, topicServer, "s"):             good[1:],
		tokenSubject(node, topicClaim, "=zz"):            good,
		tokenSubject(node, topicClaim, "s"):              good,
		tokenSubject(node, topicServer, "open-no-reply"): (&Message{Kind: KindOpen, Payload: joinOpen("n", "c")}).encode(),
	} {
		if err := nc.Publish(subject, data); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "8 messages are counted as malformed", func() bool { return r.binaries.Malformed() == 8 })
	if err := r.phones.Hello(t.Context(), node); err != nil {
		t.Errorf("Hello after that: %v", err)
	}
}
