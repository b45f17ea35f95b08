package testenv

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coder/websocket"
)

func pipes(t *testing.T) (client, server net.Conn) {
	t.Helper()
	l := NewListener()
	defer l.Close()
	dialed := make(chan net.Conn)
	go func() {
		c, _ := l.Dial(t.Context(), "tcp", "relay.test:80")
		dialed <- c
	}()
	server = must(l.Accept())(t)
	client = <-dialed
	t.Cleanup(func() { client.Close(); server.Close() })
	return client, server
}

func TestPipeReadsAllThenEOF(t *testing.T) {
	client, server := pipes(t)
	write(t, client, "last words")
	client.Close()
	if got, err := io.ReadAll(server); string(got) != "last words" || err != nil {
		t.Fatalf("read %q, %v", got, err)
	}
	if _, err := server.Write([]byte("x")); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("write to a closed peer: %v", err)
	}
	if _, err := client.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("read after Close: %v", err)
	}
	if _, err := client.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
		t.Errorf("write after Close: %v", err)
	}
}

func TestPipeHalfClose(t *testing.T) {
	client, server := pipes(t)
	if err := client.(*pipeConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if _, err := server.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("read: %v; want EOF", err)
	}
	write(t, server, "answer")
	wantRead(t, client, "answer")
}

func TestPipeDeadlinesAreExact(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, _ := pipes(t)
		start := time.Now()
		client.SetReadDeadline(start.Add(7 * time.Second))
		_, err := client.Read(make([]byte, 1))
		if took := time.Since(start); !errors.Is(err, os.ErrDeadlineExceeded) || took != 7*time.Second {
			t.Errorf("read: %v after %v", err, took)
		}
		client.SetWriteDeadline(time.Now().Add(time.Second))
		n, err := client.Write(make([]byte, pipeBytes+1))
		if n != pipeBytes || !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("write: %d, %v", n, err)
		}
	})
}

// Setting a deadline in the past ends a Read that is under way.
func TestPipeDeadlineInterrupts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, server := pipes(t)
		failed := make(chan error)
		go func() {
			_, err := client.Read(make([]byte, 1))
			failed <- err
		}()
		synctest.Wait()
		client.SetDeadline(longAgo)
		if err := <-failed; !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("read: %v", err)
		}
		client.SetDeadline(time.Time{})
		write(t, server, "again")
		wantRead(t, client, "again")
	})
}

func TestPipeWriteBlocksWhileFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, server := pipes(t)
		sent := bytes.Repeat([]byte("0123456789"), 20_000)
		var wrote bool
		go func() {
			_, _ = client.Write(sent) // the reader sees whether it was whole
			wrote = true
			client.Close()
		}()
		synctest.Wait()
		if wrote {
			t.Errorf("%d bytes fitted into %d", len(sent), pipeBytes)
		}
		if got, err := io.ReadAll(server); err != nil || !bytes.Equal(got, sent) {
			t.Errorf("read %d bytes, %v; want %d", len(got), err, len(sent))
		}
	})
}

func TestListenerEnds(t *testing.T) {
	l := NewListener()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := l.Dial(ctx, "tcp", ""); !errors.Is(err, context.Canceled) {
		t.Errorf("dial: %v", err)
	}
	l.Close()
	l.Close()
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("accept: %v", err)
	}
	if _, err := l.Dial(t.Context(), "tcp", ""); !errors.Is(err, net.ErrClosed) {
		t.Errorf("dial: %v", err)
	}
}

// The whole stack runs in a bubble: HTTP server, upgrade, WebSockets of both
// libraries, a pause of a fake minute.
func TestPeerInBubble(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewListener()
		srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			ws, err := websocket.Accept(w, r, nil)
			if err != nil {
				t.Error(err)
				return
			}
			defer ws.CloseNow()
			for {
				typ, b, err := ws.Read(context.Background())
				if err != nil {
					return
				}
				_ = ws.Write(context.Background(), typ, b) // the peer sees it
			}
		})}
		go func() { _ = srv.Serve(l) }() // until Close
		defer srv.Close()

		ctx := t.Context()
		p, err := DialPhone(ctx, "ws://relay.test", PhoneOptions{ServerID: "s", DialContext: l.Dial})
		if err != nil {
			t.Fatal(err)
		}
		p.Pause()
		if err := p.Send(ctx, []byte(`1`)); err != nil {
			t.Fatal(err)
		}
		short, cancel := context.WithTimeout(ctx, time.Minute)
		defer cancel()
		if b, err := p.Next(short); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("paused phone got %q, %v", b, err)
		}
		p.Unpause()
		if b, err := p.Next(ctx); string(b) != `1` || err != nil {
			t.Errorf("got %q, %v", b, err)
		}
		if err := p.Close(1000, "bye"); err != nil {
			t.Error(err)
		}
		if info, _ := p.Closed(ctx); info.Code != 1000 {
			t.Errorf("closed %v", info)
		}
	})
}
