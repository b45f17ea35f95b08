package bus

import (
	"time"

	"github.com/nats-io/nats.go"
)

// dispatch takes one message of this node's subject. It is the one goroutine
// that does so, therefore order is kept; it looks up, hands over, and never
// blocks.
func (b *Bus) dispatch(msg *nats.Msg) {
	if isStatus(msg) {
		return
	}
	t, token, ok := splitSubject(b.node, msg.Subject)
	if !ok {
		b.malformed.Add(1)
		return
	}
	m, err := decode(msg.Data, b.versions)
	if err != nil {
		b.malformed.Add(1)
		return
	}
	switch t {
	case topicServer:
		if m.Kind == KindOpen {
			b.handleOpen(token, m, msg.Reply)
			return
		}
		b.handleLink(binarySide, token, m, msg)
	case topicPhone:
		b.handleLink(phoneSide, token, m, msg)
	case topicClaim:
		b.handleClaim(token, m, msg.Reply)
	case topicNode:
		b.reply(msg.Reply, Message{Kind: KindHello})
	}
}

func (b *Bus) handleOpen(token string, m Message, replyTo string) {
	from, _, ok := splitOpen(m.Payload)
	if !ok || replyTo == "" {
		b.malformed.Add(1)
		return
	}
	answer, l := b.accept(token, m, from, nil)
	b.reply(replyTo, answer)
	if l != nil {
		l.start()
	}
}

// handleLink passes a message to its link. PROBE, CLOSE and RESET for a link that
// is not here are answered, so that the other end does not wait for nothing: with
// RESET, or with ACK if it was one, so that this ends.
func (b *Bus) handleLink(s side, token string, m Message, msg *nats.Msg) {
	l := b.find(linkKey{id: m.Link, session: m.Session, side: s})
	known := l != nil && l.token == token && l.Node() != b.node
	got := refused
	switch {
	case known && m.Kind == KindFrames:
		l.handleFrames(m, time.Now())
	case known:
		got = l.handle(m, msg.Data, time.Now())
	}
	switch replyTo := msg.Reply; {
	case m.Kind == KindReset && (got != refused || !known):
		b.reply(replyTo, Message{Kind: KindAck, Reason: flagReset, Link: m.Link, Session: m.Session})
	case (m.Kind == KindProbe || m.Kind == KindClose) && !known:
		b.reply(replyTo, Message{Kind: KindReset, Reason: reasonUnknown, Link: m.Link, Session: m.Session})
	}
}

// handleClaim answers a CHALLENGE when the binary has answered a ping or has not,
// on a goroutine of its own, and passes TAKEN on.
func (b *Bus) handleClaim(token string, m Message, replyTo string) {
	serverID, err := DecodeToken(token)
	if err != nil {
		b.malformed.Add(1)
		return
	}
	switch m.Kind {
	case KindTaken:
		b.handler.Taken(serverID, m.Session)
	case KindChallenge:
		b.tasks.Go(func() {
			answer := Message{Kind: KindGone, Session: m.Session}
			if b.handler.Alive(b.ctx, serverID, m.Session) {
				answer.Kind = KindAlive
			}
			b.reply(replyTo, answer)
		})
	default:
		b.malformed.Add(1)
	}
}

// isStatus reports whether msg is NATS' own word that nobody heard a request.
func isStatus(msg *nats.Msg) bool { return len(msg.Data) == 0 && msg.Header.Get("Status") != "" }

// enqueue gives l a turn to publish. The caller holds l.mu and has set l.queued.
func (b *Bus) enqueue(l *Link) {
	b.pumpMu.Lock()
	b.ready = append(b.ready, l)
	b.pumpMu.Unlock()
	b.wakePump()
}

// reply publishes m soon. Nothing waits for it and nothing depends on it.
func (b *Bus) reply(subject string, m Message) {
	if subject == "" {
		return
	}
	b.pumpMu.Lock()
	b.replies = append(b.replies, envelope{subject, m})
	b.pumpMu.Unlock()
	b.wakePump()
}

// addTimed has l looked at every tickInterval. The caller holds l.mu and has set
// l.timed.
func (b *Bus) addTimed(l *Link) {
	b.pumpMu.Lock()
	b.timed[l] = struct{}{}
	first := len(b.timed) == 1
	b.pumpMu.Unlock()
	if first {
		b.wakePump()
	}
}

// removeTimed is the reverse of addTimed. The caller holds l.mu.
func (b *Bus) removeTimed(l *Link) {
	b.pumpMu.Lock()
	delete(b.timed, l)
	b.pumpMu.Unlock()
}

func (b *Bus) wakePump() {
	select {
	case b.wake <- struct{}{}:
	default:
	}
}

// pumpLoop is the one goroutine that publishes for links, so that a NATS
// connection that takes nothing for a while stops neither the dispatch goroutine
// nor a binary's read loop. It looks at the clock only while a link waits for
// something.
func (b *Bus) pumpLoop() {
	ticker := time.NewTicker(tickInterval)
	defer ticker.Stop()
	ticking := true
	for {
		select {
		case <-b.stop:
			for more := true; more; {
				b.publishReplies()
				more = b.runReady()
			}
			return
		case <-b.wake:
			b.publishReplies()
			b.runReady()
		case now := <-ticker.C:
			b.tickTimed(now)
		}
		b.pumpMu.Lock()
		want := len(b.timed) > 0
		b.pumpMu.Unlock()
		switch {
		case want && !ticking:
			ticker.Reset(tickInterval)
		case !want && ticking:
			ticker.Stop()
		}
		ticking = want
	}
}

func (b *Bus) publishReplies() {
	b.pumpMu.Lock()
	replies := b.replies
	b.replies = nil
	b.pumpMu.Unlock()
	for _, e := range replies {
		b.publish(e.subject, "", &e.m, nil)
	}
}

// runReady gives every link that has something to say one turn, and reports
// whether there was one.
func (b *Bus) runReady() bool {
	b.pumpMu.Lock()
	turn := b.ready
	b.ready = b.idle
	b.pumpMu.Unlock()
	for _, l := range turn {
		l.mu.Lock()
		l.queued = false
		if l.unlockAndRun(pumpBatch, b.joined, time.Now()) {
			l.kick()
		}
	}
	clear(turn)
	b.idle = turn[:0]
	return len(turn) > 0
}

func (b *Bus) tickTimed(now time.Time) {
	b.pumpMu.Lock()
	links := b.ticked[:0]
	for l := range b.timed {
		links = append(links, l)
	}
	b.pumpMu.Unlock()
	for _, l := range links {
		l.tick(now)
	}
	clear(links)
	b.ticked = links
}

// publish sends m. buf, if not nil, has m's payload after Headroom bytes. An
// error means that the message is lost, as it may be anywhere on its way: links
// find out and send it again.
func (b *Bus) publish(subject, replyTo string, m *Message, buf []byte) {
	if buf == nil {
		buf = m.encode()
	} else {
		m.putHeader(buf)
	}
	if err := b.net.Publish(subject, replyTo, buf); err != nil {
		b.unpublished.Add(1)
	}
}
