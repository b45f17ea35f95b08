package gateway

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/coder/websocket"
)

// This file is the only one of the gateway that touches the WebSocket library.
//                                                           (docs/adr/0001)

// socket is one WebSocket connection. Reader and writer are one goroutine each; drop
// may be called by any.
type socket struct {
	ws   *websocket.Conn
	wire *wire
}

// wire is the net.Conn under a socket. It bounds each write, and each message
// that has begun to arrive, in time; silence between messages is not bounded. It
// holds back what the outbox writes until that says flush, so that many small
// messages leave in one write.
type wire struct {
	net.Conn
	writeTimeout   time.Duration
	messageTimeout time.Duration

	br *bufio.Reader // static; read by the reading goroutine, and by close's once closing is set

	// Guarded by mu.
	mu        sync.Mutex
	begun     time.Time // when the first byte of the message in hand came; zero: none
	deadline  bool      // a read deadline is set
	inMessage bool      // between a message's header and its end
	closing   bool      // close reads now, with a time limit of its own

	// Guarded by out, which is held while something is written.
	out     sync.Mutex
	held    []byte // to be written by flush; nil: nothing is held back
	writing bool   // between beginWrite and endWrite: they share a deadline
	timed   bool   // which has been set
}

// Write implements net.Conn for the library.
func (w *wire) Write(p []byte) (int, error) {
	w.out.Lock()
	defer w.out.Unlock()
	if w.held != nil && len(w.held)+len(p) <= cap(w.held) {
		w.held = append(w.held, p...)
		return len(p), nil
	}
	if err := w.flushLocked(); err != nil {
		return 0, err
	}
	return w.send(p)
}

// send writes p. A message has one deadline for all its writes. w.out is held.
func (w *wire) send(p []byte) (int, error) {
	if !w.writing || !w.timed {
		w.timed = true
		_ = w.SetWriteDeadline(time.Now().Add(w.writeTimeout)) // fails only when closed, and then the write fails too
	}
	return w.Conn.Write(p)
}

// flushLocked writes what is held back. w.out is held.
func (w *wire) flushLocked() error {
	if len(w.held) == 0 {
		return nil
	}
	p := w.held
	w.held = w.held[:0]
	_, err := w.send(p)
	return err
}

// hold has writes wait for flush, as far as buf has room.
func (w *wire) hold(buf []byte) {
	w.out.Lock()
	defer w.out.Unlock()
	w.held = buf[:0]
}

// flush writes what is held back, and ends that: buf of hold is the caller's again.
func (w *wire) flush() error {
	w.out.Lock()
	defer w.out.Unlock()
	err := w.flushLocked()
	w.held = nil
	return err
}

func (w *wire) setWriting(writing bool) {
	w.out.Lock()
	defer w.out.Unlock()
	w.writing, w.timed = writing, false
}

// Close implements net.Conn for the library, whose close frame may be held back.
func (w *wire) Close() error {
	if w.out.TryLock() { // else somebody is stuck in a write
		_ = w.flushLocked() // the connection ends anyway
		w.out.Unlock()
	}
	return w.Conn.Close()
}

func (w *wire) Read(p []byte) (int, error) {
	w.mu.Lock()
	if !w.begun.IsZero() && !w.deadline && !w.closing {
		w.deadline = true
		_ = w.SetReadDeadline(w.begun.Add(w.messageTimeout)) // fails only when closed, and then the read fails too
	}
	w.mu.Unlock()
	n, err := w.Conn.Read(p)
	if n > 0 {
		w.mu.Lock()
		if w.begun.IsZero() {
			w.begun = time.Now()
		}
		w.mu.Unlock()
	}
	return n, err
}

// begin says that a message's first header has been read.
func (w *wire) begin() {
	w.mu.Lock()
	w.inMessage = true
	w.mu.Unlock()
}

// rest says that a message has been read to its end, or a control frame, which
// changes nothing if it came between the fragments of a message.
func (w *wire) rest(control bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closing || control && w.inMessage {
		return
	}
	w.inMessage = false
	w.begun = time.Time{}
	if w.br.Buffered() > 0 {
		w.begun = time.Now() // the next one has begun
	}
	if w.deadline {
		w.deadline = false
		_ = w.SetReadDeadline(time.Time{})
	}
}

// stop replaces the bounds on reading by close's: the library has none while it
// drains a frame that the peer has begun.
func (w *wire) stop() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closing = true
	_ = w.SetReadDeadline(time.Now().Add(closeTimeout))
}

// upgrade answers the WebSocket handshake of c. When it is valid and before the 101
// goes out, it calls decide; if that returns a refusal, the answer is its status
// instead. The socket has no limit on message length: the reader counts.
func upgrade(w http.ResponseWriter, r *http.Request, c *conn, decide func() error) (*socket, error) {
	u := &upgrader{ResponseWriter: w, decide: decide, cfg: &c.g.cfg}
	ws, err := websocket.Accept(u, r, &websocket.AcceptOptions{
		InsecureSkipVerify: true, // no cookies here: a page that dials has no more rights than any program
		CompressionMode:    websocket.CompressionDisabled,
		OnPingReceived: func(_ context.Context, payload []byte) bool {
			u.wire.rest(true)
			c.pinged(payload)
			return false // the outbox answers
		},
		OnPongReceived: func(_ context.Context, payload []byte) {
			u.wire.rest(true)
			c.out.control.ponged(payload)
		},
	})
	if err != nil {
		return nil, errors.Join(u.refused, err)
	}
	u.ResponseWriter, u.decide = nil, nil // the library keeps u; the request and its headers go
	ws.SetReadLimit(-1)
	return &socket{ws: ws, wire: u.wire}, nil
}

// upgrader is the ResponseWriter that the library gets. It runs decide between the
// handshake's check and the 101, and hands over a connection with small buffers.
type upgrader struct {
	http.ResponseWriter
	decide  func() error
	cfg     *Config
	wire    *wire
	refused error
}

// refusal is an answer with an HTTP status instead of the 101.
type refusal struct {
	status int
	text   string
}

func (e refusal) Error() string { return e.text }

func (u *upgrader) WriteHeader(status int) {
	if status != http.StatusSwitchingProtocols && u.refused == nil {
		u.ResponseWriter.WriteHeader(status) // Hijack sends the 101
	}
}

func (u *upgrader) Write(p []byte) (int, error) {
	if u.refused != nil {
		return len(p), nil // the library's own words on top of the refusal
	}
	return u.ResponseWriter.Write(p)
}

func (u *upgrader) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	if err := u.decide(); err != nil {
		u.refuse(err)
		return nil, nil, err
	}
	u.ResponseWriter.WriteHeader(http.StatusSwitchingProtocols)
	conn, rw, err := http.NewResponseController(u.ResponseWriter).Hijack()
	if err != nil {
		u.refused = err
		return nil, nil, err
	}
	limitBuffers(conn)
	w := &wire{Conn: conn, writeTimeout: u.cfg.WriteTimeout, messageTimeout: u.cfg.MessageTimeout}
	u.wire = w
	// What the client sent behind its handshake is in the server's buffer.
	early, _ := rw.Reader.Peek(rw.Reader.Buffered()) // as much as is buffered is there
	w.br = bufio.NewReaderSize(io.MultiReader(bytes.NewReader(bytes.Clone(early)), w), max(readBuffer, len(early)))
	if _, err := w.br.Peek(len(early)); err != nil {
		return nil, nil, err
	}
	if len(early) > 0 {
		w.begun = time.Now()
	}
	return w, bufio.NewReadWriter(w.br, bufio.NewWriterSize(w, writeBuffer)), nil
}

// limitBuffers keeps the kernel from taking megabytes for a peer that reads slowly,
// or from one that is not read: a ping would wait behind them for too long.
func limitBuffers(conn net.Conn) {
	type buffered interface {
		SetReadBuffer(int) error
		SetWriteBuffer(int) error
	}
	for ; conn != nil; conn = under(conn) {
		if c, ok := conn.(buffered); ok {
			_, _ = c.SetReadBuffer(socketBuffer), c.SetWriteBuffer(socketBuffer) // wishes
			return
		}
	}
}

// closeWrite ends the direction to the peer, if the connection can do that.
func closeWrite(conn net.Conn) {
	for ; conn != nil; conn = under(conn) {
		if c, ok := conn.(interface{ CloseWrite() error }); ok {
			_ = c.CloseWrite() // it is dropped soon anyway
			return
		}
	}
}

// under is the connection that conn wraps, nil if none is known.
func under(conn net.Conn) net.Conn {
	switch c := conn.(type) {
	case interface{ NetConn() net.Conn }: // TLS
		return c.NetConn()
	case interface{ Raw() net.Conn }: // PROXY protocol
		return c.Raw()
	}
	return nil
}

func (u *upgrader) refuse(err error) {
	u.refused = err
	h := u.ResponseWriter.Header()
	for _, name := range []string{"Upgrade", "Connection", "Sec-WebSocket-Accept"} {
		h.Del(name)
	}
	var r refusal
	if !errors.As(err, &r) {
		r = refusal{http.StatusServiceUnavailable, "try again"}
	}
	refuseUpgrade(u.ResponseWriter, r)
}

// next waits for the next message's first frame. Pings are answered meanwhile.
func (s *socket) next() (io.Reader, error) {
	_, r, err := s.ws.Reader(context.Background()) // a context that can end costs 12 allocations a message
	if err == nil {
		s.wire.begin()
	}
	return r, err
}

// endMessage says that the reader of next has been read to its end.
func (s *socket) endMessage() { s.wire.rest(false) }

// hold has what is written wait for flush, as far as buf has room.
func (s *socket) hold(buf []byte) { s.wire.hold(buf) }

// flush sends what was held back. buf of hold is the caller's again.
func (s *socket) flush() error { return s.wire.flush() }

// write sends one text message.
func (s *socket) write(p []byte) error {
	s.wire.setWriting(true)
	defer s.wire.setWriting(false)
	return s.ws.Write(context.Background(), websocket.MessageText, p)
}

// opcode of a control frame.
type opcode byte

const (
	opPing opcode = 0x9
	opPong opcode = 0xa
)

// writeControl sends a control frame, past the library, which would wait for it no
// longer than 5 s and then break the connection. Only the goroutine that writes
// messages calls it, and so never within one.
func (s *socket) writeControl(op opcode, payload []byte) error {
	const final = 0x80
	frame := append(make([]byte, 0, 2+len(payload)), final|byte(op), byte(len(payload))) //nolint:gosec // at most 125
	_, err := s.wire.Write(append(frame, payload...))
	return err
}

// close sends a close frame, waits for the peer's (at most 5 s), and closes. A code
// that may not be in one closes this direction only: dropped at once, what was
// written last could be lost with what the peer has sent meanwhile.
func (s *socket) close(c closeCode, ended <-chan struct{}) {
	if !sendable(c.code) {
		closeWrite(s.wire.Conn)
		select {
		case <-ended:
		case <-time.After(dropPatience):
		}
		s.drop()
		return
	}
	s.wire.stop()
	_ = s.ws.Close(websocket.StatusCode(c.code), c.reason) // whatever fails, the connection is closed
}

// drop closes the connection without a word, even while close waits for the peer.
func (s *socket) drop() {
	_ = s.wire.Conn.Close() // CloseNow alone would wait for a close under way
	_ = s.ws.CloseNow()
}

// peerCode says with which code a peer ended the connection, from the error of a
// read; ok is false if it sent no close frame.
func peerCode(err error) (code int, ok bool) {
	code = int(websocket.CloseStatus(err))
	return code, code != -1
}

// brokeProtocol reports whether a read failed because of what the peer sent, and
// not because the connection ended.
func brokeProtocol(err error) bool {
	var netErr net.Error
	_, closed := peerCode(err)
	return !closed && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) &&
		!errors.Is(err, net.ErrClosed) && !errors.Is(err, io.ErrClosedPipe) && !errors.As(err, &netErr)
}
