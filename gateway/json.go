package gateway

import (
	bin "encoding/binary"
	"math/bits"
	"sync"
)

// scanner finds the bounds of the JSON values in p without building them (RFC 8259).
// Positions are offsets into p; -1 says that what should start there does not. It takes
// what encoding/json takes, equal keys, escapes that are half a surrogate pair and bytes
// that are no UTF-8 included; FuzzValidFrame and FuzzParseDown hold it against that.
// Pooled, because depth costs no stack here; owned by one call.
//
// No library is good enough: jsontext, the best of those that are right, takes 1.8 times
// as long at 8 KiB and 2.3 times at 300 B.          (docs/adr/0005, frames-measured.md)
type scanner struct {
	p     []byte
	seen  uint64 // bits of all bytes of strings, eight columns
	depth int
	// objects has bit d set if the value that is open at depth d is an object; else it
	// is an array.
	objects [maxDepth/64 + 1]uint64
}

// maxDepth is how deep values may nest, as in encoding/json.
const maxDepth = 10_000

const (
	columns  = 0x0101010101010101
	highBits = 0x80 * columns
)

var scanners = sync.Pool{New: func() any { return new(scanner) }}

func newScanner(p []byte) *scanner {
	s := scanners.Get().(*scanner)
	s.p, s.seen, s.depth = p, 0, 0
	return s
}

// release gives s back to the pool, without p.
func (s *scanner) release() {
	s.p = nil
	scanners.Put(s)
}

// ascii reports whether no string had a byte beyond ASCII. Nothing else can have one.
func (s *scanner) ascii() bool { return s.seen&highBits == 0 }

// at is the byte at i; 0, which no value has outside of strings, beyond the end.
func (s *scanner) at(i int) byte {
	if i < len(s.p) {
		return s.p[i]
	}
	return 0
}

// space returns the offset of the first byte that is not whitespace.
func (s *scanner) space(i int) int {
	for ; i < len(s.p); i++ {
		if c := s.p[i]; c != ' ' && c != '\n' && c != '\t' && c != '\r' {
			break
		}
	}
	return i
}

// value returns the end of the value that starts at i.
func (s *scanner) value(i int) int {
	outer := s.depth
	for i >= 0 {
		switch c := s.at(i); c {
		case '{', '[':
			if !s.push(c) {
				return -1
			}
			if i = s.space(i + 1); s.at(i) != c+2 { // its end
				i = s.member(i)
				continue
			}
			s.depth--
			i++
		case '"':
			i = s.text(i)
		default:
			i = s.scalar(i)
		}
		if i = s.ends(i, outer); s.depth == outer {
			return i
		}
	}
	return -1
}

// ends passes the ends of values that lie between i, the end of a value, and the next
// one. It returns where that starts, or the end of the value at depth outer.
func (s *scanner) ends(i, outer int) int {
	for i >= 0 && s.depth > outer {
		i = s.space(i)
		switch c := s.at(i); {
		case c == ',':
			return s.member(s.space(i + 1))
		case c == '}' && s.inObject(), c == ']' && !s.inObject():
			s.depth--
			i++
		default:
			return -1
		}
	}
	return i
}

// member returns where the value of the member or element at i starts.
func (s *scanner) member(i int) int {
	if !s.inObject() {
		return i
	}
	if i = s.text(i); i < 0 {
		return -1
	}
	return s.colon(i)
}

// colon passes the colon behind a name that ends at i.
func (s *scanner) colon(i int) int {
	if i = s.space(i); s.at(i) != ':' {
		return -1
	}
	return s.space(i + 1)
}

// push opens an object or array. It returns false when that is too deep.
func (s *scanner) push(c byte) bool {
	if s.depth == maxDepth {
		return false
	}
	s.depth++
	word, bit := &s.objects[s.depth/64], uint64(1)<<(s.depth%64)
	if c == '{' {
		*word |= bit
	} else {
		*word &^= bit
	}
	return true
}

func (s *scanner) inObject() bool { return s.objects[s.depth/64]>>(s.depth%64)&1 != 0 }

// text returns the end of the string that starts at i.
func (s *scanner) text(i int) int {
	if s.at(i) != '"' {
		return -1
	}
	for i++; ; {
		i = s.plain(i)
		switch s.at(i) {
		case '"':
			return i + 1
		case '\\':
			if i = s.escape(i); i < 0 {
				return -1
			}
		default: // a control character, or the end
			return -1
		}
	}
}

// plain returns the offset of the first byte from i on that is a quote, a backslash or
// a control character.
func (s *scanner) plain(i int) int {
	p := s.p
	for ; i+8 <= len(p); i += 8 {
		x := bin.LittleEndian.Uint64(p[i:])
		s.seen |= x
		quote, backslash := x^columns*'"', x^columns*'\\'
		// A byte is flagged if subtracting borrowed into its high bit; borrows make
		// false flags only after, never before, the first true one.
		flags := ((quote-columns)&^quote | (backslash-columns)&^backslash | (x-columns*' ')&^x) & highBits
		if flags != 0 {
			return i + bits.TrailingZeros64(flags)/8
		}
	}
	for ; i < len(p); i++ {
		c := p[i]
		s.seen |= uint64(c)
		if c == '"' || c == '\\' || c < ' ' {
			break
		}
	}
	return i
}

// escape returns the end of the escape that starts at i.
func (s *scanner) escape(i int) int {
	switch s.at(i + 1) {
	case '"', '\\', '/', 'b', 'f', 'n', 'r', 't':
		return i + 2
	case 'u':
		for j := i + 2; j < i+6; j++ {
			if c := s.at(j) | 0x20; (c < '0' || c > '9' || s.at(j) < '0') && (c < 'a' || c > 'f') {
				return -1
			}
		}
		return i + 6
	}
	return -1
}

// scalar returns the end of the number or literal that starts at i.
func (s *scanner) scalar(i int) int {
	switch s.at(i) {
	case 't':
		return s.literal(i, "true")
	case 'f':
		return s.literal(i, "false")
	case 'n':
		return s.literal(i, "null")
	case '-':
		i++
	}
	switch c := s.at(i); {
	case c == '0':
		i++
	case '1' <= c && c <= '9':
		i = s.digits(i)
	default:
		return -1
	}
	if s.at(i) == '.' {
		if i = s.digits(i + 1); i < 0 {
			return -1
		}
	}
	if c := s.at(i); c == 'e' || c == 'E' {
		i++
		if c := s.at(i); c == '+' || c == '-' {
			i++
		}
		return s.digits(i)
	}
	return i
}

func (s *scanner) literal(i int, text string) int {
	if end := i + len(text); end <= len(s.p) && string(s.p[i:end]) == text {
		return end
	}
	return -1
}

// digits returns the end of the digits that start at i, one at least.
func (s *scanner) digits(i int) int {
	start := i
	for c := s.at(i); '0' <= c && c <= '9'; c = s.at(i) {
		i++
	}
	if i == start {
		return -1
	}
	return i
}
