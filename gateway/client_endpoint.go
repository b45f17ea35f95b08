package gateway

import (
	"errors"
	"log/slog"
	"net/http"

	"github.com/pyrycode/pyrycode-relay/bus"
	"github.com/pyrycode/pyrycode-relay/registry"
)

// ClientHandler serves /v1/client for phones of r's node: it checks the request,
// attaches the phone to its binary, wherever that is, and routes its frames until
// the connection ends. Errors are told as HTTP statuses before the upgrade and as
// close codes after it. The connection outlives the request.
//
//	(protocol.md: Endpoints and order of checks)
func ClientHandler(r *registry.Registry, logger *slog.Logger, opts ...Option) http.Handler {
	return http.HandlerFunc(New(r, logger, opts...).serveClient)
}

// phone is one phone connection.
type phone struct {
	conn
	serverID string
	link     *bus.Link
	device   string
	addr     string
	decision error // of the registry, to be told as a close code; nil: attached

	// Owned by the reading goroutine.
	prefix []byte // of the envelopes; nil before the first frame
	token  string // for the first envelope; it is not kept longer
	head   int    // bytes before the frame, in what begin returned
}

func (g *Gateway) serveClient(w http.ResponseWriter, r *http.Request) {
	leave, addr, ok := g.enter(w, r, endpointClient)
	if !ok {
		return
	}
	h, err := readPhoneHeaders(r.Header)
	if err != nil {
		leave(outcomeBadRequest)
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	p := g.newPhone(h, addr)
	sock, err := upgrade(w, r, &p.conn, func() error {
		p.decision = g.reg.RegisterPhone(h.serverID, p, registry.WithLink(p.link))
		if p.decision == nil || errors.Is(p.decision, registry.ErrNoServer) || errors.Is(p.decision, registry.ErrTooManyPhones) {
			return nil
		}
		g.metrics.registerFailed(failureOf(p.decision))
		return refusalFor(p.decision)
	})
	if err != nil {
		g.reg.UnregisterPhone(h.serverID, p.id)
		p.abandon()
		leave(outcomeOf(err))
		return
	}
	p.start(sock)
	g.add(&p.conn)
	go g.run(p, leave)
}

func (g *Gateway) newPhone(h phoneHeaders, addr string) *phone {
	p := &phone{serverID: h.serverID, device: logText(h.deviceName), addr: addr}
	p.init(g, kindPhone, bus.NewConnID(h.serverID), func(code int) {
		p.link.Close(bus.CodeError(code)) //nolint:gosec // closeCode: a close code
	})
	p.link = g.reg.Bus().NewLink(h.serverID, p.id, p)
	if !g.cfg.NoToken {
		p.token = h.token
	}
	return p
}

func (p *phone) base() *conn { return &p.conn }

func (p *phone) serve() {
	if p.decision != nil {
		p.refuse()
		return
	}
	p.g.phones.Add(1)
	serverID, connID := logServerID(p.serverID), logConnID(p.id)
	p.g.log.Info("phone_registered", "server_id", serverID, "conn_id", connID, "device_name", p.device, "remote", p.addr)
	err := p.readMessages(p)
	code := p.endedAs(err)
	p.link.Close(bus.CodeError(code)) //nolint:gosec // a close code
	p.g.reg.UnregisterPhone(p.serverID, p.id)
	p.g.phones.Add(-1)
	p.g.log.Info("phone_unregistered", "server_id", serverID, "conn_id", connID, "code", code)
}

// refuse tells a phone that was upgraded why it is not attached.
func (p *phone) refuse() {
	p.g.metrics.registerFailed(failureOf(p.decision))
	if errors.Is(p.decision, registry.ErrNoServer) {
		p.g.log.Info("phone_register_no_server", "server_id", logServerID(p.serverID), "remote", p.addr)
	}
	p.closeAs(codeFor(p.decision))
	_ = p.readMessages(discard{}) // until the close frame has been answered
}

// ended implements peer. What did not reach the phone is lost with its session.
func (p *phone) ended([]message) {}

// begin implements sink: a frame is read into its envelope.
func (p *phone) begin(size int) []byte {
	prefix := p.prefix
	if prefix == nil {
		prefix = upPrefix(p.id, p.token, p.token != "")
	}
	buf := append(bus.NewBuffer(len(prefix)+size+len(upSuffix)), prefix...)
	p.head = len(buf)
	return buf
}

// message implements sink: it passes one frame of the phone on.
func (p *phone) message(buf []byte) {
	if !validFrame(buf[p.head:]) {
		bus.Free(buf)
		p.closeAs(codeNotJSON)
		return
	}
	if p.prefix == nil {
		p.prefix, p.token = upPrefix(p.id, "", false), ""
	}
	_ = p.link.Send(bus.Fit(append(buf, upSuffix...))) // fails when the link has ended, and then End closes the connection
}

// Deliver implements bus.Receiver: one frame of the binary.
func (p *phone) Deliver(l *bus.Link, buf []byte) {
	_ = p.out.put(message{buf, l}) // fails when the phone has gone
}

// End implements bus.Receiver.
func (p *phone) End(_ *bus.Link, err error) { p.closeAs(codeFor(err)) }
