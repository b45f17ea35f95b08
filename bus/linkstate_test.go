package bus

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// The tests of this file drive one linkState, or two without a bus between them,
// in virtual time. Messages read like "DATA 1 x" or "ACK 3 gap 4".

const testWindow = 1000 // ten frames of 36 bytes with their overhead

var epoch = time.Unix(1e9, 0)

// endTest is a linkState under test.
type endTest struct {
	*testing.T
	st  linkState
	now time.Time
}

// newEndTest returns an open end with a peer whose window is testWindow too.
func newEndTest(t *testing.T) *endTest {
	e := newHeldEndTest(t)
	e.st.open(testWindow)
	return e
}

// newHeldEndTest returns a phone's end whose binary is away.
func newHeldEndTest(t *testing.T) *endTest {
	cfg := Config{Window: testWindow}.withDefaults()
	return &endTest{T: t, st: newLinkState(cfg), now: epoch}
}

// send queues frames of 36 bytes that start with the texts.
func (e *endTest) send(texts ...string) {
	for _, s := range texts {
		e.st.send(frameBuf(pad(s)), e.now)
	}
}

func pad(s string) string { return s + strings.Repeat(" ", 36-len(s)) }

func frameBuf(s string) []byte { return append(make([]byte, Headroom), s...) }

// says checks everything that the end has to say now.
func (e *endTest) says(want ...string) {
	e.Helper()
	var got []string
	for range 1000 {
		m, _, ok := e.st.next(e.now)
		if !ok {
			break
		}
		got = append(got, describe(m))
	}
	if !slices.Equal(got, want) {
		e.Fatalf("after %v it says %q, want %q", e.now.Sub(epoch), got, want)
	}
}

func describe(m Message) string {
	s := m.Kind.String()
	if m.Kind != KindAck {
		s += fmt.Sprintf(" %d", m.Seq)
	}
	switch m.Kind {
	case KindData:
		s += " " + strings.TrimRight(string(m.Payload), " ")
	case KindClose, KindReset:
		s += " " + errorOf(m.Reason, m.Payload).Error()
	case KindAck:
		s += fmt.Sprintf(" %d", m.Ack)
		if m.Seq != 0 {
			s += fmt.Sprintf(" gap %d", m.Seq)
		}
	}
	return s
}

// hears checks what the end does with a message: delivers a text, ends with an
// error, or neither.
func (e *endTest) hears(m Message, wantText string, wantEnd error) {
	e.Helper()
	p, end := e.st.receive(m, e.now)
	if got := strings.TrimRight(string(p), " "); got != wantText || !errors.Is(end, wantEnd) || (end == nil) != (wantEnd == nil) {
		e.Fatalf("%s: delivers %q, ends with %v, want %q, %v", describe(m), got, end, wantText, wantEnd)
	}
}

func (e *endTest) hearsData(seq uint64, text string, delivered bool) {
	e.Helper()
	want := text
	if !delivered {
		want = ""
	}
	e.hears(Message{Kind: KindData, Seq: seq, Payload: []byte(pad(text))}, want, nil)
}

func (e *endTest) hearsAck(ack uint64) {
	e.Helper()
	e.hears(Message{Kind: KindAck, Ack: ack}, "", nil)
}

// after advances the clock and checks what tick says.
func (e *endTest) after(d time.Duration, want error) {
	e.Helper()
	e.now = e.now.Add(d)
	if err := e.st.tick(e.now); !errors.Is(err, want) || (err == nil) != (want == nil) {
		e.Fatalf("tick after %v: %v, want %v", e.now.Sub(epoch), err, want)
	}
}

// probesFor lets d pass with a look at the clock each second, as the pump does.
func (e *endTest) probesFor(d time.Duration, probe string) {
	e.Helper()
	for ; d >= probeInterval; d -= probeInterval {
		e.after(probeInterval, nil)
		e.says(probe)
	}
	e.after(d, nil)
}

func (e *endTest) isIdle(want bool) {
	e.Helper()
	if got := e.st.idle(); got != want {
		e.Fatalf("after %v: idle is %v, want %v", e.now.Sub(epoch), got, want)
	}
}

func TestReceiver_TakesExactlyTheNext(t *testing.T) {
	e := newEndTest(t)
	e.hearsData(1, "a", true)
	e.hearsData(3, "c", false)
	e.hearsData(2, "b", true)
	e.hearsData(2, "b", false)
	e.hearsData(1, "a", false)
	e.hearsData(3, "c", true)
}

func TestReceiver_AcksADuplicateAgain(t *testing.T) {
	e := newEndTest(t)
	e.hearsData(1, "a", true)
	e.after(ackDelay, nil)
	e.says("ACK 1")
	e.hearsData(1, "a", false) // the ack was lost
	e.says("ACK 1")
	e.isIdle(true)
}

func TestReceiver_ReportsAGapOnce(t *testing.T) {
	e := newEndTest(t)
	e.hearsData(1, "a", true)
	e.hearsData(3, "c", false)
	e.says("ACK 1 gap 2")
	e.hearsData(4, "d", false)
	e.says()
	e.hearsData(2, "b", true)
	e.hearsData(3, "c", true)
	e.hearsData(5, "e", false) // a new gap
	e.says("ACK 3 gap 4")
}

// DATA that goes back carries acks, and never lets it come to an ACK.
func TestReceiver_ReportsAGapThoughDataGoesBack(t *testing.T) {
	e := newEndTest(t)
	e.send("x", "y")
	e.hearsData(2, "b", false)
	e.says("ACK 0 gap 1", "DATA 1 x", "DATA 2 y")
}

func TestReceiver_ReportsAGapAgainWhenProbed(t *testing.T) {
	e := newEndTest(t)
	e.hearsData(2, "b", false)
	e.says("ACK 0 gap 1") // and this is lost
	e.hears(Message{Kind: KindProbe, Seq: 2}, "", nil)
	e.says("ACK 0 gap 1")
}

func TestSender_GoesBackNOnAGap(t *testing.T) {
	e := newEndTest(t)
	e.send("a", "b", "c")
	e.says("DATA 1 a", "DATA 2 b", "DATA 3 c")
	e.hears(Message{Kind: KindAck, Ack: 1, Seq: 2}, "", nil)
	e.says("DATA 2 b", "DATA 3 c")
	e.hears(Message{Kind: KindAck, Ack: 1, Seq: 1}, "", nil) // an old report
	e.says()
	e.hearsAck(3)
	e.isIdle(true)
}

// All links lose at once: none floods the path that they share with a window of what
// it sends again.
func TestSender_BeginsWithALittleAfterALoss(t *testing.T) {
	const window, frames = 64 << 10, 600 // of 100 bytes with their overhead
	e := &endTest{T: t, st: newLinkState(Config{Window: window}), now: epoch}
	e.st.open(window)
	e.send(make([]string, frames)...)
	sends := func() (n int) {
		e.Helper()
		for _, _, ok := e.st.next(e.now); ok; _, _, ok = e.st.next(e.now) {
			n++
		}
		return n
	}
	if n := sends(); n != frames {
		t.Fatalf("%d frames at first, want %d", n, frames)
	}
	e.hears(Message{Kind: KindAck, Seq: 1}, "", nil)
	acked, bursts := uint64(0), []int{}
	for acked < frames {
		n := sends()
		bursts = append(bursts, n)
		if n == 0 {
			t.Fatalf("it stops after %d", bursts)
		}
		acked += uint64(n) //nolint:gosec // small
		e.hearsAck(acked)
	}
	if want := []int{41, 82, 164, 313}; !slices.Equal(bursts, want) {
		t.Errorf("bursts of %d frames, want %d", bursts, want)
	}
	e.isIdle(true)
}

func TestSender_SkipsWhatWasAckedWhileItGoesBack(t *testing.T) {
	e := newEndTest(t)
	e.send("a", "b", "c")
	e.says("DATA 1 a", "DATA 2 b", "DATA 3 c")
	e.hears(Message{Kind: KindAck, Seq: 1}, "", nil)
	e.hearsAck(2) // only late
	e.says("DATA 3 c")
}

func TestSender_ProbesAfterASecond(t *testing.T) {
	e := newEndTest(t)
	e.send("a", "b")
	e.says("DATA 1 a", "DATA 2 b")
	e.after(probeInterval-1, nil)
	e.says()
	e.after(1, nil)
	e.says("PROBE 2")
	e.after(probeInterval-1, nil)
	e.says()
	e.hearsAck(1) // progress, so the second begins anew
	e.after(1, nil)
	e.says()
	e.after(probeInterval, nil)
	e.says("PROBE 2")
}

func TestSender_LosesTheLinkAfterTenSecondsWithoutProgress(t *testing.T) {
	e := newEndTest(t)
	e.send("a", "b")
	e.says("DATA 1 a", "DATA 2 b")
	e.after(9*time.Second, nil)
	e.hearsAck(1)
	e.after(9*time.Second, nil)
	e.hearsAck(1) // no progress
	e.after(time.Second-1, nil)
	e.after(1, ErrLinkLost)
	e.st.lose(ErrLinkLost, e.now)
	e.says("RESET 0 link lost")
}

// The network was held for 8 s. What the other end sent meanwhile comes first, that of
// other links too, and its acknowledgement behind that.
func TestSender_TakesFramesAfterAnOutage_WaitsForTheAnswerBehindThem(t *testing.T) {
	e := newEndTest(t)
	e.send("a")
	e.says("DATA 1 a")
	e.probesFor(9*time.Second, "PROBE 1")
	e.hearsData(1, "x", true)
	e.probesFor(5*time.Second-1, "PROBE 1")
	e.hearsAck(1)
	e.isIdle(true)

	e = newEndTest(t) // and no acknowledgement comes
	e.send("a")
	e.says("DATA 1 a")
	e.probesFor(9*time.Second, "PROBE 1")
	e.hearsData(1, "x", true)
	e.probesFor(5*time.Second-1, "PROBE 1")
	e.after(1, ErrLinkLost)

	e = newEndTest(t) // not of anything
	e.send("a")
	e.says("DATA 1 a")
	for i := range uint64(19) {
		e.after(time.Second, nil)
		e.says("PROBE 1")
		e.hearsData(i+1, "x", true)
		e.st.consume(frameCost(len(pad("x"))), e.now)
	}
	e.after(time.Second-1, nil)
	e.after(1, ErrLinkLost)
}

// SIGSTOP for a minute, and SIGCONT: the answer may have come meanwhile.
func TestSender_ThatWasStopped_AsksBeforeItGivesUp(t *testing.T) {
	e := newEndTest(t)
	e.send("a")
	e.says("DATA 1 a")
	e.after(time.Minute, nil)
	e.says("PROBE 1")
	e.after(probeInterval-1, nil)
	e.after(1, ErrLinkLost)

	e = newEndTest(t)
	e.send("a")
	e.says("DATA 1 a")
	e.after(time.Minute, nil)
	e.says("PROBE 1")
	e.hearsAck(1)
	e.isIdle(true)
}

func TestSender_SilentLinkIsNeverLost(t *testing.T) {
	e := newEndTest(t)
	e.send("a")
	e.says("DATA 1 a")
	e.hearsAck(1)
	e.isIdle(true)
	e.after(24*time.Hour, nil)
	e.says()
}

func TestAck_WaitsForDataToRideOn(t *testing.T) {
	e := newEndTest(t)
	e.hearsData(1, "a", true)
	e.says()
	e.isIdle(false)
	e.send("x")
	m, _, _ := e.st.next(e.now)
	if describe(m) != "DATA 1 x" || m.Ack != 1 {
		t.Fatalf("got %s with ack %d, want DATA 1 x with ack 1", describe(m), m.Ack)
	}
	e.after(ackDelay, nil)
	e.says()
}

func TestAck_AfterTwentyMilliseconds(t *testing.T) {
	e := newEndTest(t)
	e.hearsData(1, "a", true)
	e.after(10*time.Millisecond, nil)
	e.hearsData(2, "b", true)
	e.after(ackDelay-10*time.Millisecond-1, nil)
	e.says()
	e.after(1, nil)
	e.says("ACK 2")
	e.st.consume(200, e.now)
	e.after(ackDelay, nil)
	e.says("ACK 2") // nothing is left to consume
	e.isIdle(true)
}

func TestAck_AtAQuarterOfTheWindow(t *testing.T) {
	e := newEndTest(t)
	e.hearsData(1, "a", true)
	e.hearsData(2, "b", true)
	e.says()
	e.hearsData(3, "c", true) // 300 of 1000 bytes
	e.says("ACK 3")
	e.hearsData(4, "d", true)
	e.says()
}

func TestCredit_IsToldAtAQuarterOfTheWindow(t *testing.T) {
	e := newEndTest(t)
	for seq := range uint64(4) {
		e.hearsData(seq+1, "x", true)
	}
	e.says("ACK 4")
	e.st.consume(200, e.now)
	e.says()
	e.st.consume(100, e.now)
	m, _, _ := e.st.next(e.now)
	if m.Kind != KindAck || m.Credit != testWindow+300 {
		t.Fatalf("got %s with credit %d, want an ACK with %d", describe(m), m.Credit, testWindow+300)
	}
}

func TestCredit_BlocksAtTheWindowAndOneFrame(t *testing.T) {
	e := newEndTest(t)
	e.st.send(frameBuf(strings.Repeat("x", testWindow-frameOverhead-1)), e.now)
	e.st.send(frameBuf(strings.Repeat("y", 5*testWindow)), e.now) // one byte of credit is left
	e.st.send(frameBuf("z"), e.now)
	m1, _, _ := e.st.next(e.now)
	m2, _, _ := e.st.next(e.now)
	if m1.Seq != 1 || m2.Seq != 2 {
		t.Fatalf("got %d and %d, want 1 and 2", m1.Seq, m2.Seq)
	}
	e.says()
	e.hearsAck(2) // received is not consumed
	e.says()
	e.hears(Message{Kind: KindAck, Ack: 2, Credit: testWindow - 1 + 5*testWindow + frameOverhead}, "", nil)
	e.says()
	e.hears(Message{Kind: KindAck, Ack: 2, Credit: testWindow - 1 + 5*testWindow + frameOverhead + 1}, "", nil)
	e.says("DATA 3 z")
}

// The message that raises the credit may be lost, and nothing else would be sent.
func TestCredit_IsAskedForWhenItDoesNotCome(t *testing.T) {
	e := newEndTest(t)
	e.send("1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11")
	e.says("DATA 1 1", "DATA 2 2", "DATA 3 3", "DATA 4 4", "DATA 5 5", "DATA 6 6", "DATA 7 7", "DATA 8 8", "DATA 9 9", "DATA 10 10")
	for range 60 { // a peer that answers and reads slowly is not lost
		e.hearsAck(10)
		e.says()
		e.isIdle(false)
		e.after(probeInterval, nil)
		e.says("PROBE 10")
	}
	e.hearsAck(10)
	e.says()
	e.probesFor(10*time.Second-1, "PROBE 10")
	e.after(1, ErrLinkLost) // one that does not answer is
}

// Send blocks at the window, and then nothing is queued that could wait for credit.
func TestCredit_IsAskedForWhileSendIsBlocked(t *testing.T) {
	e := newEndTest(t)
	e.send("1", "2", "3", "4", "5", "6", "7", "8", "9", "10")
	e.says("DATA 1 1", "DATA 2 2", "DATA 3 3", "DATA 4 4", "DATA 5 5", "DATA 6 6", "DATA 7 7", "DATA 8 8", "DATA 9 9", "DATA 10 10")
	e.hearsAck(10)
	e.says()
	e.isIdle(false)
	e.after(probeInterval, nil)
	e.says("PROBE 10")
	e.hears(Message{Kind: KindAck, Ack: 10, Credit: testWindow + 250}, "", nil)
	e.says()
	e.isIdle(true)
}

// Ends may be configured with different windows: a quarter of the other's may be
// more than ours.
func TestCredit_IsToldWhenEverythingIsConsumed(t *testing.T) {
	e := newEndTest(t)
	e.hearsData(1, "a", true)
	e.after(ackDelay, nil)
	e.says("ACK 1")
	e.after(time.Minute, nil)
	e.st.consume(100, e.now)
	e.isIdle(false)
	e.after(ackDelay, nil)
	m, _, ok := e.st.next(e.now)
	if !ok || m.Credit != testWindow+100 {
		t.Fatalf("got %s with credit %d, want an ACK with %d", describe(m), m.Credit, testWindow+100)
	}
	e.isIdle(true)
}

func TestClose_NeverOvertakesData(t *testing.T) {
	e := newEndTest(t)
	e.send("1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11")
	e.st.close(CodeError(4401), false)
	e.says("DATA 1 1", "DATA 2 2", "DATA 3 3", "DATA 4 4", "DATA 5 5", "DATA 6 6", "DATA 7 7", "DATA 8 8", "DATA 9 9", "DATA 10 10")
	e.hears(Message{Kind: KindAck, Ack: 10, Credit: 2 * testWindow}, "", nil)
	e.says("DATA 11 11", "CLOSE 12 closed with code 4401")
	e.hearsAck(11)
	if e.st.done() {
		t.Fatal("done before the CLOSE was acked")
	}
	e.after(probeInterval, nil)
	e.says("PROBE 12")
	e.hears(Message{Kind: KindAck, Ack: 11, Seq: 12}, "", nil)
	e.says("CLOSE 12 closed with code 4401")
	e.hearsAck(12)
	if !e.st.done() || !e.st.idle() {
		t.Fatalf("done %v, idle %v, want both", e.st.done(), e.st.idle())
	}
}

func TestClose_IsTakenInOrderOnly(t *testing.T) {
	e := newEndTest(t)
	e.hears(Message{Kind: KindClose, Seq: 2, Reason: 4}, "", nil)
	e.says("ACK 0 gap 1")
	e.hearsData(1, "a", true)
	e.hears(Message{Kind: KindClose, Seq: 2, Reason: 4}, "", ErrReclaimed)
	e.send("unsent")
	e.says("ACK 2") // nobody is left to send to
	if !e.st.done() {
		t.Error("not done")
	}
	e.hears(Message{Kind: KindData, Seq: 3}, "", errViolation) // nothing follows the end
}

func TestUrgentClose_GivesUpWhatWasNotSent(t *testing.T) {
	e := newEndTest(t)
	e.send("1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11", "12")
	e.says("DATA 1 1", "DATA 2 2", "DATA 3 3", "DATA 4 4", "DATA 5 5", "DATA 6 6", "DATA 7 7", "DATA 8 8", "DATA 9 9", "DATA 10 10")
	e.hears(Message{Kind: KindAck, Ack: 8, Seq: 9}, "", nil)
	e.st.close(ErrBacklog, true)
	e.says("DATA 9 9", "DATA 10 10", "CLOSE 11 backlog full") // what was sent may have arrived
	e.hearsAck(11)
	if !e.st.done() {
		t.Error("not done")
	}
}

func TestHeldFrame_IsGivenUpAfterEightSeconds(t *testing.T) {
	e := newHeldEndTest(t)
	e.after(time.Hour, nil) // one that stays silent just waits
	e.isIdle(true)
	e.send("a")
	e.says()
	e.after(5*time.Second, nil)
	e.send("b")
	e.after(3*time.Second-1, nil)
	e.after(1, ErrAway)
	e.st.lose(ErrAway, e.now)
	e.says("RESET 0 binary is away")
}

func TestHeldFrames_GoOutWhenTheBinaryReturns(t *testing.T) {
	e := newHeldEndTest(t)
	e.send("a", "b")
	e.hears(Message{Kind: KindClose, Seq: 1, Reason: 5}, "", ErrMoved)
	if !e.st.maySwitch() {
		t.Fatal("a link that has carried nothing may not switch")
	}
	e.st.rebind(Config{Window: testWindow}.withDefaults())
	e.after(7*time.Second, nil)
	e.says()
	e.st.open(testWindow)
	e.after(2*time.Second, nil) // the 8 s are over, but the binary is back
	e.says("DATA 1 a", "DATA 2 b")
	if e.st.maySwitch() {
		t.Error("a link that has carried frames may switch")
	}
	e.hearsData(1, "x", true) // the numbers of the new session
}

func TestHeldFrames_KeepTheirClockWhenTheBinaryIsStillAway(t *testing.T) {
	e := newHeldEndTest(t)
	e.send("a")
	e.after(5*time.Second, nil)
	e.hears(Message{Kind: KindClose, Seq: 1, Reason: 5}, "", ErrMoved)
	e.st.rebind(Config{Window: testWindow}.withDefaults())
	e.after(3*time.Second, ErrAway)
}

func TestPeerThatLies_BreaksTheLink(t *testing.T) {
	for name, m := range map[string]Message{
		"ack of what was not sent yet":           {Kind: KindAck, Ack: 2},
		"ack of everything":                      {Kind: KindAck, Ack: ^uint64(0)},
		"credit for more than was sent":          {Kind: KindAck, Credit: testWindow + 101},
		"credit for everything":                  {Kind: KindProbe, Credit: ^uint64(0)},
		"data beyond the credit":                 {Kind: KindData, Seq: 2, Payload: nil},
		"an OPEN":                                {Kind: KindOpen},
		"an ACCEPT":                              {Kind: KindAccept},
		"a message that belongs on no link":      {Kind: KindTaken},
		"ack of what was not sent yet, in CLOSE": {Kind: KindClose, Seq: 2, Ack: 2},
	} {
		e := newEndTest(t)
		e.send("a")
		e.says("DATA 1 a")
		e.send("not sent yet")
		e.hears(Message{Kind: KindData, Seq: 1, Payload: make([]byte, testWindow-frameOverhead)}, strings.Repeat("\x00", testWindow-frameOverhead), nil)
		if _, err := e.st.receive(m, e.now); !errors.Is(err, errViolation) {
			t.Errorf("%s: %v, want errViolation", name, err)
		}
	}
}

func TestReset_IsRepeatedUntilAnswered(t *testing.T) {
	e := newEndTest(t)
	e.send("a")
	e.says("DATA 1 a")
	e.st.lose(ErrNodeGone, e.now)
	e.says("RESET 0 node gone")
	e.hearsAck(1) // was under way; it answers the DATA
	e.isIdle(false)
	e.after(probeInterval, nil)
	e.says("RESET 0 node gone")
	e.hears(Message{Kind: KindAck, Reason: flagReset}, "", nil)
	if !e.st.done() || !e.st.idle() {
		t.Fatalf("done %v, idle %v, want both", e.st.done(), e.st.idle())
	}
	e.after(time.Hour, nil)
	e.says()
}

func TestReset_IsGivenUpAtLast(t *testing.T) {
	e := newEndTest(t)
	e.st.lose(ErrNodeGone, e.now)
	for range resetTries {
		e.says("RESET 0 node gone")
		e.after(probeInterval, nil)
	}
	e.says()
	if !e.st.done() || !e.st.idle() {
		t.Fatalf("done %v, idle %v, want both", e.st.done(), e.st.idle())
	}
}

func TestReset_EndsTheOtherEnd(t *testing.T) {
	e := newEndTest(t)
	e.send("a")
	e.hears(Message{Kind: KindReset, Reason: 6}, "", ErrAway)
	e.says()
	if !e.st.done() || !e.st.idle() {
		t.Fatalf("done %v, idle %v, want both", e.st.done(), e.st.idle())
	}
	e.hearsData(1, "a", false)
	e.st.consume(1, e.now)
	e.says()
}

// Whatever a newer node says about the end of a link, the link ends and says so.
func TestUnknownReason_EndsTheLinkVisibly(t *testing.T) {
	for _, m := range []Message{
		{Kind: KindClose, Seq: 1, Reason: 200},
		{Kind: KindReset, Reason: 200},
		{Kind: KindClose, Seq: 1, Reason: ReasonCode, Payload: []byte("more than a code")},
	} {
		newEndTest(t).hears(m, "", ErrLinkLost)
	}
}

func TestDisturbance_MakesAWaitingEndAskAtOnce(t *testing.T) {
	e := newEndTest(t)
	e.send("a")
	e.says("DATA 1 a")
	e.after(time.Millisecond, nil)
	e.st.probeNow(e.now)
	e.says("PROBE 1")
	e.probesFor(10*time.Second-2*time.Millisecond, "PROBE 1")
	e.after(time.Millisecond, ErrLinkLost) // its clock goes on
}

func TestDisturbance_MakesAnIdleEndAskAFewTimes(t *testing.T) {
	e := newEndTest(t)
	e.st.probeNow(e.now)
	for range idleAsks {
		e.isIdle(false)
		e.says("PROBE 0")
		e.after(probeInterval, nil)
	}
	e.isIdle(true)
	e.says()
	e.after(time.Hour, nil) // it has nothing to lose
	e.st.probeNow(e.now)
	e.says("PROBE 0")
	e.hearsAck(0)
	e.isIdle(true)
	e.after(probeInterval, nil)
	e.says()
}

func TestConfirm_AsksForWhatCameBeforeTheAccept(t *testing.T) {
	e := newEndTest(t)
	e.st.confirm(false)
	e.says("ACK 0")
	e.st.confirm(true)
	e.says("ACK 0 gap 1")
	e.hearsData(1, "a", true)
}

// FuzzLinkStateInput feeds an end that is used as a Link uses it with arbitrary
// messages. The fuzz input is a program: one byte says what to do, the next two
// with which numbers.
func FuzzLinkStateInput(f *testing.F) {
	f.Add([]byte{0, 0, 0, 1, 1, 0, 1, 2, 0, 2, 1, 0})
	f.Add([]byte{0, 9, 0, 0, 9, 0, 3, 1, 1, 6, 0, 0, 3, 2, 1, 4, 1, 0})
	f.Add([]byte{0, 0, 0, 2, 1, 1, 2, 2, 1, 5, 0, 0, 4, 255, 255, 7, 200, 0})
	f.Fuzz(func(t *testing.T, program []byte) {
		e := newEndTest(t)
		delivered := byte(0)
		for ; len(program) >= 3; program = program[3:] {
			x, y := uint64(program[1]), uint64(program[2])
			numbers := Message{Seq: x, Ack: y, Credit: testWindow + x*y, Reason: Reason(y)}
			switch op := program[0] % 10; op {
			case 0:
				if !e.st.closing && e.st.outstanding() < testWindow {
					e.send("x")
				}
			case 1: // honest data
				numbers = Message{Seq: e.st.received + 1 + x/32}
				fallthrough
			case 2, 3, 4, 5, 6:
				numbers.Kind = [...]Kind{KindData, KindData, KindClose, KindAck, KindProbe, KindReset}[op-1]
				if numbers.Kind == KindData {
					numbers.Payload = []byte{byte(numbers.Seq)} //nolint:gosec // wraps like delivered
				}
				p, end := e.st.receive(numbers, e.now)
				if p != nil {
					if delivered++; p[0] != delivered {
						t.Fatalf("delivered frame %d as number %d", p[0], delivered)
					}
					e.st.consume(frameCost(len(p)), e.now)
				}
				if errors.Is(end, errViolation) {
					e.st.lose(ErrLinkLost, e.now)
				}
			case 7:
				e.now = e.now.Add(time.Duration(x*y) * time.Millisecond) //nolint:gosec // small
				if err := e.st.tick(e.now); err != nil {
					e.st.lose(err, e.now)
				}
			case 8:
				e.st.close(CodeError(x), y%2 == 0) //nolint:gosec // a byte
			case 9:
				e.st.probeNow(e.now)
			}
			for n := 0; ; n++ {
				if _, _, ok := e.st.next(e.now); !ok {
					break
				}
				if n > 1000 {
					t.Fatal("it does not stop talking")
				}
			}
			if e.st.outstanding() > 2*testWindow {
				t.Fatalf("%d bytes outstanding", e.st.outstanding())
			}
		}
	})
}
