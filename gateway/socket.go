package gateway

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	bin "encoding/binary"
	"errors"
	"io"
	"net"
	"net/http"
	"sync"
	"syscall"
	"time"

	"github.com/coder/websocket"
)

// This file is the only one of the gateway that touches the WebSocket library. The
// library shakes hands, reads and closes; frames are written here.
//                                                           (docs/adr/0001)

// socket is one WebSocket connection. Reader and writer are one goroutine each; drop
// may be called by any.
type socket struct {
	ws   *websocket.Conn
	wire *wire
}

// wire is the net.Conn under a socket. It bounds each write, and each message that
// has begun to arrive, in time; silence between messages is not bounded. It reads
// into a buffer that the connection has only while there is something in it: so a
// connection that rests keeps none, and a busy one needs few system calls.
type wire struct {
	net.Conn
	writeTimeout   time.Duration
	messageTimeout time.Duration

	// Static.
	br    *bufio.Reader
	raw   syscall.RawConn       // of a plain TCP connection; nil: its bytes come through Conn
	ready func(fd uintptr) bool // fill
	pongs *control              // takes pongs that come alone

	// Owned by the reading goroutine, and by close's once closing is set. The library
	// has only one of them read at a time.
	buf       *[readSize]byte // holds unread; nil: that came with the handshake, or there is none
	unread    []byte
	failed    error // of the last system call; nil with nothing unread: the end
	inHand    bool  // bytes of a message have been read, and not its end
	inMessage bool  // between a message's first header and its end
	deadline  bool  // a read deadline is set

	mu      sync.Mutex
	closing bool // close reads now, with a time limit of its own

	// Guarded by out, which is held while something is written.
	out  sync.Mutex
	over bool   // a close frame has been written, or a part of a frame: nothing may follow
	owed []byte // what tryWrite could not write: it comes first
}

// readBuffers are used by connections that have something to read.
var readBuffers = sync.Pool{New: func() any { return new([readSize]byte) }}

// Read implements net.Conn for the library.
func (w *wire) Read(p []byte) (int, error) {
	if len(w.unread) == 0 {
		w.bound()
		if w.raw == nil {
			n, err := w.Conn.Read(p)
			w.inHand = w.inHand || n > 0
			return n, err
		}
		if err := w.raw.Read(w.ready); err != nil {
			return 0, err
		}
		if len(w.unread) == 0 {
			return 0, cmp.Or(w.failed, io.EOF)
		}
	}
	n := copy(p, w.unread)
	if w.unread = w.unread[n:]; len(w.unread) == 0 {
		if w.buf != nil {
			readBuffers.Put(w.buf)
		}
		w.buf, w.unread = nil, nil
	}
	w.inHand = true
	return n, nil
}

// fill reads what is there. It returns false when that is nothing yet.
func (w *wire) fill(fd uintptr) bool {
	buf := readBuffers.Get().(*[readSize]byte)
	n, err := readFD(fd, buf[:])
	if n > 0 && w.tookPong(buf[:n]) {
		n, err = readFD(fd, buf[:])
	}
	if n > 0 {
		w.buf, w.unread = buf, buf[:n]
		return true
	}
	readBuffers.Put(buf)
	w.failed = err
	return !errors.Is(err, syscall.EAGAIN)
}

// tookPong reports whether p, all that has arrived, is a whole pong between two messages,
// and takes it: the library makes a context with a timer for each control frame, and a
// pong is all that an idle peer sends.
func (w *wire) tookPong(p []byte) bool {
	const header, masked = 2 + 4, 0x80 // the mask included
	n := len(p) - header
	if w.inHand || w.inMessage || n < 0 || n > 125 || p[0] != final|byte(opPong) || p[1] != masked|byte(n) {
		return false
	}
	for i := range n {
		p[header+i] ^= p[2+i%4]
	}
	w.pongs.ponged(p[header:])
	return true
}

// bound sets a deadline if the peer owes the rest of a message.
func (w *wire) bound() {
	if !w.inHand || w.deadline {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.closing {
		w.deadline = true
		_ = w.SetReadDeadline(time.Now().Add(w.messageTimeout)) // fails only when closed, and then the read fails too
	}
}

// begin says that a message's first header has been read.
func (w *wire) begin() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.closing {
		w.inMessage = true
	}
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
	w.inHand = w.br.Buffered() > 0 // of the next one
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

// Write implements net.Conn for the library, which writes nothing but a close frame:
// its own one, or when it has read the peer's or a frame that is against the rules.
func (w *wire) Write(p []byte) (int, error) {
	w.out.Lock()
	defer w.out.Unlock()
	if w.over {
		return 0, net.ErrClosed
	}
	w.over = true
	w.extend()
	if _, err := w.Conn.Write(append(w.owed, p...)); err != nil {
		return 0, err
	}
	return len(p), nil
}

// extend gives what is written next its time. w.out is held.
func (w *wire) extend() {
	_ = w.SetWriteDeadline(time.Now().Add(w.writeTimeout)) // fails only when closed, and then the write fails too
}

// writeFrames writes whole frames, which appendFrame made, and then rest, if it is
// not empty: the end of the last of them. Nothing follows a close frame.
func (w *wire) writeFrames(frames, rest []byte) error {
	w.out.Lock()
	defer w.out.Unlock()
	if w.over {
		return net.ErrClosed
	}
	if len(w.owed) > 0 {
		frames, w.owed = append(w.owed, frames...), nil
	}
	w.extend()
	var err error
	if len(rest) == 0 {
		_, err = w.Conn.Write(frames)
	} else {
		both := net.Buffers{frames, rest}
		_, err = both.WriteTo(w.Conn)
	}
	w.over = err != nil
	return err
}

// tryWrite writes a frame, as far as the socket takes it at once. It returns false if it
// owes the rest then: that comes before whatever is written next, which the caller has to
// bring about. Nothing may be owed before.
func (w *wire) tryWrite(frame []byte) bool {
	if !w.out.TryLock() {
		return true // the library writes a close frame, which nothing follows
	}
	defer w.out.Unlock()
	if w.over {
		return true
	}
	n := 0
	if w.raw != nil {
		_ = w.raw.Control(func(fd uintptr) { n = writeFD(fd, frame) }) // fails only when closed, and then the next write fails too
	}
	if n == len(frame) {
		return true
	}
	w.owed = bytes.Clone(frame[n:])
	return false
}

// upgrade answers the WebSocket handshake of c. When it is valid and before the 101
// goes out, it calls decide; if that returns a refusal, the answer is its status
// instead. The socket has no limit on message length: the reader counts.
func upgrade(w http.ResponseWriter, r *http.Request, c *conn, decide func() error) (*socket, error) {
	u := &upgrader{ResponseWriter: w, decide: decide, conn: c}
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
	conn    *conn
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
	cfg := &u.conn.g.cfg
	w := &wire{Conn: conn, writeTimeout: cfg.WriteTimeout, messageTimeout: cfg.MessageTimeout, pongs: &u.conn.out.control}
	w.raw, w.ready = rawConn(conn), w.fill
	// What the client sent behind its handshake is in the server's buffer.
	early, _ := rw.Reader.Peek(rw.Reader.Buffered()) // as much as is buffered is there
	w.unread = bytes.Clone(early)
	size := readBuffer
	if w.raw == nil {
		size = ownReadBuffer
	}
	w.br = bufio.NewReaderSize(w, size)
	u.wire = w
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

// opcode of a frame (RFC 6455, 5.2).
type opcode byte

const (
	opText opcode = 0x1
	opPing opcode = 0x9
	opPong opcode = 0xa
)

// final is the bit of a frame that is the last of its message.
const final = 0x80

// appendFrame appends a frame that is a whole message, or a control frame.
func appendFrame(b []byte, op opcode, payload []byte) []byte {
	return append(appendHeader(b, op, len(payload)), payload...)
}

// appendHeader appends the header of a frame whose payload has n bytes.
func appendHeader(b []byte, op opcode, n int) []byte {
	switch {
	case n <= 125:
		return append(b, final|byte(op), byte(n)) //nolint:gosec // at most 125
	case n <= 0xffff:
		return bin.BigEndian.AppendUint16(append(b, final|byte(op), 126), uint16(n))
	}
	return bin.BigEndian.AppendUint64(append(b, final|byte(op), 127), uint64(n))
}

// write writes what appendFrame made, past the library, whose writer flushes each
// message and waits for a control frame no longer than 5 s. rest, if it is not empty,
// is the end of the last frame.
func (s *socket) write(frames, rest []byte) error { return s.wire.writeFrames(frames, rest) }

// tryWrite writes a frame without waiting. It returns false if that took only a part of
// it, or nothing: the rest leaves with the next write.
func (s *socket) tryWrite(frame []byte) bool { return s.wire.tryWrite(frame) }

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
