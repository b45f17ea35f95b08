package bus

import (
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/nats-io/nats.go"
)

// recorder is a transport that keeps what is published. It takes nothing before it is
// open.
type recorder struct {
	gate

	mu       sync.Mutex
	messages []Message
}

func (r *recorder) Publish(_, _ string, data []byte) error {
	<-r.open
	m, err := decode(slices.Clone(data), spoken)
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.messages = append(r.messages, m)
	return nil
}

// sent is what was published of kind.
func (r *recorder) sent(kind Kind) (messages []Message) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, m := range r.messages {
		if m.Kind == kind {
			messages = append(messages, m)
		}
	}
	return messages
}

// recorded starts a bus over a recorder with one link that is open.
func recorded(t *testing.T, recv Receiver) (*recorder, *Bus, *Link) {
	t.Helper()
	r := &recorder{gate: gate{open: make(chan struct{})}}
	b := NewOver(r, NewNodeID("gw"), Config{}, logger)
	if err := b.Start(newHolder()); err != nil {
		t.Fatal(err)
	}
	return r, b, b.opened("s", recv)
}

func TestLink_SmallFramesBehindEachOther_TravelTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, b, l := recorded(t, &receiver{t: t})
		defer b.Close()
		const few, size = 100, 300
		sizes := slices.Concat(slices.Repeat([]int{size}, few), []int{maxPart + 1}, slices.Repeat([]int{size}, few))
		var want [][]byte
		for i, size := range sizes {
			buf := numberedFrame(uint64(i), size) //nolint:gosec // an index
			want = append(want, slices.Clone(Frame(buf)))
			if err := l.Offer(buf); err != nil {
				t.Fatal(err)
			}
			synctest.Wait() // the first one is being published
		}
		close(r.open)
		synctest.Wait()

		var kinds []Kind
		var got [][]byte
		next := uint64(1)
		for _, m := range r.messages {
			if m.Kind != KindData && m.Kind != KindFrames {
				continue
			}
			kinds = append(kinds, m.Kind)
			if m.Seq != next {
				t.Errorf("%s has number %d, want %d", m.Kind, m.Seq, next)
			}
			if n := Headroom + len(m.Payload); m.Kind == KindFrames && n > maxJoined {
				t.Errorf("a FRAMES has %d bytes, want at most %d", n, maxJoined)
			}
			for _, frame := range framesOf(m) {
				got = append(got, frame)
				next++
			}
		}
		if !slices.EqualFunc(got, want, slices.Equal[[]byte]) {
			t.Errorf("%d frames went out, and not as they were given: want %d", len(got), len(want))
		}
		if want := []Kind{KindData, KindFrames, KindFrames, KindData, KindFrames, KindFrames}; !slices.Equal(kinds, want) {
			t.Errorf("sent %v, want %v", kinds, want)
		}
	})
}

// framesOf is the frames in a DATA or FRAMES.
func framesOf(m Message) (frames [][]byte) {
	if m.Kind == KindData {
		return [][]byte{m.Payload}
	}
	for frame, rest, ok := cutPart(m.Payload); ok; frame, rest, ok = cutPart(rest) {
		frames = append(frames, frame)
	}
	return frames
}

// After a loss frames travel in other company than before.
func TestLink_FramesThatCameBefore_AreTakenOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		recv := &receiver{t: t}
		r, b, l := recorded(t, recv)
		defer b.Close()
		close(r.open)
		hears := func(seq uint64, texts ...string) {
			b.dispatch(l.framesFor(seq, texts...))
			synctest.Wait()
		}
		hears(1, "1", "2", "3")
		hears(2, "2", "3", "4")
		hears(6, "6", "7") // 5 is missing
		recv.wants("1", "2", "3", "4")
		if acks := r.sent(KindAck); !slices.ContainsFunc(acks, func(m Message) bool { return m.Seq == 5 && m.Ack == 4 }) {
			t.Errorf("the gap was not reported: %+v", acks)
		}
		hears(4, "4", "5", "6", "7", "8")
		recv.wants("1", "2", "3", "4", "5", "6", "7", "8")
		if l.Ended() {
			t.Error("the link has ended")
		}
	})
}

// A FRAMES is bound to the credit like the frames in it.
func TestLink_FramesBeyondTheCredit_EndIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		recv := &receiver{t: t, hold: true}
		r, b, l := recorded(t, recv)
		defer b.Close()
		close(r.open)
		text := string(make([]byte, maxPart))
		var texts []string
		for range 2 * b.Window() / maxPart {
			texts = append(texts, text)
		}
		b.dispatch(l.framesFor(1, texts...))
		if ends := recv.told(); len(ends) != 1 || !errors.Is(ends[0], ErrLinkLost) {
			t.Errorf("ended with %v, want ErrLinkLost once", ends)
		}
		cost := len(Frame(textFrame(text))) + frameOverhead
		if got, want := recv.count(), (b.Window()+cost-1)/cost; got != want { // the last one may go beyond
			t.Errorf("%d frames were taken, want %d", got, want)
		}
	})
}

// framesFor is a FRAMES to l, as the other end may send it.
func (l *Link) framesFor(seq uint64, texts ...string) *nats.Msg {
	m := Message{Kind: KindFrames, Link: l.id, Session: l.session, Version: l.version, Seq: seq}
	for _, text := range texts {
		m.Payload = appendPart(m.Payload, Frame(textFrame(text)))
	}
	return &nats.Msg{Subject: tokenSubject(l.bus.node, topicServer, l.token), Data: m.encode()}
}
