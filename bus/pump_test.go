package bus

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/nats-io/nats.go"
)

// gate is a transport that takes one message at a time, when the test says so.
type gate struct {
	open chan struct{}
	took chan string // subjects, in order
}

func (g *gate) Publish(subject, _ string, _ []byte) error {
	<-g.open
	g.took <- subject
	return nil
}

func (g *gate) Subscribe(string, func(*nats.Msg)) (func(), error) { return func() {}, nil }
func (g *gate) Request(context.Context, string, []byte) (*nats.Msg, error) {
	return nil, ErrNoResponders
}
func (g *gate) Connected() bool    { return true }
func (g *gate) OnDisturbed(func()) {}

// A frame for one phone waits for at most the one that is being published and one
// of each other phone that has some, however many these have.
func TestPump_ManyLargeFramesOfOthers_DelayASmallOneByATurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &gate{open: make(chan struct{}), took: make(chan string, 1000)}
		b := NewOver(g, NewNodeID("gw"), Config{}, logger)
		if err := b.Start(newHolder()); err != nil {
			t.Fatal(err)
		}
		large := make([]*Link, 3)
		for i := range large {
			large[i] = b.opened("large", &receiver{t: t})
			for range 12 { // 3 MiB of them
				if err := large[i].Offer(sizedFrame(256 << 10)); err != nil {
					t.Fatal(err)
				}
			}
		}
		synctest.Wait() // the first one is being published
		if err := b.opened("small", &receiver{t: t}).Offer(sizedFrame(200)); err != nil {
			t.Fatal(err)
		}
		for before := 0; ; before++ {
			g.open <- struct{}{}
			if subject := <-g.took; strings.HasSuffix(subject, ".small") {
				break
			}
			if before > len(large) {
				t.Fatalf("%d large frames went before a small one, want at most %d", before, len(large)+1)
			}
		}
		close(g.open)
		b.Close()
	})
}

// opened is a link that is open, with the binary's end on this node, and the credit
// for megabytes.
func (b *Bus) opened(serverID string, recv Receiver) *Link {
	l := b.newLink(binarySide, serverID, "c", recv)
	l.mu.Lock()
	l.bindLocked(newLinkID(), "other-00000000", NewSessionID(), topicPhone)
	l.version = spoken.Highest
	l.st.open(64 << 20)
	b.register(l.key(), l, l.node)
	l.mu.Unlock()
	l.start()
	return l
}
