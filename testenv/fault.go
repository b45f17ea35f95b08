package testenv

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"time"
)

const (
	dialTimeout = 5 * time.Second // for a target on this machine; bounds Close, too
	chunkBytes  = 32 << 10        // read from a connection at once
	queueChunks = 1024            // in the delay line of one direction: 32 MiB, 100 ms at 2.7 Gbit/s
)

// longAgo is a deadline that interrupts I/O at once.
var longAgo = time.Unix(1, 0)

// Proxy forwards TCP connections from 127.0.0.1 to a target, and misbehaves on
// demand. It forwards half-closes and resets as what they are. All methods may
// be called concurrently.
type Proxy struct {
	ln    net.Listener
	valve valve
	wg    sync.WaitGroup

	// Guarded by mu.
	mu     sync.Mutex
	target string
	delay  time.Duration
	refuse bool
	pairs  map[*pair]struct{} // nil once closed
}

// NewProxy starts a proxy to target, a host:port that need not exist yet: it is
// dialled once for each connection. The caller must Close the proxy.
func NewProxy(target string) (*Proxy, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	p := &Proxy{ln: ln, target: target, pairs: make(map[*pair]struct{})}
	p.wg.Go(p.acceptLoop)
	return p, nil
}

// Addr returns the host:port that the proxy listens on.
func (p *Proxy) Addr() string { return p.ln.Addr().String() }

// SetTarget sets where connections accepted from now on go.
func (p *Proxy) SetTarget(addr string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.target = addr
}

// SetDelay makes bytes that arrive from now on leave d later, in each
// direction. It is a delay line: order and throughput stay. Zero is the default.
func (p *Proxy) SetDelay(d time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.delay = d
}

// Hold stops all bytes in both directions, ends of streams and resets included.
// Nothing is closed, and new connections are accepted and held too: this is what a network
// that loses every packet looks like. No byte passes after Hold has returned.
func (p *Proxy) Hold() {
	var lines []*line
	p.mu.Lock()
	for pr := range p.pairs {
		lines = append(lines, pr.lines...)
	}
	p.valve.shutWith(func() {
		for _, l := range lines {
			_ = l.dst.SetWriteDeadline(longAgo) // fails when it is closed, and so does the write
		}
	})
	p.mu.Unlock()
	for _, l := range lines {
		l.writing.Lock()   // wait for the interrupted write to end
		l.writing.Unlock() //nolint:staticcheck // nothing is done under it
	}
}

// Resume undoes Hold: what was held is delivered.
func (p *Proxy) Resume() { p.valve.open() }

// Cut resets (RST) every current connection on both sides. What was under way
// is lost.
func (p *Proxy) Cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for pr := range p.pairs {
		pr.cutLocked()
	}
}

// Refuse makes the proxy reset new connections at once. Current ones stay.
func (p *Proxy) Refuse() { p.setRefuse(true) }

// Accept undoes Refuse.
func (p *Proxy) Accept() { p.setRefuse(false) }

func (p *Proxy) setRefuse(refuse bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.refuse = refuse
}

// Close stops listening, resets every connection and waits for the proxy's
// goroutines. It may be called more than once.
func (p *Proxy) Close() {
	p.ln.Close()
	p.mu.Lock()
	for pr := range p.pairs {
		pr.cutLocked()
	}
	p.pairs = nil
	p.mu.Unlock()
	p.wg.Wait()
}

func (p *Proxy) acceptLoop() {
	for {
		conn, err := p.ln.Accept()
		if err != nil {
			return
		}
		p.admit(conn.(*net.TCPConn))
	}
}

func (p *Proxy) admit(client *net.TCPConn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.refuse || p.pairs == nil {
		reset(client)
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	pr := &pair{p: p, client: client, ctx: ctx, cancel: cancel}
	p.pairs[pr] = struct{}{}
	p.wg.Go(pr.run)
}

// pair is one proxied connection: its two sockets and two directions.
type pair struct {
	p      *Proxy
	client *net.TCPConn
	ctx    context.Context // ends with the pair
	cancel context.CancelFunc

	// Guarded by p.mu. Nil until the target was dialled.
	server *net.TCPConn
	lines  []*line
}

func (pr *pair) run() {
	defer pr.end()
	if !pr.p.valve.wait(pr.ctx.Done()) {
		return
	}
	pr.p.mu.Lock()
	target := pr.p.target
	pr.p.mu.Unlock()
	// Not bound to pr.ctx: a dial that is cancelled late closes without a reset.
	conn, err := net.DialTimeout("tcp", target, dialTimeout)
	if err != nil {
		pr.cut()
		return
	}
	if !pr.join(conn.(*net.TCPConn)) {
		return
	}
	var wg sync.WaitGroup
	for _, l := range pr.lines {
		wg.Go(l.readLoop)
		wg.Go(l.writeLoop)
	}
	wg.Wait()
}

// join completes the pair, unless it was cut meanwhile.
func (pr *pair) join(server *net.TCPConn) bool {
	pr.p.mu.Lock()
	defer pr.p.mu.Unlock()
	if pr.ctx.Err() != nil {
		reset(server)
		return false
	}
	pr.server = server
	pr.lines = []*line{newLine(pr, pr.client, server), newLine(pr, server, pr.client)}
	return true
}

// end closes what a cut has not reset.
func (pr *pair) end() {
	pr.p.mu.Lock()
	defer pr.p.mu.Unlock()
	delete(pr.p.pairs, pr)
	pr.cancel()
	pr.client.Close()
	if pr.server != nil {
		pr.server.Close()
	}
}

func (pr *pair) cut() {
	pr.p.mu.Lock()
	defer pr.p.mu.Unlock()
	pr.cutLocked()
}

func (pr *pair) cutLocked() {
	pr.cancel()
	reset(pr.client)
	if pr.server != nil {
		reset(pr.server)
	}
}

// line is one direction of a pair: a reader that stamps chunks, and a writer
// that lets them out when they are due and the valve is open.
type line struct {
	pr       *pair
	src, dst *net.TCPConn
	queue    chan chunk
	writing  sync.Mutex // held while something is done to dst
}

// chunk is data that may leave when it is due. No data means the end of the stream.
type chunk struct {
	due  time.Time
	data []byte
}

func newLine(pr *pair, src, dst *net.TCPConn) *line {
	return &line{pr: pr, src: src, dst: dst, queue: make(chan chunk, queueChunks)}
}

func (l *line) readLoop() {
	buf := make([]byte, chunkBytes)
	for l.pr.p.valve.wait(l.pr.ctx.Done()) {
		n, err := l.src.Read(buf)
		if n > 0 && !l.enqueue(bytes.Clone(buf[:n])) {
			return
		}
		switch {
		case err == nil:
		case errors.Is(err, io.EOF):
			l.enqueue(nil)
			return
		default:
			// A reset must not overtake a hold either.
			l.pr.p.valve.wait(l.pr.ctx.Done())
			l.pr.cut()
			return
		}
	}
}

func (l *line) enqueue(data []byte) bool {
	l.pr.p.mu.Lock()
	delay := l.pr.p.delay
	l.pr.p.mu.Unlock()
	select {
	case l.queue <- chunk{time.Now().Add(delay), data}:
		return true
	case <-l.pr.ctx.Done():
		return false
	}
}

func (l *line) writeLoop() {
	for {
		var c chunk
		select {
		case c = <-l.queue:
		case <-l.pr.ctx.Done():
			return
		}
		if d := time.Until(c.due); d > 0 {
			select {
			case <-time.After(d):
			case <-l.pr.ctx.Done():
				return
			}
		}
		if c.data == nil {
			_ = l.whileOpen(l.dst.CloseWrite) // the connection may be gone
			return
		}
		if err := l.write(c.data); err != nil {
			l.pr.p.valve.wait(l.pr.ctx.Done())
			l.pr.cut()
			return
		}
	}
}

func (l *line) write(b []byte) error {
	for len(b) > 0 {
		err := l.whileOpen(func() error {
			n, err := l.dst.Write(b)
			b = b[n:]
			return err
		})
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return err
		}
	}
	return nil
}

// whileOpen calls f once the valve is open. Hold waits for f, and interrupts
// what it writes.
func (l *line) whileOpen(f func() error) error {
	v := &l.pr.p.valve
	for {
		if !v.wait(l.pr.ctx.Done()) {
			return net.ErrClosed
		}
		l.writing.Lock()
		if v.ifOpen(func() { _ = l.dst.SetWriteDeadline(time.Time{}) }) {
			err := f()
			l.writing.Unlock()
			return err
		}
		l.writing.Unlock()
	}
}

// reset closes conn with an RST where its kind has one.
func reset(conn net.Conn) {
	if c, ok := conn.(interface{ SetLinger(int) error }); ok {
		_ = c.SetLinger(0) // fails when it is closed
	}
	conn.Close()
}

// valve lets I/O pass, or holds it. The zero value is open.
type valve struct {
	mu   sync.Mutex
	shut chan struct{} // closed by open; nil while open
}

// shutWith shuts the valve. interrupt sets the deadlines that end the I/O under
// way; no ifOpen runs at the same time.
func (v *valve) shutWith(interrupt func()) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.shut == nil {
		v.shut = make(chan struct{})
	}
	interrupt()
}

func (v *valve) open() {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.shut != nil {
		close(v.shut)
		v.shut = nil
	}
}

// wait returns true once the valve is open, false if dead is closed first.
func (v *valve) wait(dead <-chan struct{}) bool {
	v.mu.Lock()
	shut := v.shut
	v.mu.Unlock()
	if shut == nil {
		return true
	}
	select {
	case <-shut:
		return true
	case <-dead:
		return false
	}
}

// ifOpen calls f, which clears deadlines, if the valve is open.
func (v *valve) ifOpen(f func()) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.shut != nil {
		return false
	}
	f()
	return true
}
