package testenv

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
)

// relay is a server whose one connection is scripted by the test.
type relay struct {
	*httptest.Server
	request chan *http.Request
	ws      chan *websocket.Conn
}

func newRelay(t *testing.T, start func(*httptest.Server)) *relay {
	t.Helper()
	r := &relay{request: make(chan *http.Request, 1), ws: make(chan *websocket.Conn, 1)}
	r.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		ws, err := websocket.Accept(w, req, nil)
		if err != nil {
			t.Error(err)
			return
		}
		ws.SetReadLimit(-1)
		t.Cleanup(func() { ws.CloseNow() })
		r.request <- req
		r.ws <- ws
	}))
	start(r.Server)
	t.Cleanup(r.Close)
	return r
}

func (r *relay) url() string { return "ws" + strings.TrimPrefix(r.URL, "http") }

// dialPhone returns both ends of a phone's connection.
func dialPhone(t *testing.T) (*Phone, *websocket.Conn) {
	t.Helper()
	r := newRelay(t, (*httptest.Server).Start)
	p := must(DialPhone(within(t, 10*time.Second), r.url(), PhoneOptions{ServerID: "s"}))(t)
	t.Cleanup(p.Drop)
	return p, <-r.ws
}

func dialBinary(t *testing.T) (*Binary, *websocket.Conn) {
	t.Helper()
	r := newRelay(t, (*httptest.Server).Start)
	b := must(DialBinary(within(t, 10*time.Second), r.url(), BinaryOptions{ServerID: "s"}))(t)
	t.Cleanup(b.Drop)
	return b, <-r.ws
}

func TestDialSendsHeaders(t *testing.T) {
	tests := []struct {
		name string
		dial func(ctx context.Context, url string) (*Peer, error)
		path string
		want http.Header
	}{
		{
			name: "phone, defaults",
			dial: func(ctx context.Context, url string) (*Peer, error) {
				p, err := DialPhone(ctx, url, PhoneOptions{ServerID: "s"})
				return p.Peer, err
			},
			path: "/v1/client",
			want: http.Header{
				"X-Pyrycode-Server": {"s"},
				"X-Pyrycode-Token":  {DefaultToken},
				"User-Agent":        {DefaultUserAgent},
			},
		},
		{
			name: "phone, overridden",
			dial: func(ctx context.Context, url string) (*Peer, error) {
				p, err := DialPhone(ctx, url, PhoneOptions{
					ServerID: "s", Token: "t", UserAgent: "a", DeviceName: "d",
					Header: http.Header{"x-pyrycode-token": nil, "User-Agent": nil, "X-Pyrycode-Server": {"other"}, "X-Extra": {""}},
				})
				return p.Peer, err
			},
			path: "/v1/client",
			want: http.Header{
				"X-Pyrycode-Server":      {"other"},
				"X-Pyrycode-Device-Name": {"d"},
				"X-Extra":                {""},
			},
		},
		{
			name: "binary, defaults",
			dial: func(ctx context.Context, url string) (*Peer, error) {
				b, err := DialBinary(ctx, url, BinaryOptions{ServerID: "s"})
				return b.Peer, err
			},
			path: "/v1/server",
			want: http.Header{
				"X-Pyrycode-Server":  {"s"},
				"X-Pyrycode-Version": {DefaultVersion},
				"User-Agent":         {DefaultUserAgent},
			},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := newRelay(t, (*httptest.Server).Start)
			p, err := tt.dial(within(t, 10*time.Second), r.url())
			if err != nil {
				t.Fatal(err)
			}
			defer p.Drop()
			req := <-r.request
			got := req.Header.Clone()
			for _, k := range []string{"Connection", "Upgrade", "Sec-Websocket-Key", "Sec-Websocket-Version"} {
				got.Del(k)
			}
			if req.URL.Path != tt.path || !reflect.DeepEqual(got, tt.want) {
				t.Errorf("%s %v; want %s %v", req.URL.Path, got, tt.path, tt.want)
			}
		})
	}
}

func TestDialRefused(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Retry-After", "7")
		http.Error(w, "full", http.StatusServiceUnavailable)
	}))
	defer srv.Close()
	_, err := DialBinary(within(t, 10*time.Second), srv.URL, BinaryOptions{})
	var refused *RefusedError
	if !errors.As(err, &refused) {
		t.Fatalf("%v; want a RefusedError", err)
	}
	if refused.Status != 503 || refused.Header.Get("Retry-After") != "7" || refused.Body != "full\n" {
		t.Errorf("%+v", refused)
	}
}

func TestDialUnanswered(t *testing.T) {
	l := NewListener()
	defer l.Close()
	if _, err := DialPhone(within(t, 20*time.Millisecond), "ws://relay.test", PhoneOptions{DialContext: l.Dial}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("not accepted: %v", err)
	}
	ln := must(net.Listen("tcp", "127.0.0.1:0"))(t)
	defer ln.Close()
	if _, err := DialPhone(within(t, 20*time.Millisecond), "ws://"+ln.Addr().String(), PhoneOptions{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("not answered: %v", err)
	}
}

func TestDialTLS(t *testing.T) {
	r := newRelay(t, (*httptest.Server).StartTLS)
	pool := x509.NewCertPool()
	pool.AddCert(r.Certificate())
	ctx := within(t, 10*time.Second)
	p := must(DialPhone(ctx, r.url(), PhoneOptions{ServerID: "s", TLS: &tls.Config{RootCAs: pool}}))(t)
	ws := <-r.ws
	go func() { _ = ws.Write(ctx, websocket.MessageText, []byte(`1`)) }()
	if got, err := p.Next(ctx); string(got) != `1` || err != nil {
		t.Errorf("got %q, %v", got, err)
	}
	p.Drop()
	if _, _, err := ws.Read(ctx); err == nil || websocket.CloseStatus(err) != -1 {
		t.Errorf("read: %v; want an end without a close frame", err)
	}
}

// The dial's context may end: the connection stays.
func TestDialContextBoundsDialOnly(t *testing.T) {
	r := newRelay(t, (*httptest.Server).Start)
	ctx, cancel := context.WithCancel(t.Context())
	p := must(DialPhone(ctx, r.url(), PhoneOptions{ServerID: "s"}))(t)
	defer p.Drop()
	cancel()
	ws := <-r.ws
	go func() { _, _, _ = ws.Read(t.Context()) }()
	if err := p.Ping(within(t, 10*time.Second)); err != nil {
		t.Error(err)
	}
}

func TestPeerSendsAndReceives(t *testing.T) {
	p, ws := dialPhone(t)
	ctx := within(t, 20*time.Second)
	big := bytes.Repeat([]byte("x"), 3<<20)
	go func() {
		err := p.Send(ctx, []byte(`"text"`))
		err = errors.Join(err, p.SendBinary(ctx, []byte(`"binary"`)))
		err = errors.Join(err, p.SendFragments(ctx, []byte(`"in `), []byte(`three `), []byte(`parts"`)))
		if err = errors.Join(err, p.Send(ctx, big)); err != nil {
			t.Error(err)
		}
	}()
	want := []Message{{false, []byte(`"text"`)}, {true, []byte(`"binary"`)}, {false, []byte(`"in three parts"`)}, {false, big}}
	for _, w := range want {
		typ, b, err := ws.Read(ctx)
		if err != nil || (typ == websocket.MessageBinary) != w.Binary || !bytes.Equal(b, w.Data) {
			t.Fatalf("relay got %v %.20q, %v; want %.20q", typ, b, err, w.Data)
		}
		if err := ws.Write(ctx, typ, b); err != nil {
			t.Fatal(err)
		}
	}
	for _, w := range want {
		if got, err := p.NextMessage(ctx); err != nil || !reflect.DeepEqual(got, w) {
			t.Fatalf("phone got %v %.20q, %v; want %.20q", got.Binary, got.Data, err, w.Data)
		}
	}
}

func TestPeerClosedByRelay(t *testing.T) {
	tests := []struct {
		name string
		end  func(*websocket.Conn)
		want CloseInfo
	}{
		{"code and reason", func(ws *websocket.Conn) { ws.Close(4404, "no server with that id") }, CloseInfo{4404, "no server with that id"}},
		{"empty close frame", func(ws *websocket.Conn) { ws.Close(websocket.StatusNoStatusRcvd, "") }, CloseInfo{1005, ""}},
		{"no close frame", func(ws *websocket.Conn) { ws.CloseNow() }, CloseInfo{1006, ""}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p, ws := dialPhone(t)
			ctx := within(t, 10*time.Second)
			if err := ws.Write(ctx, websocket.MessageText, []byte(`"last"`)); err != nil {
				t.Fatal(err)
			}
			tt.end(ws)
			if got, err := p.Closed(ctx); err != nil || got != tt.want {
				t.Errorf("closed %v, %v; want %v", got, err, tt.want)
			}
			if got, err := p.Next(ctx); string(got) != `"last"` || err != nil {
				t.Errorf("next %q, %v; want what was queued", got, err)
			}
			var info CloseInfo
			if _, err := p.Next(ctx); !errors.As(err, &info) || info != tt.want {
				t.Errorf("next: %v; want %v", err, tt.want)
			}
			if err := p.Close(1000, ""); err != nil {
				t.Errorf("close after the end: %v", err)
			}
			p.Drop()
		})
	}
}

// However the echo of a close frame is read, by the reader or by the library's
// Close, it is reported; also amid traffic.
func TestPeerCloses(t *testing.T) {
	for i := range 50 {
		p, ws := dialPhone(t)
		ctx := within(t, 10*time.Second)
		go func() {
			for ws.Write(ctx, websocket.MessageText, []byte(`1`)) == nil {
			}
		}()
		seen := make(chan error, 1)
		go func() {
			_, _, err := ws.Read(ctx)
			seen <- err
		}()
		if _, err := p.Next(ctx); err != nil {
			t.Fatal(err)
		}
		if err := p.Close(4000+i, "bye"); err != nil {
			t.Fatalf("close: %v", err)
		}
		if got, err := p.Closed(ctx); err != nil || got.Code != 4000+i {
			t.Fatalf("closed %v, %v; want %d", got, err, 4000+i)
		}
		if got := websocket.CloseStatus(<-seen); int(got) != 4000+i {
			t.Fatalf("relay saw %d; want %d", got, 4000+i)
		}
	}
}

func TestPeerDrops(t *testing.T) {
	p, ws := dialPhone(t)
	ctx := within(t, 10*time.Second)
	p.Pause() // does not keep Drop from working
	p.Drop()
	p.Drop()
	if got, err := p.Closed(ctx); err != nil || got.Code != 1006 {
		t.Errorf("closed %v, %v; want 1006", got, err)
	}
	if _, _, err := ws.Read(ctx); err == nil || websocket.CloseStatus(err) != -1 {
		t.Errorf("relay read: %v; want an end without a close frame", err)
	}
	if err := p.Send(ctx, []byte(`1`)); err == nil {
		t.Error("sent after Drop")
	}
}

// A paused peer answers no ping, and the relay's writes get stuck.
func TestPeerPauses(t *testing.T) {
	p, ws := dialPhone(t)
	ctx := within(t, 20*time.Second)
	ws.CloseRead(ctx)
	if err := ws.Ping(ctx); err != nil {
		t.Fatal(err)
	}
	p.Pause()
	if err := ws.Ping(within(t, 50*time.Millisecond)); err == nil {
		t.Error("paused peer answered a ping")
	}
	const messages = 32
	big := bytes.Repeat([]byte("x"), 1<<20)
	sent := make(chan error, messages)
	go func() {
		for range messages {
			sent <- ws.Write(ctx, websocket.MessageText, big)
		}
	}()
	if _, err := p.Next(within(t, 50*time.Millisecond)); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("paused peer received: %v", err)
	}
	if n := len(sent); n == messages {
		t.Errorf("all %d MiB went to a paused peer", n)
	}
	p.Unpause()
	for range messages {
		if got, err := p.Next(ctx); err != nil || !bytes.Equal(got, big) {
			t.Fatalf("%d bytes, %v", len(got), err)
		}
	}
}

func TestPeerQueuesForSlowConsumer(t *testing.T) {
	p, ws := dialPhone(t)
	ctx := within(t, 20*time.Second)
	const n = 10_000
	for i := range n {
		if err := ws.Write(ctx, websocket.MessageText, fmt.Appendf(nil, "%d", i)); err != nil {
			t.Fatal(err)
		}
	}
	for i := range n {
		if got, err := p.Next(ctx); err != nil || string(got) != fmt.Sprint(i) {
			t.Fatalf("got %q, %v; want %d", got, err, i)
		}
	}
}

func TestBinarySendsEnvelopes(t *testing.T) {
	b, ws := dialBinary(t)
	ctx := within(t, 10*time.Second)
	tests := []struct {
		send func() error
		want string
	}{
		{func() error { return b.Send(ctx, "c-1", []byte("{ \"a\" : \"<\\u00e9\"}")) }, "{\"conn_id\":\"c-1\",\"frame\":{ \"a\" : \"<\\u00e9\"}}"},
		{func() error { return b.SendClose(ctx, "c-1", 4401, nil) }, `{"conn_id":"c-1","close_code":4401}`},
		{func() error { return b.SendClose(ctx, "c-1", 4401, []byte(`null`)) }, `{"conn_id":"c-1","frame":null,"close_code":4401}`},
		{func() error { return b.SendRaw(ctx, []byte(`garbage`)) }, `garbage`},
	}
	for _, tt := range tests {
		if err := tt.send(); err != nil {
			t.Fatal(err)
		}
		if _, got, err := ws.Read(ctx); string(got) != tt.want || err != nil {
			t.Errorf("got %s, %v; want %s", got, err, tt.want)
		}
	}
}

func TestBinaryReceivesEnvelopes(t *testing.T) {
	deep := strings.Repeat("[", 10_000) + strings.Repeat("]", 10_000)
	tests := []struct {
		raw  string
		want Envelope
	}{
		{`{"conn_id":"c","frame":{ "a" : 1.0},"token":""}`, Envelope{ConnID: "c", Frame: []byte(`{ "a" : 1.0}`), HasToken: true}},
		{"{\"conn_id\":\"c\",\"frame\":\"\xff\",\"token\":\"t\"}", Envelope{ConnID: "c", Frame: []byte("\"\xff\""), Token: "t", HasToken: true}},
		{`{"conn_id":"c","frame":null}`, Envelope{ConnID: "c", Frame: []byte(`null`)}},
		{`{"conn_id":"c","close_code":1001}`, Envelope{ConnID: "c", CloseCode: 1001, HasClose: true}},
		{`{"conn_id":"c","frame":` + deep + `,"other":{}}`, Envelope{ConnID: "c", Frame: []byte(deep)}},
	}
	b, ws := dialBinary(t)
	ctx := within(t, 10*time.Second)
	for _, tt := range tests {
		if err := ws.Write(ctx, websocket.MessageText, []byte(tt.raw)); err != nil {
			t.Fatal(err)
		}
		tt.want.Raw = []byte(tt.raw)
		if got, err := b.NextEnvelope(ctx); err != nil || !reflect.DeepEqual(got, tt.want) {
			t.Errorf("%.80q: got %.80v, %v", tt.raw, got, err)
		}
	}
}

func TestParseEnvelopeRejects(t *testing.T) {
	for _, raw := range []string{``, `[]`, `1`, `{`, `{"frame":}`, `{"conn_id":1}`, `{"conn_id":"c"} {}`, `{"conn_id":"c"`, `{"close_code":"1"}`, `{"frame":1 2}`} {
		if e, err := parseEnvelope([]byte(raw)); err == nil {
			t.Errorf("%q: %+v, %v", raw, e, err)
		} else if string(e.Raw) != raw {
			t.Errorf("%q: raw %q", raw, e.Raw)
		}
	}
}
