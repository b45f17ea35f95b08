package main

// What peers can cost, whatever they do: nothing, everything at once, one byte at a
// time, or not reading.

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/pyrycode/pyrycode-relay/testenv"
)

// Ten thousand phones that send nothing, a pong neither, cost their node little
// memory, and nobody else anything.
func TestTenThousandSilentPhones_CostLittle(t *testing.T) { // alone: it works, and others have seconds to keep
	const binaries, each, dialers = 10, 32 * kib, 16
	count := withinFileLimit(t, 10_000)
	ctx := scenarioContext(t, time.Minute)
	n := startProcess(t, "--max-phones", strconv.Itoa(count/binaries), "--max-connections", strconv.Itoa(count+1000), "--pong-timeout", "10m")
	pair := converseAcross(ctx, t, n, n, randomUUID())
	var ids [binaries]string
	for i := range ids {
		ids[i] = randomUUID()
		dialBinary(ctx, t, n, ids[i])
	}
	before := n.memory(t)

	start := time.Now()
	phones := make([]*rawPeer, count)
	t.Cleanup(func() { dropAll(phones) })
	var dials sync.WaitGroup
	for d := range dialers {
		dials.Go(func() {
			for i := d; i < count; i += dialers {
				var err error
				if phones[i], err = dialRaw(ctx, n, "/v1/client", ids[i%binaries]); err != nil {
					t.Errorf("phone %d: %v", i, err)
					return
				}
			}
		})
	}
	dials.Wait()
	if t.Failed() {
		t.FailNow()
	}
	eventually(ctx, t, fmt.Sprintf("%d phones", count+1), func() bool { return n.health(t).Phones == count+1 })
	cost := (n.memory(t) - before) / count
	t.Logf("%d phones were there after %v; %d bytes of memory each", count, sinceMS(start), cost)
	if cost > each {
		t.Errorf("a silent phone costs %d bytes, want at most %d", cost, each)
	}
	pair.wantGoingOn(ctx, t, "beside them")

	dropped := time.Now()
	dropAll(phones)
	eventually(ctx, t, "end of the phones", func() bool { return n.health(t).Phones == 1 })
	t.Logf("they were gone after %v", sinceMS(dropped))
	if got := n.health(t).Binaries; got != binaries+1 {
		t.Errorf("%d binaries are left, want %d", got, binaries+1)
	}
	pair.wantWhole(ctx, t, "the pair")
}

// withinFileLimit returns how many of want connections this process and a node can
// have open each.
func withinFileLimit(t *testing.T, want int) int {
	t.Helper()
	const others = 4000 // of both processes, and of tests beside this one
	const least = 1000
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	count := min(want, int(min(limit.Cur, maxCount))-others) //nolint:gosec // at most maxCount
	count -= count % 10
	if count < least {
		t.Fatalf("the limit of %d file descriptors leaves %d connections, want %d at least: raise it (ulimit -n %d)", limit.Cur, count, least, want+others)
	}
	if count < want {
		t.Logf("the limit of %d file descriptors leaves %d connections instead of %d", limit.Cur, count, want)
	}
	return count
}

// Peers that send a message one byte at a time have to finish it in time, although
// bytes keep coming. Those that do are left alone, however long they go on.
func TestSlowPeers_OneByteAtATime(t *testing.T) {
	t.Parallel()
	const limit, every, briskly = 2 * time.Second, 50 * time.Millisecond, 10 * time.Millisecond
	const never, midway, binaries, patient = 24, 24, 24, 4
	ctx := scenarioContext(t, time.Minute)
	n := startProcess(t, "--message-timeout", limit.String(), "--max-phones", "64")
	pair := converseAcross(ctx, t, n, n, randomUUID())
	serverID := randomUUID()
	host := dialBinary(ctx, t, n, serverID)

	connect := func(path, serverID string) *rawPeer {
		t.Helper()
		p, err := dialRaw(ctx, n, path, serverID)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(p.drop)
		return p
	}
	endless := textMessage(`"` + strings.Repeat("x", 1000) + `"`)
	var talks sync.WaitGroup
	defer talks.Wait()
	trickle := func(who string, p *rawPeer) {
		talks.Go(func() {
			took, err := p.trickle(endless, every)
			if err != nil || took < limit-every || took > limit+3*slack {
				t.Errorf("%s that does not finish its message: closed after %v (%v), want %v", who, took, err, limit)
			}
		})
	}
	// Some finish each message: three times as long as the limit, all in all.
	var patients [patient]*rawPeer
	const words = 60
	for i := range patients {
		patients[i] = connect("/v1/client", serverID)
	}
	for range never {
		trickle("a phone", connect("/v1/client", serverID))
	}
	for i := range midway {
		p := connect("/v1/client", serverID)
		if _, err := p.Write(textMessage(fmt.Sprintf(`"hello %d"`, i))); err != nil {
			t.Fatal(err)
		}
		trickle("a phone that has spoken before", p)
	}
	for range binaries {
		trickle("a binary", connect("/v1/server", randomUUID()))
	}
	for i, p := range patients {
		talks.Go(func() {
			for word := range words {
				if err := p.spell(textMessage(fmt.Sprintf("%d%d", i+1, word)), briskly); err != nil {
					t.Errorf("a phone that finishes its messages: %v after %d", err, word)
					return
				}
			}
		})
	}

	var heard [patient]int
	hellos, notices := make(map[string]bool), make(map[string]bool)
	for len(notices) < never+midway || heard != [patient]int{words, words, words, words} {
		e, err := host.NextEnvelope(ctx)
		if err != nil {
			t.Fatalf("%v after %d close notices and %v words", err, len(notices), heard)
		}
		switch {
		case e.HasClose && (e.CloseCode != 1001 || notices[e.ConnID]):
			t.Errorf("the binary got %s, want one notice with 1001 for each phone", e.Raw)
		case e.HasClose:
			notices[e.ConnID] = true
		case bytes.HasPrefix(e.Frame, []byte(`"hello`)):
			hellos[e.ConnID] = true
		default:
			i := int(e.Frame[0] - '1')
			if want := fmt.Sprintf("%d%d", i+1, heard[i]); string(e.Frame) != want {
				t.Fatalf("the binary got %s, want %s", e.Frame, want)
			}
			heard[i]++
		}
	}
	if len(hellos) != midway {
		t.Errorf("the binary got %d first messages, want %d", len(hellos), midway)
	}
	talks.Wait()
	eventually(ctx, t, "end of the slow ones", func() bool { return n.health(t) == health{Binaries: 2, Phones: 1 + patient} })
	pair.wantWhole(ctx, t, "a normal pair")
}

// placements of a binary and its phones, as indexes of nodes.
var placements = map[string]struct{ phones, binary int }{
	"on one node":  {0, 0},
	"on two nodes": {0, 1},
}

// Frames of one byte, from phones to a binary that does not read, and then from it to
// a phone that does not: what waits is bounded and, but for the phone that is closed,
// nothing is lost.
func TestFloodOfTinyFrames_IsBounded(t *testing.T) { // alone: it works, and others have seconds to keep
	const growth = 150 * mib
	p := startPlace(t, calmNATS.get(t), "--write-timeout", "1m", "--pong-timeout", "10m")
	watches := []*memoryWatch{watchMemory(t, p.nodes[0]), watchMemory(t, p.nodes[1])}
	for name, at := range placements {
		t.Run(name, func(t *testing.T) {
			ctx := scenarioContext(t, time.Minute)
			f := newFlood(ctx, t, p.nodes[at.phones], p.nodes[at.binary])
			f.up(ctx, t)
			f.down(ctx, t)
		})
	}
	for i, w := range watches {
		grown := w.grown()
		t.Logf("node %d took %d MiB more, at most", i+1, grown/mib)
		if grown > growth {
			t.Errorf("node %d took %d MiB more, want %d at most", i+1, grown/mib, growth/mib)
		}
	}
}

// flood is sixteen phones and their binary. A frame is one digit: the last one of its
// number.
type flood struct {
	binary  *rawPeer
	phones  [16]*rawPeer
	connIDs [16]string

	received atomic.Int64 // frames by the binary
	notices  chan string  // that it got
	ended    chan struct{}
	err      error // of the binary's reading, once ended is closed
}

func newFlood(ctx context.Context, t *testing.T, forPhones, forBinary *node) *flood {
	t.Helper()
	f := &flood{notices: make(chan string, 16), ended: make(chan struct{})}
	serverID := randomUUID()
	var err error
	if f.binary, err = dialRaw(ctx, forBinary, "/v1/server", serverID); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(f.binary.drop)
	f.binary.reader = bufio.NewReaderSize(f.binary, 64*kib) // nothing has come before the first phone
	for i := range f.phones {
		if f.phones[i], err = dialRaw(ctx, forPhones, "/v1/client", serverID); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(f.phones[i].drop)
		// Otherwise most of a flood waits in the kernel, and has to be read later.
		if err := errors.Join(f.phones[i].SetWriteBuffer(16*kib), f.phones[i].SetReadBuffer(16*kib)); err != nil {
			t.Fatal(err)
		}
		if _, err := f.phones[i].Write(textMessage(`"hello"`)); err != nil {
			t.Fatal(err)
		}
		hello, err := f.binary.next()
		if err != nil {
			t.Fatal(err)
		}
		f.connIDs[i], _ = splitEnvelope(hello)
	}
	return f
}

// up floods the binary, which reads on once all phones are held back.
func (f *flood) up(ctx context.Context, t *testing.T) {
	t.Helper()
	const still = time.Second // that nothing is sent
	const batch = 100         // frames in one write: else the kernel goes on to squeeze a few more in
	var digits []byte
	for n := range batch {
		digits = append(digits, textMessage(strconv.Itoa(n%10))...)
	}
	var sent atomic.Int64
	stop := make(chan struct{})
	var senders sync.WaitGroup
	for i, phone := range f.phones {
		senders.Go(func() {
			for !isClosed(stop) {
				if _, err := phone.Write(digits); err != nil {
					t.Errorf("phone %d floods: %v", i, err)
					return
				}
				sent.Add(batch)
			}
		})
	}
	last, since := int64(-1), time.Now()
	eventually(ctx, t, "end of what phones can send", func() bool {
		if now := sent.Load(); now != last {
			last, since = now, time.Now()
		}
		return time.Since(since) > still
	})
	close(stop)
	held := time.Now()
	go f.read()
	t.Cleanup(func() { f.binary.drop(); <-f.ended })
	senders.Wait()
	eventually(ctx, t, "end of the flood", func() bool { return isClosed(f.ended) || f.received.Load() >= sent.Load() })
	if isClosed(f.ended) {
		t.Fatalf("the binary after %d frames: %v, want %d", f.received.Load(), f.err, sent.Load())
	}
	if got, want := f.received.Load(), sent.Load(); got != want {
		t.Errorf("the binary got %d frames, want %d", got, want)
	}
	t.Logf("%d phones were held back after %d frames, and all %d were there %v after the binary read on", len(f.phones), last, sent.Load(), sinceMS(held))
}

// read takes what the phones send, and checks that no frame is missing.
func (f *flood) read() {
	defer close(f.ended)
	next := make(map[string]int, len(f.connIDs))
	for f.err == nil {
		var envelope []byte
		if envelope, f.err = f.binary.next(); f.err != nil {
			return
		}
		connID, rest := splitEnvelope(envelope)
		if bytes.HasPrefix(rest, []byte(`"close_code"`)) {
			f.notices <- string(envelope)
			continue
		}
		if want := `"frame":` + strconv.Itoa(next[connID]%10) + `}`; string(rest) != want {
			f.err = fmt.Errorf("frame %d of %s: got %s, want %s", next[connID], connID, rest, want)
		}
		next[connID]++
		f.received.Add(1)
	}
}

// down floods a phone that does not read until the binary is told that it was closed.
func (f *flood) down(ctx context.Context, t *testing.T) {
	t.Helper()
	const batch = 100
	var frames []byte
	for n := range batch {
		frames = append(frames, textMessage(fmt.Sprintf(`{"conn_id":%q,"frame":%d}`, f.connIDs[0], n%10))...)
	}
	sent, notice := 0, ""
	for notice == "" {
		select {
		case notice = <-f.notices:
		case <-f.ended:
			t.Fatalf("the binary: %v", f.err)
		case <-ctx.Done():
			t.Fatalf("the phone is there after %d frames: %v", sent, context.Cause(ctx))
		default:
			if _, err := f.binary.Write(frames); err != nil {
				t.Fatalf("the binary floods: %v", err)
			}
			sent += batch
		}
	}
	if want := fmt.Sprintf(`{"conn_id":%q,"close_code":1011}`, f.connIDs[0]); notice != want {
		t.Errorf("the binary got %s, want %s", notice, want)
	}
	got, err := 0, error(nil)
	for ; ; got++ {
		var frame []byte
		if frame, err = f.phones[0].next(); err != nil {
			break
		}
		if want := strconv.Itoa(got % 10); string(frame) != want {
			t.Fatalf("the phone got %s as frame %d, want %s", frame, got, want)
		}
	}
	if want := (testenv.CloseInfo{Code: 1011, Reason: "phone backlog full"}); err != want { //nolint:errorlint // it is that, unwrapped
		t.Errorf("the phone that does not read: %v, want %v", err, want)
	}
	t.Logf("a phone that does not read was closed after %d frames, and had %d in its socket", sent, got)
	if _, err := f.binary.Write(textMessage(fmt.Sprintf(`{"conn_id":%q,"frame":"on"}`, f.connIDs[1]))); err != nil {
		t.Fatal(err)
	}
	if frame, err := f.phones[1].next(); err != nil || string(frame) != `"on"` {
		t.Errorf(`another phone got %s (%v), want "on"`, frame, err)
	}
}

// A phone that does not read costs its sibling nothing: not while megabytes wait for
// it, and not when it is closed.
func TestSlowPhone_SiblingsGoOn(t *testing.T) {
	t.Parallel()
	const trips, longest = 30, 2*time.Second + slack
	p := startPlace(t, calmNATS.get(t), "--write-timeout", "1m")
	for name, at := range placements {
		t.Run(name, func(t *testing.T) {
			ctx := scenarioContext(t, time.Minute)
			serverID := randomUUID()
			binary := dialBinary(ctx, t, p.nodes[at.binary], serverID)
			slow, sibling := dialPhone(ctx, t, p.nodes[at.phones], serverID), dialPhone(ctx, t, p.nodes[at.phones], serverID)
			slowID := meet(ctx, t, slow, binary, "slow")
			siblingID := meet(ctx, t, sibling, binary, "sibling")
			slow.Pause()

			var sent atomic.Int64 // frames to the slow phone
			pad := strings.Repeat("x", 16*kib)
			send := func() error {
				return binary.Send(ctx, slowID, fmt.Appendf(nil, "[%d,%q]", sent.Add(1)-1, pad))
			}
			closed := make(chan struct{})
			var parts sync.WaitGroup
			defer parts.Wait()
			defer binary.Drop()
			parts.Go(func() {
				for {
					e, err := binary.NextEnvelope(ctx)
					switch {
					case err != nil:
						return
					case e.ConnID == siblingID && e.Frame != nil:
						err = binary.Send(ctx, siblingID, e.Frame)
					case e.ConnID == slowID && e.CloseCode == 1011 && e.Frame == nil:
						close(closed)
					default:
						err = errors.New("neither a frame of the sibling nor a notice with 1011 of the slow phone")
					}
					if err != nil {
						t.Errorf("the binary got %s: %v", describe(e), err)
						return
					}
				}
			})
			made, worst := 0, time.Duration(0)
			trip := func() {
				t.Helper()
				frame := numberedFrame(nil, up, 1, made)
				start := time.Now()
				ctx := within(ctx, t, start, longest)
				if err := sibling.Send(ctx, frame); err != nil {
					t.Fatalf("the sibling sends frame %d: %v", made, err)
				}
				if got, err := sibling.Next(ctx); err != nil || !bytes.Equal(got, frame) {
					t.Fatalf("the sibling got %s (%v), want %s", got, err, frame)
				}
				made++
				worst = max(worst, time.Since(start))
			}

			waiting := make(chan struct{})
			parts.Go(func() {
				defer close(waiting)
				for range 3 * mib / len(pad) { // below the backlog, whatever the kernel takes
					if err := send(); err != nil {
						t.Errorf("the binary sends: %v", err)
						return
					}
				}
			})
			for !isClosed(waiting) {
				trip()
			}
			for range trips {
				trip()
			}
			select {
			case <-closed:
				t.Error("the slow phone was closed with 3 MiB waiting")
			default:
			}
			parts.Go(func() {
				for !isClosed(closed) {
					if err := send(); err != nil {
						return // of a binary that was dropped
					}
				}
			})
			for !isClosed(closed) {
				trip()
			}
			for range trips {
				trip()
			}
			t.Logf("%d round trips of the sibling, %v the longest, beside %d KiB for the slow phone", made, worst.Round(time.Millisecond), int(sent.Load())*len(pad)/kib)

			slow.Unpause()
			for n := 0; ; n++ {
				got, err := slow.Next(ctx)
				if err != nil {
					if want := (testenv.CloseInfo{Code: 1011, Reason: "phone backlog full"}); err != want { //nolint:errorlint // it is that, unwrapped
						t.Errorf("the slow phone: %v, want %v", err, want)
					}
					break
				}
				if want := fmt.Sprintf("[%d,", n); !bytes.HasPrefix(got, []byte(want)) {
					t.Fatalf("the slow phone got %.20s, want frame %d", got, n)
				}
			}
		})
	}
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// rawPeer is a WebSocket connection whose bytes are a test's own, for peers that do
// what those of testenv never do.
type rawPeer struct {
	*net.TCPConn
	reader *bufio.Reader
	buffer []byte
}

// dialRaw connects to path of n. The deadline of ctx is that of all reads and writes.
func dialRaw(ctx context.Context, n *node, path, serverID string) (*rawPeer, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", strings.TrimPrefix(n.http, "http://"))
	if err != nil {
		return nil, err
	}
	p := &rawPeer{TCPConn: conn.(*net.TCPConn), reader: bufio.NewReaderSize(conn, 512)}
	if deadline, ok := ctx.Deadline(); ok {
		_ = p.SetDeadline(deadline) // fails when it is closed
	}
	_, err = fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: relay\r\nUser-Agent: raw\r\nX-Pyrycode-Server: %s\r\nX-Pyrycode-Token: t\r\nX-Pyrycode-Version: 1\r\n"+
		"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n", path, serverID)
	if err != nil {
		p.drop()
		return nil, err
	}
	response, err := http.ReadResponse(p.reader, nil)
	if err != nil {
		p.drop()
		return nil, err
	}
	response.Body.Close()
	if response.StatusCode != http.StatusSwitchingProtocols {
		p.drop()
		return nil, &testenv.RefusedError{Status: response.StatusCode, Header: response.Header}
	}
	return p, nil
}

// drop ends the connection with an RST.
func (p *rawPeer) drop() {
	_ = p.SetLinger(0) // fails when it is closed
	_ = p.Close()
}

func dropAll(peers []*rawPeer) {
	for _, p := range peers {
		if p != nil {
			p.drop()
		}
	}
}

// textMessage is a client's text message, its mask one that changes nothing.
func textMessage(payload string) []byte {
	m := []byte{0x81, 0x80, 0, 0, 0, 0}
	if n := len(payload); n < 126 {
		m[1] |= byte(n)
	} else {
		m = []byte{0x81, 0x80 | 126, byte(n >> 8), byte(n), 0, 0, 0, 0}
	}
	return append(m, payload...)
}

// next returns the next message, good until the next call. A close frame is a
// testenv.CloseInfo as an error. Control frames of other kinds are left out.
func (p *rawPeer) next() ([]byte, error) {
	for {
		header, err := p.take(2)
		if err != nil {
			return nil, err
		}
		opcode, size := header[0]&0xf, int(header[1])
		if size == 126 {
			if header, err = p.take(2); err != nil {
				return nil, err
			}
			size = int(header[0])<<8 | int(header[1])
		}
		payload, err := p.take(size)
		switch {
		case err != nil:
			return nil, err
		case opcode == 1:
			return payload, nil
		case opcode == 8 && size >= 2:
			return nil, testenv.CloseInfo{Code: int(payload[0])<<8 | int(payload[1]), Reason: string(payload[2:])}
		case opcode < 8 || opcode == 8:
			return nil, fmt.Errorf("got opcode %d and %d bytes, want a text message", opcode, size)
		}
	}
}

func (p *rawPeer) take(n int) ([]byte, error) {
	p.buffer = slices.Grow(p.buffer[:0], n)[:n]
	_, err := io.ReadFull(p.reader, p.buffer)
	return p.buffer, err
}

// spell sends message one byte at a time.
func (p *rawPeer) spell(message []byte, every time.Duration) error {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for i := range message {
		if _, err := p.Write(message[i : i+1]); err != nil {
			return err
		}
		<-tick.C
	}
	return nil
}

// trickle spells message until the relay ends the connection, and returns when, from
// the first byte on. It returns an error if that did not happen, or with a word.
func (p *rawPeer) trickle(message []byte, every time.Duration) (took time.Duration, err error) {
	start := time.Now()
	spelt := make(chan error, 1)
	go func() { spelt <- p.spell(message, every) }()
	said, err := p.next()
	took = time.Since(start)
	if !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) {
		err = fmt.Errorf("got %s (%w), want the end of the connection", said, err)
	} else {
		err = nil
	}
	p.drop()
	if <-spelt == nil {
		err = errors.Join(err, errors.New("the message was sent to its end"))
	}
	return took, err
}

// splitEnvelope returns the conn id of an envelope as the relay writes it, and what
// follows.
func splitEnvelope(envelope []byte) (connID string, rest []byte) {
	id, rest, _ := bytes.Cut(bytes.TrimPrefix(envelope, []byte(`{"conn_id":"`)), []byte(`",`))
	return string(id), rest
}

// health is what a node says of who is connected to it.
type health struct {
	Binaries int `json:"connected_binaries"`
	Phones   int `json:"connected_phones"`
}

func (n *node) health(t *testing.T) (h health) {
	t.Helper()
	_, body := fetch(t, n.http+"/healthz")
	if err := json.Unmarshal([]byte(body), &h); err != nil {
		t.Fatalf("/healthz: %v in %s", err, body)
	}
	return h
}

// memory is how many bytes of memory a node's process has now (VmRSS).
func (n *node) memory(t *testing.T) int {
	t.Helper()
	got, err := memoryOf(n.process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

var residentSize = regexp.MustCompile(`(?m)^VmRSS:\s+(\d+) kB$`)

func memoryOf(pid int) (int, error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	found := residentSize.FindSubmatch(status)
	if found == nil {
		return 0, fmt.Errorf("no VmRSS of process %d", pid)
	}
	size, err := strconv.Atoi(string(found[1]))
	return size * kib, err
}

// memoryWatch looks at the memory of a process all the time.
type memoryWatch struct {
	first int
	most  atomic.Int64
}

func watchMemory(t *testing.T, n *node) *memoryWatch {
	t.Helper()
	w := &memoryWatch{first: n.memory(t)}
	stop, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(pollEvery)
		defer tick.Stop()
		for {
			if now, err := memoryOf(n.process.Pid); err != nil {
				t.Errorf("memory of %s: %v", n.url, err)
				return
			} else if int64(now) > w.most.Load() {
				w.most.Store(int64(now))
			}
			select {
			case <-tick.C:
			case <-stop:
				return
			}
		}
	}()
	t.Cleanup(func() { close(stop); <-ended })
	return w
}

// grown is by how much the process was larger than at first, at most.
func (w *memoryWatch) grown() int { return max(0, int(w.most.Load())-w.first) }
