package registry

import (
	"cmp"
	"fmt"
	"math"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
)

// history is all that happened to one server-id. It is legal if each operation took
// effect at one instant between its call and its return, such that their sequence
// obeys the table at apply; porcupine looks for that sequence. Times are since the
// start of the run.
type history struct {
	serverID     string
	grace, lease time.Duration // Config.Grace, LeaseTTL
	ops          []*operation
	pongs        []span // of binaries, from the ping on

	tenures []*tenure // set by learn
}

// operation is what a client asked, or what a node did by itself.
type operation struct {
	span
	client  int
	at      *place
	do      deed
	of      *tenure // whose claim, release, …; of a dial whom it reached
	got     outcome
	settled bool // dial: all faults are over, and every node had its time to notice
}

type deed string

const (
	claims    deed = "claim"
	releases  deed = "release"
	dials     deed = "dial"
	evicts    deed = "evict"    // a node closes a binary
	registers deed = "register" // a node writes again that it holds a binary
	reaps     deed = "reap"     // a node writes that another one is dead and a grace begins
)

type outcome string

const (
	done     outcome = "ok"
	conflict outcome = "conflict"
	busy     outcome = "held" // ErrHeld: nothing follows
	attached outcome = "attached"
	noServer outcome = "no-server"
	unknown  outcome = "unknown" // undecided, or whoever asked was killed meanwhile
)

// tenure is one claim and what became of it.
type tenure struct {
	name  string
	at    *place
	muted time.Duration // since then its binary answers no ping; or never
	wrote bool          // for all that is known, a write of the claim may have succeeded

	// Set by learn.
	index    int
	failed   bool
	released time.Duration // since then; or never
	reaped   time.Duration // since then; or never
	over     time.Duration // since then its node must refuse phones; or never
}

// place is a node.
type place struct {
	name   string
	faults []span        // it cannot be heard: cut off from NATS, or dead
	gone   time.Duration // since then it is dead; or never
}

// span is from a call to its return, or of a fault.
type span struct{ from, to time.Duration }

const never = time.Duration(math.MaxInt64)

func (s span) meets(o span) bool { return s.from <= o.to && o.from <= s.to }

// faulty reports whether p has had a fault of at least d when o ends, one that o meets.
func (p *place) faulty(o span, d time.Duration) bool {
	return slices.ContainsFunc(p.faults, func(f span) bool { return f.meets(o) && o.to-f.from >= d })
}

// register is what a server-id is, in the model.
type register struct {
	holder  int // index of the tenure that the KV names, or nobody
	inGrace bool
	past    uint64 // a bit for each tenure that it named before and does not now
}

const nobody = -1

// row names a row of the table at apply.
type row string

const (
	illegal row = ""

	claimFree       row = "claim: free"
	claimInGrace    row = "claim: in grace"
	claimLeftover   row = "claim: left by a failed claim"
	claimTakeover   row = "claim: takeover"
	claimNothing    row = "claim: no effect"
	conflictHeld    row = "conflict: held"
	releaseHeld     row = "release: held"
	releaseNothing  row = "release: no effect"
	attachedHeld    row = "attached: held"
	attachedInGrace row = "attached: in grace"
	attachedPast    row = "attached: superseded"
	noneFree        row = "no server: free"
	noneGraceOver   row = "no server: grace over"
	noneLeftover    row = "no server: left by a failed claim"
	noneSilent      row = "no server: node silent"
	evictPast       row = "evict: superseded"
	registerFree    row = "register: free"
	registerReaped  row = "register: reaped"
	registerNothing row = "register: no effect"
	reapHeld        row = "reap: held"
	reapNothing     row = "reap: no effect"
)

// apply does o at one instant. It returns what the server-id is after that, and the
// row that makes it legal, if one does. A tenure that is past was named by the KV
// before; its node knows it until it is told. A claim that failed may leave its entry
// for a while, but its node refuses phones.
//
//	row              legal if the server-id is                              it is then
//	claimFree        nobody's                                               held
//	claimInGrace     in grace                                               held
//	claimLeftover    left by a claim that failed                            held
//	claimTakeover    held, and meanwhile the binary was mute, or its or     held
//	                 the claimant's node had a fault
//	claimNothing     none of these; only if the outcome is unknown          the same
//	conflictHeld     held by another, whom its node knows                   the same
//	releaseHeld      held by this one                                       in grace
//	releaseNothing   not                                                    the same
//	attachedHeld     held by that one, whom its node knows                  the same
//	attachedInGrace  in grace of that one, whom its node knows              the same
//	attachedPast     past, whom its node knows; not when all is settled     the same
//	noneFree         nobody's                                               the same
//	noneGraceOver    in grace, for all its time                             nobody's
//	noneLeftover     left by a claim that failed                            the same
//	noneSilent       anybody's whose node has had a fault for as long as    the same
//	                 a look-up waits
//	evictPast        past                                                   the same
//	registerFree     nobody's, in grace for all its time, or left           held
//	registerReaped   in grace of this one, because it was reaped            held
//	registerNothing  held by this one; or the outcome is unknown            the same
//	reapHeld         held by one whose node has had a fault for as long     in grace
//	                 as a lease lasts without renewal
//	reapNothing      not held by that one                                   the same
func (h *history) apply(r register, o *operation) (register, row) {
	switch o.do {
	case claims:
		if o.got == conflict {
			return r, h.conflicting(r, o)
		}
		return h.claimed(r, o)
	case releases:
		if r.holder != o.of.index || r.inGrace {
			return r, releaseNothing
		}
		r.inGrace = true
		return r, releaseHeld
	case dials:
		if o.got == noServer {
			return h.notReached(r, o)
		}
		return r, h.reached(r, o)
	case registers:
		return h.registered(r, o)
	case reaps:
		return h.reaped(r, o)
	case evicts:
		if r.was(o.of) {
			return r, evictPast
		}
	}
	return r, illegal
}

func (h *history) claimed(r register, o *operation) (register, row) {
	next := r.named(o.of)
	switch in := h.holder(r); {
	case in == nil:
		return next, claimFree
	case r.inGrace:
		return next, claimInGrace
	case in.failed:
		return next, claimLeftover
	case in.muted <= o.to, in.at.faulty(o.span, 0), o.at.faulty(o.span, 0):
		return next, claimTakeover
	case o.got == unknown:
		return r, claimNothing
	}
	return r, illegal
}

func (h *history) conflicting(r register, o *operation) row {
	if in := h.holder(r); in != nil && !r.inGrace && o.from <= in.over {
		return conflictHeld
	}
	return illegal
}

func (h *history) reached(r register, o *operation) row {
	switch {
	case o.from > o.of.over:
		return illegal
	case r.holder == o.of.index && r.inGrace:
		return attachedInGrace
	case r.holder == o.of.index:
		return attachedHeld
	case r.was(o.of) && !o.settled:
		return attachedPast
	}
	return illegal
}

func (h *history) notReached(r register, o *operation) (register, row) {
	switch in := h.holder(r); {
	case in == nil:
		return r, noneFree
	case h.graceOver(r, o):
		return r.named(nil), noneGraceOver
	case in.failed:
		return r, noneLeftover
	case in.at.faulty(o.span, deadAfter-retryWaitMax):
		return r, noneSilent
	}
	return r, illegal
}

func (h *history) registered(r register, o *operation) (register, row) {
	switch in := h.holder(r); {
	case in == nil, h.graceOver(r, o), in.failed:
		return r.named(o.of), registerFree
	case in == o.of && r.inGrace && in.reaped != never:
		r.inGrace = false
		return r, registerReaped
	case in == o.of && !r.inGrace, o.got == unknown:
		return r, registerNothing
	}
	return r, illegal
}

func (h *history) reaped(r register, o *operation) (register, row) {
	if h.holder(r) != o.of || r.inGrace {
		return r, reapNothing
	}
	// The lease was renewed before the fault, and its end seen before the write.
	proof := span{o.from - decideTimeout, o.to}
	if o.of.at.faulty(proof, h.lease*3/4) {
		r.inGrace = true
		return r, reapHeld
	}
	return r, illegal
}

// holder is the tenure that the KV names; nil if none.
func (h *history) holder(r register) *tenure {
	if r.holder == nobody {
		return nil
	}
	return h.tenures[r.holder]
}

// graceOver reports whether there is a grace that may be over when o ends.
func (h *history) graceOver(r register, o *operation) bool {
	if !r.inGrace {
		return false
	}
	in := h.holder(r)
	began := in.released
	if began == never {
		began = in.reaped
	}
	return o.to-began >= h.grace
}

// named is r when the KV has come to name t; nil: nobody.
func (r register) named(t *tenure) register {
	if r.holder != nobody {
		r.past |= 1 << r.holder
	}
	r.holder, r.inGrace = nobody, false
	if t != nil {
		r.holder = t.index
		r.past &^= 1 << t.index
	}
	return r
}

func (r register) was(t *tenure) bool { return r.past>>t.index&1 == 1 }

// graceSlack is how late a grace may end.                  (doc.go: Not guaranteed)
const graceSlack = time.Second

// learn finds the tenures and what the operations tell of them.
func (h *history) learn() {
	slices.SortStableFunc(h.ops, func(a, b *operation) int { return cmp.Compare(a.from, b.from) })
	for _, o := range h.ops {
		if t := o.of; o.do == claims {
			t.index, t.failed, t.released, t.reaped, t.over = len(h.tenures), o.got != done, never, never, t.at.gone
			if t.failed {
				t.over = min(t.over, o.to)
			}
			h.tenures = append(h.tenures, t)
		}
	}
	for _, o := range h.ops {
		switch t := o.of; o.do {
		case releases:
			t.released = o.from
			if o.to != never {
				t.over = min(t.over, o.to+h.grace+graceSlack)
			}
		case reaps:
			t.reaped = min(t.reaped, o.from)
		case evicts:
			t.over = min(t.over, o.from)
		}
	}
}

// judge says whether the history is legal, and then which rows made it so.
func (h *history) judge() ([]row, *violation) {
	h.learn()
	for _, o := range h.ops {
		proof := func(pong span) bool { return pong.from >= o.from && pong.to <= o.to }
		if o.got == conflict && !slices.ContainsFunc(h.pongs, proof) {
			return nil, &violation{history: h, why: "no pong for " + o.String()}
		}
	}
	model := h.model()
	result, info := porcupine.CheckOperationsVerbose(model, h.operations(), time.Minute)
	if result != porcupine.Ok {
		return nil, &violation{h, "porcupine says " + string(result), model, info}
	}
	var rows []row
	r := register{holder: nobody}
	for _, o := range info.PartialLinearizationsOperations()[0][0] {
		var by row
		r, by = h.apply(r, o.Input.(*operation))
		rows = append(rows, by)
	}
	return rows, nil
}

func (h *history) model() porcupine.Model {
	return porcupine.Model{
		Init: func() any { return register{holder: nobody} },
		Step: func(state, input, _ any) (bool, any) {
			next, by := h.apply(state.(register), input.(*operation))
			return by != illegal, next
		},
		DescribeOperation: func(input, _ any) string { return input.(*operation).String() },
		DescribeState:     func(state any) string { return h.describe(state.(register)) },
	}
}

// operations is the history as porcupine takes it. A write of unknown outcome never
// returns: it may take effect at any time later. That goes for what a claim wrote
// before it failed, too.
func (h *history) operations() (list []porcupine.Operation) {
	add := func(o *operation, end time.Duration) {
		list = append(list, porcupine.Operation{ClientId: o.client, Input: o, Call: int64(o.from), Return: int64(end)})
	}
	for _, o := range h.ops {
		switch {
		case o.do == claims && o.got != done:
			if o.got == conflict {
				add(o, o.to)
			}
			if o.of.wrote {
				late := *o
				late.got = unknown
				add(&late, never)
			}
		case o.got == unknown:
			add(o, never)
		default:
			add(o, o.to)
		}
	}
	return list
}

func (h *history) describe(r register) string {
	switch in := h.holder(r); {
	case in == nil:
		return "free"
	case r.inGrace:
		return "in grace of " + in.name
	default:
		return "held by " + in.name
	}
}

func (o *operation) String() string {
	name := ""
	if o.of != nil {
		name = o.of.name + " "
	}
	return fmt.Sprintf("%s: %s %sby client %d: %s", o.at.name, o.do, name, o.client, o.got)
}

func (s span) String() string {
	to := "never"
	if s.to != never {
		to = fmt.Sprintf("%.3f", s.to.Seconds())
	}
	return fmt.Sprintf("%8.3f – %8s", s.from.Seconds(), to)
}

// violation is a history that is not legal.
type violation struct {
	*history
	why   string
	model porcupine.Model
	info  porcupine.LinearizationInfo
}

// report prints the history in the order of the calls, and draws it into a file.
func (v *violation) report() string {
	var b strings.Builder
	fmt.Fprintf(&b, "server-id %s: %s\n", v.serverID, v.why)
	places := make(map[*place]bool)
	for _, o := range v.ops {
		fmt.Fprintf(&b, "%s  %s\n", o.span, o)
		places[o.at] = true
	}
	for _, t := range v.tenures {
		if t.muted != never {
			fmt.Fprintf(&b, "%s  %s is mute\n", span{t.muted, never}, t.name)
		}
	}
	for p := range places {
		for _, f := range p.faults {
			fmt.Fprintf(&b, "%s  %s has a fault\n", f, p.name)
		}
	}
	if v.model.Step != nil {
		fmt.Fprintf(&b, "drawing: %s\n", v.draw())
	}
	return b.String()
}

func (v *violation) draw() string {
	f, err := os.CreateTemp("", "history-*.html") // not t.TempDir: to be looked at after the test
	if err != nil {
		return err.Error()
	}
	defer f.Close()
	if err := porcupine.Visualize(v.model, v.info, f); err != nil {
		return err.Error()
	}
	return f.Name()
}

// TestHistoryModel_TellsLegalFromIllegal judges histories made by hand. Times are in
// milliseconds; a grace takes 1,000, a lease 8,000. Each tenure has a node of its own,
// and phones dial through the node "x".
func TestHistoryModel_TellsLegalFromIllegal(t *testing.T) {
	for _, tt := range []struct {
		name  string
		legal bool
		ops   string
	}{
		{"a life", true, "0-9 dial no-server; 10-20 claim a ok; 30-40 dial a attached; 50-60 release a ok; 70-80 dial a attached; 1070-1080 dial no-server"},
		{"the first claim wins", true, "0-10 claim a ok; 5-25 claim b conflict; 15-20 pong a"},
		{"one of two wins", true, "0-50 claim a conflict; 0-40 claim b ok; 20-30 pong b"},
		{"claim in grace", true, "0-10 claim a ok; 20-40 release a ok; 25-30 claim b ok; 50-60 dial b attached"},
		{"claim after grace", true, "0-10 claim a ok; 20-30 release a ok; 2500-2510 dial no-server; 2520-2530 claim b ok"},
		{"takeover of a mute binary", true, "0-10 claim a ok; 15 mute a; 20-40 claim b ok; 45 evict a ok; 50-60 dial b attached"},
		{"takeover while the holder's node is cut off", true, "0-10 claim a ok; 20-90 fault a; 30-40 claim b ok; 50-60 dial a attached; 50-60 dial b attached; 95 evict a ok"},
		{"takeover while the claimant's node is cut off", true, "0-10 claim a ok; 15-25 fault b; 20-40 claim b ok"},
		{"claim after a kill", true, "0-10 claim a ok; 20-21 kill a; 30-40 claim b ok; 50-60 dial b attached"},
		{"no server after a kill", true, "0-10 claim a ok; 20-21 kill a; 30-4030 dial no-server"},
		{"unknown claim has its effect late", true, "0-10 claim a unknown; 20-30 dial no-server; 40-50 claim b ok; 60-70 release b ok; 75-80 dial b attached; 90-100 dial no-server"},
		{"unknown claim has none", true, "0-10 claim a unknown; 20-30 claim b ok; 40-50 dial b attached; 4000-4010 dial b attached"},
		{"phone comes while the claim that fails is under way", true, "0-40 claim a unknown; 10-20 dial a attached; 10-30 claim b conflict; 15-20 pong a"},
		{"failed by a conflict, written before", true, "0-10 claim a ok; 15 mute a; 20-40 claim b conflict; 25-26 pong a; 30-31 wrote b; 50 evict a ok; 60-70 dial no-server"},
		{"superseded, and not told yet", true, "0-10 claim a ok; 15 mute a; 20-40 claim b ok; 50-60 dial a attached; 70 evict a ok"},
		{"registers again when its successor has gone", true, "0-10 claim a ok; 15-2500 fault a; 20-40 claim b ok; 50-60 release b ok; 2600-2610 register a ok; 3100-3150 claim c conflict; 3110-3120 pong a; 9000-9010 settled a attached"},
		{"reaped, and back", true, "0-10 claim a ok; 15-9000 fault a; 8000-8010 reap a ok; 9100-9110 dial no-server; 9120-9130 dial a attached; 9140-9150 register a ok; 9160-9170 dial a attached"},

		{"two holders", false, "0-10 claim a ok; 20-30 claim b ok"},
		{"two holders at once", false, "0-30 claim a ok; 10-20 claim b ok"},
		{"takeover after a fault", false, "0-10 claim a ok; 12-14 fault a; 20-30 claim b ok"},
		{"takeover before the binary was mute", false, "0-10 claim a ok; 20-30 claim b ok; 31 mute a"},
		{"an old fault excuses no unknown claim", false, "0-10 claim a ok; 20-30 claim b unknown; 35-40 fault a; 60 evict a ok"},
		{"stale no server", false, "0-10 claim a ok; 20-30 dial no-server"},
		{"no server, and then attached", false, "0-90 claim a ok; 10-20 dial a attached; 30-40 dial no-server"},
		{"no server in grace", false, "0-10 claim a ok; 20-30 release a ok; 900-910 dial no-server"},
		{"no server after a short silence", false, "0-10 claim a ok; 20-1500 fault a; 30-4030 dial no-server; 5000-5010 dial no-server"},
		{"no server soon after a kill", false, "0-10 claim a ok; 20-21 kill a; 30-40 dial no-server"},
		{"conflict with nobody", false, "0-10 claim a conflict; 2-3 pong b"},
		{"conflict with itself", false, "0-10 claim a conflict; 2-3 pong a; 20-30 claim a2 ok"},
		{"conflict in grace", false, "0-10 claim a ok; 20-30 release a ok; 40-50 claim b conflict; 42-43 pong a"},
		{"conflict with the dead", false, "0-10 claim a ok; 20-21 kill a; 40-50 claim b conflict; 42-43 pong a"},
		{"conflict with a claim that failed", false, "0-10 claim a unknown; 40-50 claim b conflict; 42-43 pong a"},
		{"conflict by an old ping", false, "0-10 claim a ok; 15-25 pong a; 20-30 claim b conflict"},
		{"attached before the claim", false, "0-10 dial a attached; 20-30 claim a ok"},
		{"attached after eviction", false, "0-10 claim a ok; 15 mute a; 20-40 claim b ok; 45 evict a ok; 50-60 dial a attached"},
		{"attached after grace", false, "0-10 claim a ok; 20-30 release a ok; 2031-2040 dial a attached"},
		{"attached through the dead", false, "0-10 claim a ok; 20-21 kill a; 30-40 dial a attached"},
		{"attached to a claim that failed", false, "0-10 claim a unknown; 20-30 dial a attached"},
		{"attached to the superseded, all settled", false, "0-10 claim a ok; 15 mute a; 20-40 claim b ok; 9000-9010 settled a attached"},
		{"attached to two, all settled", false, "0-10 claim a ok; 15 mute a; 20-40 claim b ok; 9000-9010 settled b attached; 9000-9010 settled a attached"},
		{"reaped without a reason", false, "0-10 claim a ok; 1000-3000 fault a; 2900-2950 reap a ok"},
		{"registers over another", false, "0-10 claim a ok; 15 mute a; 20-40 claim b ok; 50-60 register a ok"},
		{"evicted for nobody", false, "0-10 claim a ok; 20 evict a ok"},
		{"evicted before the claim that took it", false, "0-10 claim a ok; 15 mute a; 20 evict a ok; 25-30 claim b ok"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, why := byHand(tt.ops).judge()
			if legal := why == nil; legal != tt.legal {
				t.Errorf("%s\nlegal: got %v, want %v", tt.ops, legal, tt.legal)
			}
		})
	}
}

// byHand makes a history of "<from>[-<to>] <what> [<tenure>] [<outcome>]", separated
// by semicolons.
func byHand(text string) *history {
	h := &history{grace: time.Second, lease: 8 * time.Second}
	x := &place{name: "x", gone: never}
	tenures := make(map[string]*tenure)
	for line := range strings.SplitSeq(text, ";") {
		words := strings.Fields(line)
		var from, to int
		if n, _ := fmt.Sscanf(words[0], "%d-%d", &from, &to); n == 1 {
			to = from
		}
		s := span{time.Duration(from) * time.Millisecond, time.Duration(to) * time.Millisecond}
		var of *tenure
		if what := words[2]; what != string(noServer) {
			if of = tenures[what]; of == nil {
				of = &tenure{name: what, muted: never, at: &place{name: "node of " + what, gone: never}}
				tenures[what] = of
			}
		}
		o := &operation{span: s, at: x, do: deed(words[1]), of: of, got: outcome(words[len(words)-1])}
		switch words[1] {
		case "mute":
			of.muted = s.from
		case "wrote":
			of.wrote = true
		case "pong":
			h.pongs = append(h.pongs, s)
		case "fault":
			of.at.faults = append(of.at.faults, s)
		case "kill":
			of.at.faults = append(of.at.faults, span{s.from, never})
			of.at.gone = s.to
		case "claim":
			o.at, of.wrote = of.at, of.wrote || o.got == unknown
			h.ops = append(h.ops, o)
		case "settled":
			o.do, o.settled = dials, true
			h.ops = append(h.ops, o)
		default:
			h.ops = append(h.ops, o)
		}
	}
	return h
}
