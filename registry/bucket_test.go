package registry

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/pyrycode/pyrycode-relay/bus"
)

// writeUntil retries a write whose outcome is unknown, as on R3 one in 200,000 is.
func writeUntil(t *testing.T, write func() error) error {
	t.Helper()
	for range 20 {
		if err := write(); !errors.Is(err, errUnknown) {
			return err
		}
	}
	t.Fatal("outcome unknown 20 times")
	return nil
}

func TestBucket_ComparesAndSwaps(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		b, ctx := s.node().presence, t.Context()
		put := func(key, value string, rev uint64) (got uint64, err error) {
			err = writeUntil(t, func() error { got, err = b.put(ctx, key, []byte(value), rev, 0); return err })
			return got, err
		}
		want := func(what, key, value string, rev uint64, exists bool) {
			t.Helper()
			got, err := b.getLeader(ctx, key)
			if err != nil || string(got.value) != value || got.revision != rev || got.exists != exists {
				t.Errorf("%s: leader says %+v, %v; want %q at %d, exists %v", what, got, err, value, rev, exists)
			}
			eventually(t, 2*time.Second, what+": replicas agree", func() bool {
				hint, err := b.get(ctx, key)
				return err == nil && hint.revision == rev && hint.exists == exists && string(hint.value) == value
			})
		}
		want("never written", "k", "", 0, false)
		_, err := put("k", "x", 7)
		wantErr(t, "put over a revision that never was", err, errLost)
		first, err := put("k", "1", 0)
		wantErr(t, "put over nothing", err, nil)
		want("written", "k", "1", first, true)
		_, err = put("k", "x", 0)
		wantErr(t, "put over nothing again", err, errLost)
		second, err := put("k", "2", first)
		wantErr(t, "put over the latest", err, nil)
		_, err = put("k", "x", first)
		wantErr(t, "put over an older one", err, errLost)
		wantErr(t, "remove an older one", writeUntil(t, func() error { return b.remove(ctx, "k", first) }), errLost)
		want("as before", "k", "2", second, true)
		wantErr(t, "remove", writeUntil(t, func() error { return b.remove(ctx, "k", second) }), nil)
		marker, err := b.getLeader(ctx, "k")
		if err != nil || marker.exists || marker.revision <= second {
			t.Fatalf("removed: got %+v, %v; want a marker after %d", marker, err, second)
		}
		want("removed", "k", "", marker.revision, false)
		if ttl := s.raw("k").Header.Get("Nats-TTL"); ttl == "" {
			t.Error("the marker has no TTL: it stays for ever")
		}
		_, err = put("k", "x", 0)
		wantErr(t, "put over nothing, where a marker is", err, errLost)
		_, err = put("k", "x", second)
		wantErr(t, "put over what was removed", err, errLost)
		third, err := put("k", "3", marker.revision)
		wantErr(t, "put over a marker", err, nil)
		want("written again", "k", "3", third, true)
	})
}

func TestBucket_KeyEndsAfterItsTTL(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		b, ctx := s.node().presence, t.Context()
		start := time.Now()
		rev, err := b.put(ctx, "k", []byte("1"), 0, time.Second)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := b.put(ctx, "stays", []byte("1"), 0, time.Second); err != nil {
			t.Fatal(err)
		}
		stays, err := b.getLeader(ctx, "stays")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := b.put(ctx, "stays", []byte("2"), stays.revision, 0); err != nil {
			t.Fatal(err)
		}
		var r record
		eventually(t, 3*time.Second, "expired", func() bool { r, err = b.getLeader(ctx, "k"); return err == nil && !r.exists })
		if d := time.Since(start); d < time.Second {
			t.Errorf("expired after %s, want 1 s", d)
		}
		if r.revision <= rev {
			t.Errorf("marker: revision %d, want after %d", r.revision, rev)
		}
		if _, err := b.put(ctx, "k", []byte("2"), r.revision, 0); err != nil {
			t.Errorf("put over the marker: %v", err)
		}
		if r, err := b.getLeader(ctx, "stays"); err != nil || !r.exists {
			t.Errorf("key written again without a TTL: got %+v, %v; want that it stays", r, err)
		}
	})
}

// A bucket is what the KV API would make, but for the revision that it begins with.
func TestBucket_IsAKeyValueBucket(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		n := s.node()
		for _, b := range []*bucket{n.nodes.(*bucket), n.presence.(*bucket)} {
			ours, err := s.js.Stream(t.Context(), b.stream())
			if err != nil {
				t.Fatal(err)
			}
			like := jetstream.KeyValueConfig{
				Bucket: b.name + "_like", History: 1, TTL: b.ttl, LimitMarkerTTL: markerTTL,
				Storage: b.storage, Replicas: len(s.w.urls),
			}
			if _, err := s.js.CreateKeyValue(t.Context(), like); err != nil {
				t.Fatal(err)
			}
			theirs, err := s.js.Stream(t.Context(), "KV_"+like.Bucket)
			if err != nil {
				t.Fatal(err)
			}
			got, want := ours.CachedInfo().Config, theirs.CachedInfo().Config
			if got.FirstSeq == 0 {
				t.Error("revisions begin at 1")
			}
			got.FirstSeq, want.Name, want.Subjects = 0, got.Name, got.Subjects
			if !reflect.DeepEqual(got, want) {
				t.Errorf("got  %+v\nwant %+v", got, want)
			}
			if err := s.js.DeleteKeyValue(t.Context(), like.Bucket); err != nil {
				t.Error(err)
			}
		}
	})
}

// What a node wrote into a bucket that is gone proves nothing in the one that is
// there now: it could be somebody else's entry.
func TestBucket_LostAndMadeAnew_OldRevisionsLose(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		b, ctx := s.node().presence.(*bucket), t.Context()
		before, err := b.put(ctx, "k", []byte("mine"), 0, 0)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.js.DeleteKeyValue(ctx, b.name); err != nil {
			t.Fatal(err)
		}
		eventually(t, 10*time.Second, "made anew", func() bool { return b.create(ctx) == nil })
		var theirs uint64
		eventually(t, 10*time.Second, "somebody else's entry", func() bool {
			theirs, err = b.put(ctx, "k", []byte("theirs"), 0, 0)
			return err == nil
		})
		if theirs <= before {
			t.Errorf("revision %d after %d", theirs, before)
		}
		if _, err := b.put(ctx, "k", []byte("mine"), before, 0); !errors.Is(err, errLost) {
			t.Errorf("write at revision %d, which is not there: got %v, want %v", before, err, errLost)
		}
	})
}

func TestBucket_GetMany(t *testing.T) {
	onBoth(t, func(t *testing.T, s *scene) {
		b, ctx := s.node().presence, t.Context()
		var keys []string
		for i := range 50 {
			key := fmt.Sprint("k", i)
			keys = append(keys, key)
			if i%2 == 0 {
				if _, err := b.put(ctx, key, []byte(key), 0, 0); err != nil {
					t.Fatal(err)
				}
			}
		}
		v, err := b.version(ctx)
		if err != nil {
			t.Fatal(err)
		}
		since := v.last
		found, err := b.getMany(ctx, keys, since) // nothing of it is missing, whichever replica answers
		if err != nil || len(found) != 25 {
			t.Fatalf("got %d keys, %v; want 25", len(found), err)
		}
		for key, r := range found {
			if !r.exists || string(r.value) != key || r.revision == 0 {
				t.Errorf("%s: got %+v", key, r)
			}
		}
		if found, err := b.getMany(ctx, []string{"none"}, since); err != nil || len(found) != 0 {
			t.Errorf("a key that is not there: got %v, %v", found, err)
		}
		if _, err := b.getMany(ctx, keys, since+1); !errors.Is(err, errUnknown) {
			t.Errorf("a revision that no replica has: got %v, want %v", err, errUnknown)
		}
		got, err := b.keys(ctx)
		slices.Sort(got)
		if err != nil || len(got) != 25 {
			t.Errorf("keys: got %v, %v", got, err)
		}
	})
}

// Only a wrong last sequence proves that a write failed.
func TestWriteErrors_AreLostOrUnknown(t *testing.T) {
	t.Parallel()
	s := newScene(t, alone)
	n := s.node()
	b := &bucket{conn: n.conn, name: s.cfg.KVPrefix + "_fake"}
	for key, c := range map[string]struct {
		answer string
		want   error
	}{
		"lost":        {`{"error":{"code":400,"err_code":10071,"description":"wrong last sequence: 5"}}`, errLost},
		"in-flight":   {`{"error":{"code":400,"err_code":10164,"description":"wrong last sequence"}}`, errUnknown},
		"unavailable": {`{"error":{"code":503,"err_code":10008,"description":"unavailable"}}`, errUnknown},
		"ttl":         {`{"error":{"code":400,"err_code":10165,"description":"invalid per-message TTL"}}`, errUnknown},
		"no-code":     {`{"error":{"code":500,"description":"?"}}`, errUnknown},
		"garbage":     {`?`, errUnknown},
		"empty":       {`{}`, errUnknown},
		"ok":          {`{"stream":"KV_x","seq":17}`, nil},
	} {
		sub, err := s.nc.Subscribe(b.subject(key), func(m *nats.Msg) { _ = m.Respond([]byte(c.answer)) })
		if err != nil {
			t.Fatal(err)
		}
		if err := s.nc.Flush(); err != nil {
			t.Fatal(err)
		}
		rev, err := b.put(t.Context(), key, []byte("v"), 5, 0)
		wantErr(t, key, err, c.want)
		if c.want == nil && rev != 17 {
			t.Errorf("%s: revision %d, want 17", key, rev)
		}
		if errors.Is(c.want, errUnknown) && errors.Is(err, errLost) {
			t.Errorf("%s: %v is lost, too", key, err)
		}
		if err := sub.Unsubscribe(); err != nil {
			t.Fatal(err)
		}
	}
	_, err := b.put(t.Context(), "nobody", []byte("v"), 5, 0)
	wantErr(t, "nobody answers", err, errUnknown)
	silent, err := s.nc.SubscribeSync(b.subject("silent"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = silent.Unsubscribe() }()
	if err := s.nc.Flush(); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	_, err = b.put(t.Context(), "silent", []byte("v"), 5, 0)
	wantErr(t, "no answer", err, errUnknown)
	if d := time.Since(start); d > kvTimeout+slack*2/5 {
		t.Errorf("no answer: took %s, want %s", d, kvTimeout)
	}
	for _, err := range []error{second(b.get(t.Context(), "k")), second(b.getLeader(t.Context(), "k"))} {
		wantErr(t, "read from a bucket that is not there", err, errUnknown)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = n.presence.put(ctx, "k", []byte("v"), 0, 0)
	wantErr(t, "context ended", err, errUnknown)
}

func second[T any](_ T, err error) error { return err }

func TestParseAck(t *testing.T) {
	for name, c := range map[string]struct {
		answer string
		want   uint64
		err    error
	}{
		"written":          {`{"stream":"KV_b","seq":1795854565455645582}`, 1795854565455645582, nil},
		"in a domain":      {`{"stream":"KV_b","domain":"hub","seq":7}`, 7, nil},
		"written before":   {`{"stream":"KV_b","seq":7,"duplicate":true}`, 7, nil},
		"lost":             {`{"error":{"code":400,"err_code":10071,"description":"wrong last sequence: 5"},"stream":"KV_b","seq":0}`, 0, errLost},
		"maybe lost":       {`{"error":{"code":400,"err_code":10164,"description":"wrong last sequence"},"stream":"KV_b","seq":0}`, 0, errUnknown},
		"no leader":        {`{"error":{"code":503,"err_code":10008}}`, 0, errUnknown},
		"no revision":      {`{"stream":"KV_b","seq":0}`, 0, errUnknown},
		"another stream":   {`{"stream":"KV_c","seq":7}`, 7, nil},
		"too large":        {`{"stream":"KV_b","seq":18446744073709551616}`, 0, errUnknown},
		"cut off":          {`{"stream":"KV_b","seq":179`, 0, errUnknown},
		"cut off at once":  {`{"stream":"KV_b","seq":`, 0, errUnknown},
		"with a leading 0": {`{"stream":"KV_b","seq":07}`, 0, errUnknown},
		"nothing":          {``, 0, errUnknown},
	} {
		got, err := parseAck([]byte(c.answer), "KV_b")
		wantErr(t, name, err, c.err)
		if got != c.want {
			t.Errorf("%s: got %d, want %d", name, got, c.want)
		}
	}
}

// What is read without encoding/json is what encoding/json reads.
func FuzzParseAck(f *testing.F) {
	for _, seed := range []string{
		`{"stream":"KV_b","seq":7}`, `{"stream":"KV_b","seq":7,"duplicate":true}`, `{"stream":"KV_b","seq":0}`, `{"stream":"KV_b","seq":07}`,
		`{"stream":"KV_b","seq":7}}`, `{"stream":"KV_b","seq":7`, `{"error":{"err_code":10071}}`, `{}`, ``,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		got, err := parseAck(p, "KV_b")
		theirs, theirErr := parseAck(p, "none") // never takes the short way
		if got != theirs || (err == nil) != (theirErr == nil) || errors.Is(err, errLost) != errors.Is(theirErr, errLost) {
			t.Errorf("%q: got %d, %v; encoding/json: %d, %v", p, got, err, theirs, theirErr)
		}
		if (err == nil) != (got != 0) || err != nil && !errors.Is(err, errLost) && !errors.Is(err, errUnknown) {
			t.Errorf("%q: got %d, %v", p, got, err)
		}
	})
}

func TestParseStored(t *testing.T) {
	for name, c := range map[string]struct {
		answer string
		want   record
		err    error
	}{
		"there":       {`{"message":{"seq":7,"data":"aGk="}}`, record{value: []byte("hi"), revision: 7, exists: true}, nil},
		"nothing":     {`{"error":{"code":404,"err_code":10037}}`, record{}, nil},
		"no stream":   {`{"error":{"code":404,"err_code":10059}}`, record{}, errUnknown},
		"no leader":   {`{"error":{"code":503,"err_code":10008}}`, record{}, errUnknown},
		"empty":       {`{}`, record{}, errUnknown},
		"not JSON":    {`?`, record{}, errUnknown},
		"deleted":     {`{"message":{"seq":8,"hdrs":"TkFUUy8xLjANCktWLU9wZXJhdGlvbjogREVMDQoNCg=="}}`, record{revision: 8}, nil},
		"expired":     {`{"message":{"seq":9,"hdrs":"TkFUUy8xLjANCk5hdHMtTWFya2VyLVJlYXNvbjogTWF4QWdlDQoNCg=="}}`, record{revision: 9}, nil},
		"with a TTL":  {`{"message":{"seq":9,"hdrs":"TkFUUy8xLjANCk5hdHMtVFRMOiAycw0KDQo=","data":"aGk="}}`, record{value: []byte("hi"), revision: 9, exists: true}, nil},
		"wrong types": {`{"message":5}`, record{}, errUnknown},
	} {
		got, err := parseStored([]byte(c.answer))
		wantErr(t, name, err, c.err)
		if string(got.value) != string(c.want.value) || got.revision != c.want.revision || got.exists != c.want.exists {
			t.Errorf("%s: got %+v, want %+v", name, got, c.want)
		}
	}
}

func FuzzParseStored(f *testing.F) {
	for _, seed := range []string{
		`{"type":"io.nats.jetstream.api.v1.stream_msg_get_response","message":{"subject":"$KV.b.k","seq":7,"data":"aGk=","time":"2026-01-01T00:00:00Z"}}`,
		`{"message":{"seq":8,"hdrs":"TkFUUy8xLjANCktWLU9wZXJhdGlvbjogREVMDQoNCg=="}}`,
		`{"error":{"code":404,"err_code":10037,"description":"no message found"}}`, `{}`, `null`, `[`, ``,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		r, err := parseStored(p)
		if err != nil && !errors.Is(err, errUnknown) {
			t.Errorf("%q: %v, want an unknown outcome", p, err)
		}
		if err != nil && (r.exists || r.revision != 0) {
			t.Errorf("%q: got %+v and %v", p, r, err)
		}
		if e, ok := entryOf(r); ok && !r.exists {
			t.Errorf("%q: entry %+v of a key that ended", p, e)
		}
	})
}

func FuzzEntryOf(f *testing.F) {
	f.Add(entry{Node: "n-00000000", Session: bus.NewSessionID(), State: stateGrace, Since: 5, Version: "v1"}.encode())
	f.Add(entry{Node: "n-00000000", Session: bus.NewSessionID(), State: stateHeld}.encode())
	for _, seed := range []string{`{"node":">","session":"00112233445566778899aabbccddeeff","state":"held"}`, `{"node":"a.b"}`, `null`, `"x"`, `{`, ``} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		e, ok := entryOf(record{value: p, revision: 1, exists: true})
		if !ok {
			if e != (entry{}) {
				t.Errorf("%q: got %+v without ok", p, e)
			}
			return
		}
		if e.Node == "" || strings.ContainsAny(string(e.Node), ".*> \t\r\n") || e.Session == (bus.SessionID{}) || e.State != stateHeld && e.State != stateGrace {
			t.Errorf("%q: took %+v for an entry", p, e)
		}
		e.Version = versionText(e.Version)
		if again, ok := entryOf(record{value: e.encode(), revision: 1, exists: true}); !ok || again != e {
			t.Errorf("%q: %+v became %+v", p, e, again)
		}
		if _, ok := entryOf(record{value: p, revision: 1}); ok {
			t.Errorf("%q: an entry where the key ended", p)
		}
	})
}
