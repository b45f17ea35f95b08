package bus

import "time"

// A message costs both nodes and the NATS server more than a small frame does. So frames
// that wait behind each other when their link has its turn travel in one message,
// FRAMES. Each of them keeps its number: to the other end they are as many DATA.

// join makes m, the frame that next has just given, a FRAMES with the small ones that may
// go out behind it, and puts that into p, behind Headroom bytes. It returns false, and
// has done nothing, if m travels alone.
func (s *linkState) join(m *Message, p []byte, now time.Time) bool {
	if len(m.Payload) > maxPart || !s.follows(maxPart) {
		return false
	}
	room := cap(p)
	p = appendPart(p[:Headroom], m.Payload)
	for s.follows(min(maxPart, room-partHeader-len(p))) {
		next, _, _ := s.next(now)
		p = appendPart(p, next.Payload)
	}
	m.Kind, m.Payload = KindFrames, p[Headroom:]
	return true
}

// follows reports whether next, which has just given a frame, has another one, of at
// most n bytes.
func (s *linkState) follows(n int) bool {
	if s.sendNext > s.lastSeq {
		return false
	}
	o := s.at(s.sendNext)
	return !o.close && len(o.buf)-Headroom <= n && s.maySend(o)
}

// handleFrames is handle for a FRAMES. Each frame gets a buffer of its own.
func (l *Link) handleFrames(m Message, now time.Time) {
	m.Kind = KindData
	for frame, rest, ok := cutPart(m.Payload); ok; frame, rest, ok = cutPart(rest) {
		buf := append(NewBuffer(len(frame)), frame...)
		m.Payload = Frame(buf)
		if l.handle(m, buf, now) != delivered {
			Free(buf)
		}
		m.Seq++
	}
}
