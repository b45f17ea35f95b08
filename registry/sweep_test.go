package registry

import (
	"context"
	"errors"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/pyrycode/pyrycode-relay/bus"
)

// removeID deletes the key of the server-id "id" by hand.
func (s *scene) removeID() {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	kv, err := s.js.KeyValue(ctx, s.cfg.KVPrefix+"_presence")
	if err == nil {
		err = kv.Delete(ctx, "id")
	}
	if err != nil {
		s.t.Fatal(err)
	}
}

// deleteBucket deletes a bucket by hand. While nodes make one NATS may leave a request
// without an answer, which is then asked again.
func (s *scene) deleteBucket(name string) {
	s.t.Helper()
	eventually(s.t, 20*time.Second, "the bucket deleted", func() bool {
		ctx, cancel := context.WithTimeout(context.Background(), kvTimeout)
		defer cancel()
		err := s.js.DeleteKeyValue(ctx, name)
		return err == nil || errors.Is(err, jetstream.ErrBucketNotFound)
	})
}

func TestEntryDeleted_IsWrittenAgain(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		ns := s.three()
		b := ns[0].mustClaim("id")
		p := ns[1].mustDial("id")
		s.removeID()
		eventually(t, sweepEvery+2*slack, "entry there again", func() bool { _, ok := s.entry("id"); return ok })
		s.wantHolder(b)
		wantQuiet(t, "eviction", b.evicted)
		wantQuiet(t, "end of the phone", p.in.ends)
	})
}

func TestAnotherSessionInTheKV_DisplacesTheHolder(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		ns := s.three()
		b := ns[0].mustClaim("id")
		p := ns[1].mustDial("id")
		s.write("id", entry{Node: ns[1].id, Session: bus.NewSessionID(), State: stateHeld}.encode())
		wantErr(t, "eviction", within(t, sweepEvery+2*slack, "eviction", b.evicted), ErrDisplaced)
		wantErr(t, "its phone", within(t, 2*time.Second, "end", p.in.ends), bus.ErrReclaimed)
		b.release()
		if e, _ := s.entry("id"); e.State != stateHeld || e.Node != ns[1].id {
			t.Errorf("entry: got %+v, want the other session's", e)
		}
		wantQuiet(t, "a second eviction", b.evicted)
	})
}

// A node that was frozen for longer than its lease still has its ends of links
// that the others have ended: it finds out when its lease is back.
func TestFrozenNode_EndsLinksThatTheOthersForgot(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		ns := s.three()
		ns[0].mustClaim("id")
		p := ns[1].mustDial("id")
		ns[0].bus.EndNode(ns[1].id) // as it does when a lease is gone
		wantQuiet(t, "end of the phone", p.in.ends)
		ns[1].lease.mu.Lock()
		ns[1].lease.renewed = time.Now().Add(-ns[1].cfg.LeaseTTL) // the clock went on while it was frozen
		ns[1].lease.mu.Unlock()
		nudge(ns[1].renewNow)
		wantErr(t, "the phone", within(t, 5*time.Second, "end", p.in.ends), bus.ErrLinkLost)
		ns[1].mustDial("id")
	})
}

// A node whose entries all agree reads none of them again while the KV is what it was,
// and all of them when anything in it has changed: a key, by anybody, or the messages
// that a purge by hand takes away without a new revision.
func TestSweep_ReadsEntriesOnlyWhenTheKVHasChanged(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		n := s.node()
		n.mustClaim("id")
		n.mustClaim("other")
		n.cancel() // its own sweeps; each call of read is one
		n.tasks.Wait()
		kv := &countingKV{kv: n.presence}
		n.presence, n.settled, n.sweeps = kv, version{}, 0
		read := func(what string, want bool) {
			t.Helper()
			before := kv.reads.Load()
			if !n.sweep(t.Context()) {
				t.Fatalf("%s: the sweep found something unknown", what)
			}
			if got := kv.reads.Load() > before; got != want {
				t.Errorf("%s: entries were read: %v, want %v", what, got, want)
			}
		}
		read("after the claims", true)
		read("nothing since", false)
		n.mu.Lock()
		n.current["other"].agreed = false // as if its claim had been under way in that sweep
		n.mu.Unlock()
		read("a holding that was never compared", true)
		read("nothing has changed", false)
		s.write("somebody", entry{Node: "else", Session: bus.NewSessionID(), State: stateHeld}.encode())
		read("another key was written", true)
		read("nothing since", false)
		s.purge("id")
		read("a key was purged without a word", true)
		if _, ok := s.entry("id"); !ok {
			t.Error("the purged entry was not written again")
		}
		read("after its own write", true)
		for n.sweeps%fullSweepEvery < fullSweepEvery-1 {
			read("nothing since", false)
		}
		read("everything, now and then", true)
	})
}

func TestByPages(t *testing.T) {
	list := make([]int, 2*farPage)
	for name, c := range map[string]struct {
		read      time.Duration
		failsAt   int // page
		endsAfter time.Duration
		pages     []int
	}{
		"near":            {time.Millisecond, -1, time.Hour, slices.Repeat([]int{pageSize}, 20)},
		"near, one slow":  {time.Millisecond, -1, time.Hour, slices.Repeat([]int{pageSize}, 20)},
		"between regions": {150 * time.Millisecond, -1, time.Hour, []int{pageSize, farPage, farPage - pageSize}},
		"a page fails":    {time.Millisecond, 2, time.Hour, []int{pageSize, pageSize}},
		"time is up":      {150 * time.Millisecond, -1, time.Second / 5, []int{pageSize, farPage}},
	} {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), c.endsAfter)
			defer cancel()
			var pages []int
			left := byPages(ctx, list, func(page []int) bool {
				if len(pages) == c.failsAt {
					return false
				}
				read := c.read
				if name == "near, one slow" && len(pages) == 3 {
					read = time.Second
				}
				time.Sleep(read) //nolint:forbidigo // a bubble
				pages = append(pages, len(page))
				return true
			})
			done := 0
			for _, n := range pages {
				done += n
			}
			if !slices.Equal(pages, c.pages) || len(left) != len(list)-done {
				t.Errorf("%s: pages %v, %d left; want %v", name, pages, len(left), c.pages)
			}
		})
	}
}

func TestReapSoon(t *testing.T) {
	var r Registry
	r.reaping.keys = []string{"not looked at"}
	r.reapSoon(false)
	if wait := time.Until(r.reapAt); wait < sweepEvery/4 || wait > sweepEvery/2 {
		t.Errorf("not the first node: in %s, want half a sweep", wait)
	}
	if !r.reaping.left {
		t.Error("a node died during a scan, and nothing is left to be looked at again")
	}
	due := r.reapAt
	r.reapSoon(false) // one that restarts all the time does not put it off
	if r.reapAt != due {
		t.Errorf("put off by %s", r.reapAt.Sub(due))
	}
	r.reapSoon(true)
	if time.Until(r.reapAt) > 0 {
		t.Errorf("the first node: in %s, want now", time.Until(r.reapAt))
	}
}

// purge takes a key's messages out of the stream, and leaves no marker.
func (s *scene) purge(key string) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	stream, err := s.js.Stream(ctx, "KV_"+s.cfg.KVPrefix+"_presence")
	if err == nil {
		err = stream.Purge(ctx, jetstream.WithPurgeSubject("$KV."+s.cfg.KVPrefix+"_presence."+key))
	}
	if err != nil {
		s.t.Fatal(err)
	}
}

// countingKV counts the reads of entries in sweeps, and the writes.
type countingKV struct {
	kv
	reads, writes atomic.Int32
}

func (c *countingKV) put(ctx context.Context, key string, value []byte, rev uint64, ttl time.Duration) (uint64, error) {
	c.writes.Add(1)
	return c.kv.put(ctx, key, value, rev, ttl)
}

func (c *countingKV) getMany(ctx context.Context, keys []string, since uint64) (map[string]record, error) {
	c.reads.Add(1)
	return c.kv.getMany(ctx, keys, since)
}

func (c *countingKV) getLeader(ctx context.Context, key string) (record, error) {
	c.reads.Add(1)
	return c.kv.getLeader(ctx, key)
}
