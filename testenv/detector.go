package testenv

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
)

// minMark is the length of the shortest mark, in bytes: a shorter one may be
// found by chance, and has no inside in base64.
const minMark = 8

// Detector looks for marks, which are parts of tokens and of frames, where none
// may be: in the text written to its Writers, and in what servers with it as
// their ServerOptions.Detector are told. It finds a mark as it is, in hex, in
// base64 and as a list of bytes, and keeps nothing but the first find of each
// mark in each place. It does not find a part of a mark, nor one that was
// compressed. All methods may be called concurrently. Use:
//
//	var detector = testenv.NewDetector("t0ken-of-a-test", "fr4me-of-a-test")
//
//	func TestMain(m *testing.M) { os.Exit(detector.Verify(m.Run)) }
//
//	slog.NewTextHandler(detector.Writer("log"), …)
type Detector struct {
	// Static after construction.
	forms   []form
	longest int // length of the longest form

	// Guarded by mu.
	mu    sync.Mutex
	first map[find]bool
	finds []error
}

// form is what text looks like that has the mark in it.
type form struct {
	mark string
	text []byte
}

// find is a mark that was found, and where.
type find struct{ where, mark string }

// NewDetector returns a detector of marks. They should be of letters, digits and
// dashes only, which every encoding of text leaves alone. It panics if one is
// shorter than 8 bytes.
func NewDetector(marks ...string) *Detector {
	d := &Detector{first: make(map[find]bool)}
	for _, mark := range marks {
		if len(mark) < minMark {
			panic(fmt.Sprintf("testenv: the mark %q is shorter than %d bytes", mark, minMark))
		}
		for _, text := range formsOf(mark) {
			d.forms = append(d.forms, form{mark, []byte(text)})
			d.longest = max(d.longest, len(text))
		}
	}
	return d
}

// formsOf returns what text may look like: itself, in hex, as fmt prints a slice
// of bytes, and the inside of its base64 at every alignment.
func formsOf(text string) []string {
	digits := hex.EncodeToString([]byte(text))
	forms := []string{text, digits, strings.ToUpper(digits), strings.Trim(fmt.Sprintf("%d", []byte(text)), "[]")}
	for _, encoding := range []*base64.Encoding{base64.RawStdEncoding, base64.RawURLEncoding} {
		for shift := range 3 {
			b64 := encoding.EncodeToString([]byte(strings.Repeat("x", shift) + text))
			forms = append(forms, b64[4:len(b64)-4])
		}
	}
	return forms
}

// Writer returns a writer of text, for instance of a log. Marks are found across
// its writes, which never fail. Err says where they were. It may be used
// concurrently.
func (d *Detector) Writer(where string) io.Writer { return &detectorWriter{d: d, where: where} }

// Err returns what was found so far, nil if nothing was.
func (d *Detector) Err() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return errors.Join(d.finds...)
}

// Verify calls run, which is (*testing.M).Run or closes servers after it. It
// returns run's exit code, or 1 if that is 0 and marks were found; those are
// printed to stderr.
func (d *Detector) Verify(run func() int) int {
	code := run()
	if err := d.Err(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return max(code, 1)
	}
	return code
}

func (d *Detector) look(where string, text []byte) {
	for _, f := range d.forms {
		if at := bytes.Index(text, f.text); at >= 0 {
			d.found(find{where, f.mark}, excerpt(text, at, at+len(f.text)))
		}
	}
}

func (d *Detector) found(f find, line []byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.first[f] {
		d.first[f] = true
		d.finds = append(d.finds, fmt.Errorf("the mark %q is in %s: …%s…", f.mark, f.where, line))
	}
}

// excerpt is the line of text[from:to], as far as it is near.
func excerpt(text []byte, from, to int) []byte {
	const before, after = 200, 100
	begin := max(from-before, bytes.LastIndexByte(text[:from], '\n')+1)
	end := min(to+after, len(text))
	if i := bytes.IndexByte(text[to:end], '\n'); i >= 0 {
		end = to + i
	}
	return text[begin:end]
}

type detectorWriter struct {
	d     *Detector
	where string

	mu   sync.Mutex
	text []byte // the end of what was written: as much as may be the begin of a mark
}

func (w *detectorWriter) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.text = append(w.text, p...)
	w.d.look(w.where, w.text)
	rest := max(0, len(w.text)-w.d.longest)
	w.text = append(w.text[:0], w.text[rest:]...)
	return len(p), nil
}
