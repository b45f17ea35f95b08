package testenv

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"sync"
	"sync/atomic"

	"nhooyr.io/websocket" // what the shipped clients were built on; frozen, hence deprecated
)

// CloseInfo is how a connection ended: the code and reason of the close frame
// that the other side sent, 1005 if that frame was empty, 1006 if the TCP
// connection ended without one. It is the error of reading past the end.
type CloseInfo struct {
	Code   int
	Reason string
}

func (c CloseInfo) Error() string { return fmt.Sprintf("closed %d %q", c.Code, c.Reason) }

// noCloseFrame is never on the wire: RFC 6455, 7.4.1.
const noCloseFrame = 1006

// Message is a received message.
type Message struct {
	Binary bool // the opcode: binary rather than text
	Data   []byte
}

// Peer is one WebSocket connection to a relay. A goroutine reads it from the
// dial to its end, answers pings, and queues what arrives, without a bound: a
// consumer that is slow never makes the peer look slow (Pause does). Whoever
// dials must call Close or Drop. All methods may be called concurrently.
//
// If the ctx of a send ends before the message was written, the connection is
// broken; this is a property of the library.
type Peer struct {
	ws     *websocket.Conn
	sock   *socket
	broken atomic.Bool   // by this side, without a close frame
	done   chan struct{} // closed after the last message was queued

	info CloseInfo // written before done is closed

	// Guarded by mu.
	mu      sync.Mutex
	queue   []Message
	wake    chan struct{} // closed by the next message; nil while nobody waits
	closing chan struct{} // closed when Close has its outcome; nil before Close
	echo    CloseInfo     // what Close itself read; valid once closing is closed
}

// Send sends frame as one text message.
func (p *Peer) Send(ctx context.Context, frame []byte) error {
	return p.track(p.ws.Write(ctx, websocket.MessageText, frame))
}

// SendBinary sends frame as one message with the binary opcode.
func (p *Peer) SendBinary(ctx context.Context, frame []byte) error {
	return p.track(p.ws.Write(ctx, websocket.MessageBinary, frame))
}

// SendFragments sends one text message, each part in a WebSocket frame of its
// own, followed by an empty final one.
func (p *Peer) SendFragments(ctx context.Context, parts ...[]byte) error {
	w, err := p.ws.Writer(ctx, websocket.MessageText)
	if err != nil {
		return p.track(err)
	}
	for _, part := range parts {
		if _, err := w.Write(part); err != nil {
			return p.track(err)
		}
	}
	return p.track(w.Close())
}

// track remembers that the library breaks a connection when a write fails.
func (p *Peer) track(err error) error {
	if err != nil {
		p.broken.Store(true)
	}
	return err
}

// Ping sends a ping and waits for its pong.
func (p *Peer) Ping(ctx context.Context) error { return p.ws.Ping(ctx) }

// Next returns the data of the next message, in order of arrival. At the end of
// the connection, after all messages, the error is a CloseInfo.
func (p *Peer) Next(ctx context.Context) ([]byte, error) {
	m, err := p.NextMessage(ctx)
	return m.Data, err
}

// NextMessage is Next with the opcode.
func (p *Peer) NextMessage(ctx context.Context) (Message, error) {
	for {
		p.mu.Lock()
		if len(p.queue) > 0 {
			m := p.queue[0]
			p.queue[0] = Message{} // for the garbage collector
			p.queue = p.queue[1:]
			p.mu.Unlock()
			return m, nil
		}
		if p.over() {
			p.mu.Unlock()
			return Message{}, p.info
		}
		if p.wake == nil {
			p.wake = make(chan struct{})
		}
		wake := p.wake
		p.mu.Unlock()
		select {
		case <-wake:
		case <-p.done:
		case <-ctx.Done():
			return Message{}, fmt.Errorf("next message: %w", context.Cause(ctx))
		}
	}
}

// Done is closed when the connection has ended. Messages may still be queued.
func (p *Peer) Done() <-chan struct{} { return p.done }

// Closed waits for the end of the connection and returns how it came.
func (p *Peer) Closed(ctx context.Context) (CloseInfo, error) {
	select {
	case <-p.done:
		return p.info, nil
	case <-ctx.Done():
		return CloseInfo{}, fmt.Errorf("wait for close: %w", context.Cause(ctx))
	}
}

// Close sends a close frame, waits for the other side's, at most 5 s, and
// closes the connection. It returns an error if none came. Code 1005 sends an
// empty close frame. Messages that arrive meanwhile may be lost. After the end it
// does nothing.
func (p *Peer) Close(code int, reason string) error {
	p.mu.Lock()
	if p.closing != nil || p.over() {
		p.mu.Unlock()
		<-p.done
		return nil
	}
	p.closing = make(chan struct{})
	p.mu.Unlock()

	err := p.ws.Close(websocket.StatusCode(code), reason)
	// Usually readLoop reads the other side's close frame, but between two of
	// its reads the library's Close does.
	p.echo = closeInfo(err)
	if err == nil && !p.broken.Load() {
		p.echo = CloseInfo{code, reason}
	}
	close(p.closing)
	<-p.done
	if p.info.Code != noCloseFrame || errors.Is(err, net.ErrClosed) {
		return nil // a close frame came after all, or the end did at the same moment
	}
	return err
}

// Drop ends the TCP connection at once, with an RST if it is one, and without a
// close frame. After the end it does nothing.
func (p *Peer) Drop() {
	p.broken.Store(true)
	reset(p.sock)
	p.ws.CloseNow()
	<-p.done
}

// Pause stops reading the socket: no message, no ping, no close is seen, and the
// other side's writes fill the buffers in between. No byte is read from the
// socket after Pause has returned; up to 8 KiB that were read before may still
// be delivered. The peer can send meanwhile.
func (p *Peer) Pause() { p.sock.pause() }

// Unpause undoes Pause.
func (p *Peer) Unpause() { p.sock.valve.open() }

func (p *Peer) over() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

func (p *Peer) readLoop() {
	var err error
	for {
		var typ websocket.MessageType
		var data []byte
		// Not a context of the peer: one that cannot end costs nothing.
		if typ, data, err = p.ws.Read(context.Background()); err != nil {
			break
		}
		p.push(Message{typ == websocket.MessageBinary, data})
	}
	p.ws.CloseNow()
	p.info = closeInfo(err)

	p.mu.Lock()
	closing := p.closing
	if closing == nil {
		close(p.done)
	}
	p.mu.Unlock()
	if closing != nil {
		<-closing
		if p.info.Code == noCloseFrame {
			p.info = p.echo
		}
		close(p.done)
	}
}

func (p *Peer) push(m Message) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.queue = append(p.queue, m)
	if p.wake != nil {
		close(p.wake)
		p.wake = nil
	}
}

// closeInfo returns what err, of the library, says about the end.
func closeInfo(err error) CloseInfo {
	if ce := (websocket.CloseError{}); errors.As(err, &ce) {
		return CloseInfo{int(ce.Code), ce.Reason}
	}
	return CloseInfo{Code: noCloseFrame}
}

func dial(ctx context.Context, rawURL string, fields map[string]string, extra http.Header, dialContext DialFunc, conf *tls.Config) (*Peer, error) {
	u, err := url.Parse(rawURL)
	if err != nil {
		return nil, err
	}
	if dialContext == nil {
		dialContext = new(net.Dialer).DialContext
	}
	conn, err := dialContext(ctx, "tcp", hostPort(u))
	if err != nil {
		return nil, err
	}
	sock := &socket{Conn: conn, dead: make(chan struct{})}
	transport := &http.Transport{
		DisableKeepAlives:  true, // one connection, one request
		DisableCompression: true, // no header that was not asked for
		TLSClientConfig:    conf,
		DialContext:        func(context.Context, string, string) (net.Conn, error) { return sock, nil },
	}
	ws, resp, err := websocket.Dial(ctx, u.String(), &websocket.DialOptions{
		HTTPHeader: header(fields, extra),
		HTTPClient: &http.Client{
			Transport:     transport,
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	})
	if err != nil {
		sock.Close()
		if resp != nil && resp.StatusCode != http.StatusSwitchingProtocols {
			body, _ := io.ReadAll(resp.Body) // in memory
			return nil, &RefusedError{resp.StatusCode, resp.Header, string(body)}
		}
		return nil, err
	}
	ws.SetReadLimit(-1)
	p := &Peer{ws: ws, sock: sock, done: make(chan struct{})}
	go p.readLoop() //nolint:gosec // ctx is of the dial only
	return p, nil
}
