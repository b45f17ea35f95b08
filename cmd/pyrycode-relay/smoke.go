package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"strings"
	"syscall"
	"time"

	"github.com/pyrycode/pyrycode-relay/testenv"
)

const (
	smokeQuiet      = 250 * time.Millisecond // how long nothing must come before it counts as nothing
	smokeLargeFrame = 100 * kib
	smokeCloseCode  = 4321 // of nobody else
	smokeExcerpt    = 40   // bytes of a frame in an error
)

// awkwardFrame is JSON that no decoder and encoder pass on as it is.
const awkwardFrame = `{"html":"<a href='?a=1&b=2'>", "escapes":"\u0041\/\u2028\u0000\ud83d\"\\",	"numbers":[1e400,-0,1.0E+2,` +
	`12345678901234567890.0], "text":"höyry 蒸気 🚂", "twice" :1,"twice": 2, "empty":[ { } ,null ] }`

// smoke plays a binary at one relay address and a phone at another, the two
// halves of a session, and checks step by step that they meet as they should.
func smoke(args []string, c console) int {
	flags := flag.NewFlagSet("pyrycode-relay smoke", flag.ContinueOnError)
	binaryURL := flags.String("url", "", "relay address for the binary, as in ws://127.0.0.1:8080")
	phoneURL := flags.String("url2", "", "relay address for the phone (default: that of the binary)")
	timeout := flags.Duration("timeout", 30*time.Second, "for all steps together")
	if code, ok := c.parseTool(flags, args); !ok {
		return code
	}
	if err := checkURL(*binaryURL, "ws", "wss"); err != nil {
		return c.usageError(fmt.Errorf("--url %w", err))
	}
	if err := checkURL(cmp.Or(*phoneURL, *binaryURL), "ws", "wss"); err != nil {
		return c.usageError(fmt.Errorf("--url2 %w", err))
	}
	if *timeout <= 0 {
		return c.usageError(fmt.Errorf("--timeout %v: want more than nothing, e.g. 30s", *timeout))
	}
	ctx, cancel := context.WithTimeoutCause(context.Background(), *timeout, fmt.Errorf("--timeout %v is over", *timeout))
	defer cancel()
	s := &smokeSession{
		binaryURL: strings.TrimSuffix(*binaryURL, "/"),
		phoneURL:  strings.TrimSuffix(cmp.Or(*phoneURL, *binaryURL), "/"),
		serverID:  randomUUID(),
		token:     "smoke-" + rand.Text(),
	}
	defer s.end()
	if !s.run(ctx, c.stdout) {
		return exitFailed
	}
	return exitOK
}

// smokeSession is what the steps hand on to each other. Its peers end with it.
type smokeSession struct {
	binaryURL, phoneURL string
	serverID, token     string

	binary *testenv.Binary
	phones []*testenv.Phone
	connID string // of the last phone, as its envelopes name it
}

// smokeStep is one thing to prove. Its error is "want …, got …".
type smokeStep struct {
	proves string
	run    func(*smokeSession, context.Context) error
	hint   string // when it fails for a reason that says nothing by itself
}

var smokeSteps = []smokeStep{
	{"a phone without a binary is closed 4404", (*smokeSession).phoneWithoutBinary,
		"the registry has to decide look-ups: see pyrycode-relay status"},
	{"a binary claims its server-id", (*smokeSession).claim,
		"the registry has to decide claims: see pyrycode-relay status"},
	{"a phone's first frame reaches the binary byte for byte, with the token", (*smokeSession).firstFrame,
		"with two addresses, do both nodes use the same NATS? Without a token only: is --forward-token off?"},
	{"a frame reaches the phone byte for byte, as text", (*smokeSession).reply,
		"is a proxy in between that changes messages?"},
	{"the second frame comes without the token", (*smokeSession).secondFrame, ""},
	{"a frame of 100 KiB goes there and back", (*smokeSession).largeFrame,
		"does a proxy, NATS' max_payload or --max-frame-bytes limit messages?"},
	{"the binary closes a phone: last frame, then its code, and no close notice", (*smokeSession).closeDirective, ""},
	{"a phone that leaves gives the binary a close notice with its code", (*smokeSession).closeNotice, ""},
}

// run takes the steps up to the first that fails, and reports on out.
func (s *smokeSession) run(ctx context.Context, out io.Writer) bool {
	for _, step := range smokeSteps {
		start := time.Now()
		err := step.run(s, ctx)
		verdict := "ok"
		if err != nil {
			verdict = "FAIL"
		}
		fmt.Fprintf(out, "%-4s %5d ms  %s\n", verdict, time.Since(start).Milliseconds(), step.proves)
		if err != nil {
			fmt.Fprintf(out, "     %v\n", err)
			if hint := cmp.Or(dialHint(err), step.hint); hint != "" {
				fmt.Fprintf(out, "     hint: %s\n", hint)
			}
			return false
		}
	}
	return true
}

// end lets go of the peers.
func (s *smokeSession) end() {
	for _, phone := range s.phones {
		phone.Drop()
	}
	if s.binary != nil {
		_ = s.binary.Close(1000, "") // whether the relay answers proves nothing more
	}
}

func (s *smokeSession) phoneWithoutBinary(ctx context.Context) error {
	phone, err := s.dialPhone(ctx)
	if err != nil {
		return err
	}
	return wantClosed(ctx, phone, testenv.CloseInfo{Code: 4404, Reason: "no server with that id"})
}

func (s *smokeSession) claim(ctx context.Context) (err error) {
	s.binary, err = testenv.DialBinary(ctx, s.binaryURL, testenv.BinaryOptions{ServerID: s.serverID})
	if err != nil {
		return fmt.Errorf("want an upgrade, got: %w", err)
	}
	return nil
}

func (s *smokeSession) firstFrame(ctx context.Context) error {
	phone, err := s.dialPhone(ctx)
	if err != nil {
		return err
	}
	return s.sendUp(ctx, phone, []byte(awkwardFrame), true)
}

func (s *smokeSession) reply(ctx context.Context) error {
	return s.sendDown(ctx, []byte(awkwardFrame))
}

func (s *smokeSession) secondFrame(ctx context.Context) error {
	return s.sendUp(ctx, s.phone(), []byte(`"second"`), false)
}

func (s *smokeSession) largeFrame(ctx context.Context) error {
	frame := []byte(`"` + strings.Repeat("0123456789abcdef", smokeLargeFrame/16) + `"`)
	if err := s.sendUp(ctx, s.phone(), frame, false); err != nil {
		return err
	}
	return s.sendDown(ctx, frame)
}

func (s *smokeSession) closeDirective(ctx context.Context) error {
	last := []byte(`"last"`)
	if err := s.binary.SendClose(ctx, s.connID, smokeCloseCode, last); err != nil {
		return fmt.Errorf("want the binary to send, got: %w", err)
	}
	if err := wantMessage(ctx, s.phone(), last); err != nil {
		return err
	}
	if err := wantClosed(ctx, s.phone(), testenv.CloseInfo{Code: smokeCloseCode}); err != nil {
		return err
	}
	return s.wantQuiet(ctx)
}

func (s *smokeSession) closeNotice(ctx context.Context) error {
	phone, err := s.dialPhone(ctx)
	if err != nil {
		return err
	}
	if err := s.sendUp(ctx, phone, []byte(`"hello"`), true); err != nil {
		return err
	}
	if err := phone.Close(1000, ""); err != nil {
		return fmt.Errorf("want the relay to answer a close, got: %w", err)
	}
	e, err := s.binary.NextEnvelope(ctx)
	if err != nil {
		return fmt.Errorf("want a close notice, got: %w", err)
	}
	if e.ConnID != s.connID || e.CloseCode != 1000 || e.Frame != nil {
		return fmt.Errorf("want a close notice with 1000 for that phone, got %s", describe(e))
	}
	return s.wantQuiet(ctx)
}

// phone returns the last one.
func (s *smokeSession) phone() *testenv.Phone { return s.phones[len(s.phones)-1] }

func (s *smokeSession) dialPhone(ctx context.Context) (*testenv.Phone, error) {
	phone, err := testenv.DialPhone(ctx, s.phoneURL, testenv.PhoneOptions{
		ServerID: s.serverID, Token: s.token, DeviceName: "smoke",
	})
	if err != nil {
		return nil, fmt.Errorf("want an upgrade, got: %w", err)
	}
	s.phones = append(s.phones, phone)
	return phone, nil
}

// sendUp sends frame from phone and checks its envelope. The first of a phone
// has the token, and tells its connection id.
func (s *smokeSession) sendUp(ctx context.Context, phone *testenv.Phone, frame []byte, first bool) error {
	if err := phone.Send(ctx, frame); err != nil {
		return fmt.Errorf("want the phone to send, got: %w", err)
	}
	e, err := s.binary.NextEnvelope(ctx)
	if err != nil {
		return fmt.Errorf("want an envelope at the binary, got: %w%s", err, phoneEnd(phone))
	}
	if first {
		s.connID = e.ConnID
	}
	switch {
	case e.ConnID == "" || e.ConnID != s.connID:
		return fmt.Errorf("want conn_id %q, got %q", s.connID, e.ConnID)
	case e.HasClose:
		return fmt.Errorf("want a frame, got a close notice with %d", e.CloseCode)
	case first && !e.HasToken:
		return errors.New("want the token, got an envelope without")
	case first && e.Token != s.token:
		return errors.New("want the phone's token, got another one")
	case !first && e.HasToken:
		return errors.New("want no token, got one")
	}
	return wantBytes(e.Frame, frame)
}

// phoneEnd says how phone ended, if it did.
func phoneEnd(phone *testenv.Phone) string {
	select {
	case <-phone.Done():
		info, _ := phone.Closed(context.Background()) // does not wait
		return fmt.Sprintf("; the phone was %v", info)
	default:
		return ""
	}
}

// sendDown sends frame to the last phone and checks what that receives.
func (s *smokeSession) sendDown(ctx context.Context, frame []byte) error {
	if err := s.binary.Send(ctx, s.connID, frame); err != nil {
		return fmt.Errorf("want the binary to send, got: %w", err)
	}
	return wantMessage(ctx, s.phone(), frame)
}

// wantQuiet checks that the binary hears nothing for a while.
func (s *smokeSession) wantQuiet(ctx context.Context) error {
	short, cancel := context.WithTimeout(ctx, smokeQuiet)
	defer cancel()
	e, err := s.binary.NextEnvelope(short)
	switch {
	case err == nil:
		return fmt.Errorf("want nothing more at the binary, got %s", describe(e))
	case !errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("want the binary left alone, got: %w", err)
	}
	return nil
}

func wantClosed(ctx context.Context, phone *testenv.Phone, want testenv.CloseInfo) error {
	got, err := phone.Closed(ctx)
	if err != nil {
		return fmt.Errorf("want the phone %w, got: %w", want, err)
	}
	if got != want {
		return fmt.Errorf("want the phone %w, got it %w", want, got)
	}
	return nil
}

func wantMessage(ctx context.Context, phone *testenv.Phone, frame []byte) error {
	m, err := phone.NextMessage(ctx)
	if err != nil {
		return fmt.Errorf("want a frame at the phone, got: %w", err)
	}
	if m.Binary {
		return errors.New("want a text message, got a binary one")
	}
	return wantBytes(m.Data, frame)
}

// wantBytes says where two frames part.
func wantBytes(got, want []byte) error {
	if bytes.Equal(got, want) {
		return nil
	}
	at := 0
	for at < min(len(got), len(want)) && got[at] == want[at] {
		at++
	}
	return fmt.Errorf("want %d bytes, got %d, different from byte %d on: want %s, got %s",
		len(want), len(got), at, excerpt(want, at), excerpt(got, at))
}

// excerpt quotes a few bytes from at on.
func excerpt(b []byte, at int) string {
	return fmt.Sprintf("%q", b[at:min(at+smokeExcerpt, len(b))])
}

// describe leaves out the token.
func describe(e testenv.Envelope) string {
	return fmt.Sprintf("conn_id %q, close_code %d and %d bytes of frame", e.ConnID, e.CloseCode, len(e.Frame))
}

// dialHint says what to look for when a relay does not answer as one.
func dialHint(err error) string {
	if errors.Is(err, syscall.ECONNREFUSED) {
		return "nobody listens there: is it the address that the relay logs with event=listening?"
	}
	refused, ok := errors.AsType[*testenv.RefusedError](err)
	if !ok {
		return ""
	}
	switch refused.Status {
	case http.StatusServiceUnavailable:
		return "the node is not ready, draining or full: see pyrycode-relay status"
	case http.StatusTooManyRequests:
		return "too many upgrades from this address: wait a little, or see --upgrade-burst"
	case http.StatusMisdirectedRequest:
		return "that is not the host name of the relay's --domain"
	case http.StatusNotFound:
		return "is that a public listener of a relay, given without a path?"
	}
	return "is a proxy in between that does not pass on WebSocket upgrades?"
}

// randomUUID returns a server-id as binaries have them: a UUID of version 4.
func randomUUID() string {
	var b [16]byte
	rand.Read(b[:]) // never fails
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}
