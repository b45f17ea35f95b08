package registry

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/pyrycode/pyrycode-relay/bus"
)

// errCodeNotClustered refuses replicas on a server that stands alone.
const errCodeNotClustered jetstream.ErrorCode = 10074

// operationHeader marks a key that ended.
const operationHeader = "KV-Operation"

// upToHeader tells which revision a replica had when it answered.
const upToHeader = "Nats-UpTo-Sequence"

// kv is one KV bucket, as the registry uses it. A read is a hint; only a write that
// was acknowledged, or errLost, proves anything. Keys are tokens. All methods may be
// called concurrently, and end when ctx does.
//
//	(docs/adr/0004; nats-measured.md 2.2)
type kv interface {
	// create makes the bucket if it is not there. The error is errMisfit if one is
	// that this node cannot use.
	create(ctx context.Context) error
	// put writes value if the key's latest revision is rev (0: there is none). With a
	// ttl (whole seconds) the key ends by itself. It returns the new revision,
	// errLost or errUnknown.
	put(ctx context.Context, key string, value []byte, rev uint64, ttl time.Duration) (uint64, error)
	// remove ends the key if its latest revision is rev. What marks its end goes after
	// markerTTL. Errors as put.
	remove(ctx context.Context, key string, rev uint64) error
	// get reads from whichever replica answers: it may be old without bound. The
	// error is errUnknown.
	get(ctx context.Context, key string) (record, error)
	// getLeader reads from the leader: it may be old while that is cut off. The error
	// is errUnknown.
	getLeader(ctx context.Context, key string) (record, error)
	// version tells what the bucket holds now from what it holds at any other time. It
	// may be old as getLeader.
	version(ctx context.Context) (version, error)
	// getMany reads at most 1,024 keys, as many as JetStream answers, from a replica that
	// has every write up to revision since: it waits for one. Keys without a record are
	// not in the result, and neither may others be.
	getMany(ctx context.Context, keys []string, since uint64) (map[string]record, error)
	// keys lists the keys that have a record, of those that ended included. It may be old
	// as getLeader.
	keys(ctx context.Context) ([]string, error)
}

// bucket is a kv on JetStream.
type bucket struct {
	conn     *bus.Conn
	name     string
	ttl      time.Duration // of every key; 0: none
	storage  jetstream.StorageType
	replicas int // when this node creates it; 0: what suits the cluster
}

// version of a bucket: every write, removal and loss changes one of these; only a loss of
// the last writes that is followed by as many others may not.
type version struct {
	last            uint64 // revision of the latest write to any key
	first, messages uint64
	created         int64 // nanoseconds since 1970
}

// record is one key's latest state. A key that ended has a revision (its
// marker's) and exists is false.
type record struct {
	value    []byte
	revision uint64
	exists   bool
}

// create implements kv. A gateway that may not create finds the one that an operator
// made.
func (b *bucket) create(ctx context.Context) error {
	js := b.conn.JetStream()
	if there, err := js.Stream(ctx, b.stream()); err == nil {
		return b.fits(there)
	}
	cfg := b.config(time.Now())
	made, err := js.CreateStream(ctx, cfg)
	var api *jetstream.APIError
	if errors.As(err, &api) && api.ErrorCode == errCodeNotClustered {
		cfg.Replicas = 1 // a server that only looked like a cluster, by the addresses it has
		made, err = js.CreateStream(ctx, cfg)
	}
	if errors.Is(err, jetstream.ErrStreamNameAlreadyInUse) { // another node was first
		made, err = js.Stream(ctx, b.stream())
	}
	if err != nil {
		return fmt.Errorf("create bucket %s: %w", b.name, err)
	}
	return b.fits(made)
}

// fits returns errMisfit if the keys of a bucket that is there end at another time
// than this node believes: it would go by a lease that the others have let go.
func (b *bucket) fits(there jetstream.Stream) error {
	if ttl := there.CachedInfo().Config.MaxAge; ttl != b.ttl {
		return fmt.Errorf("%w: the TTL of bucket %s is %s, this node wants %s: "+
			"give all nodes the same --lease-ttl, or delete the bucket while no gateway runs", errMisfit, b.name, ttl, b.ttl)
	}
	return nil
}

// config is what jetstream.CreateKeyValue makes, except for FirstSeq, which it has no
// word for: revisions go on from the time in microseconds. If they began at 1 again
// in a bucket that was lost and made anew, a node's revision from before could be
// that of somebody else's entry, and a compare-and-swap would go over it.
func (b *bucket) config(now time.Time) jetstream.StreamConfig {
	replicas := b.replicas
	if replicas == 0 {
		replicas = replicasFor(b.conn.Servers())
	}
	duplicates := 2 * time.Minute
	if b.ttl > 0 {
		duplicates = min(duplicates, b.ttl)
	}
	return jetstream.StreamConfig{
		Name: b.stream(), Subjects: []string{b.subject(">")}, FirstSeq: uint64(now.UnixMicro()), //nolint:gosec // after 1970
		MaxMsgsPerSubject: 1, MaxBytes: -1, MaxMsgSize: -1, MaxMsgs: -1, MaxConsumers: -1,
		MaxAge: b.ttl, Duplicates: duplicates, AllowMsgTTL: true, SubjectDeleteMarkerTTL: markerTTL,
		Storage: b.storage, Replicas: replicas, Discard: jetstream.DiscardNew,
		AllowRollup: true, DenyDelete: true, AllowDirect: true,
	}
}

// replicasFor is how many replicas a bucket has in a cluster of so many servers.
func replicasFor(servers int) int {
	if servers >= 3 {
		return 3
	}
	return 1
}

func (b *bucket) subject(key string) string { return "$KV." + b.name + "." + key }

func (b *bucket) put(ctx context.Context, key string, value []byte, rev uint64, ttl time.Duration) (uint64, error) {
	msg := nats.NewMsg(b.subject(key))
	msg.Data = value
	return b.publish(ctx, msg, rev, ttl)
}

func (b *bucket) remove(ctx context.Context, key string, rev uint64) error {
	msg := nats.NewMsg(b.subject(key))
	msg.Header.Set(operationHeader, "DEL")
	_, err := b.publish(ctx, msg, rev, markerTTL)
	return err
}

func (b *bucket) publish(ctx context.Context, msg *nats.Msg, rev uint64, ttl time.Duration) (uint64, error) {
	ctx, cancel := context.WithTimeout(ctx, kvTimeout)
	defer cancel()
	msg.Header.Set(jetstream.ExpectedLastSubjSeqHeader, strconv.FormatUint(rev, 10))
	if ttl > 0 {
		msg.Header.Set(jetstream.MsgTTLHeader, ttl.String())
	}
	answer, err := b.conn.RequestMsg(ctx, msg)
	if err != nil {
		return 0, fmt.Errorf("%w: write to %s: %w", errUnknown, b.name, err)
	}
	newRev, err := parseAck(answer.Data, b.stream())
	if err != nil {
		return 0, fmt.Errorf("%w: write to %s", err, b.name)
	}
	return newRev, nil
}

// parseAck reads JetStream's answer to a write: the revision, errLost, or errUnknown.
// What it looks like usually is read without encoding/json, which takes as long as the rest
// of the call.
func parseAck(p []byte, stream string) (uint64, error) {
	if rest, ok := bytes.CutPrefix(p, []byte(`{"stream":"`+stream+`","seq":`)); ok {
		digits, ok := bytes.CutSuffix(rest, []byte("}"))
		rev, err := strconv.ParseUint(string(digits), 10, 64)
		if ok && err == nil && digits[0] != '0' {
			return rev, nil
		}
	}
	var ack struct {
		Sequence uint64              `json:"seq"`
		Error    *jetstream.APIError `json:"error"`
	}
	err := json.Unmarshal(p, &ack)
	switch {
	case err != nil:
		return 0, fmt.Errorf("%w: answer is not JSON", errUnknown)
	case ack.Error != nil && ack.Error.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequence:
		return 0, errLost
	case ack.Error != nil:
		return 0, fmt.Errorf("%w: %w", errUnknown, ack.Error)
	case ack.Sequence == 0:
		return 0, fmt.Errorf("%w: answer without a revision", errUnknown)
	}
	return ack.Sequence, nil
}

func (b *bucket) get(ctx context.Context, key string) (record, error) {
	ctx, cancel := context.WithTimeout(ctx, kvTimeout)
	defer cancel()
	answer, err := b.conn.Request(ctx, "$JS.API.DIRECT.GET."+b.stream()+"."+b.subject(key), nil)
	if err != nil {
		return record{}, fmt.Errorf("%w: read from %s: %w", errUnknown, b.name, err)
	}
	_, rec, err := b.direct(answer)
	return rec, err
}

// direct reads an answer to DIRECT.GET. The key is empty if there is none.
func (b *bucket) direct(answer *nats.Msg) (key string, rec record, err error) {
	if status := answer.Header.Get("Status"); status != "" {
		if status == "404" {
			return "", record{}, nil
		}
		return "", record{}, fmt.Errorf("%w: read from %s: status %s", errUnknown, b.name, status)
	}
	revision, err := strconv.ParseUint(answer.Header.Get(jetstream.SequenceHeader), 10, 64)
	if err != nil {
		return "", record{}, fmt.Errorf("%w: read from %s: no revision", errUnknown, b.name)
	}
	key = strings.TrimPrefix(answer.Header.Get(jetstream.SubjectHeader), b.subject(""))
	ended := answer.Header.Get(operationHeader) != "" || answer.Header.Get(jetstream.MarkerReasonHeader) != ""
	return key, record{value: answer.Data, revision: revision, exists: !ended}, nil
}

func (b *bucket) version(ctx context.Context) (version, error) {
	ctx, cancel := context.WithTimeout(ctx, kvTimeout)
	defer cancel()
	stream, err := b.conn.JetStream().Stream(ctx, b.stream())
	if err != nil {
		return version{}, fmt.Errorf("%w: read from %s: %w", errUnknown, b.name, err)
	}
	info := stream.CachedInfo()
	return version{last: info.State.LastSeq, first: info.State.FirstSeq, messages: info.State.Msgs, created: info.Created.UnixNano()}, nil
}

func (b *bucket) getMany(ctx context.Context, keys []string, since uint64) (map[string]record, error) {
	ctx, cancel := context.WithTimeout(ctx, kvTimeout)
	defer cancel()
	subjects := make([]string, len(keys))
	for i, k := range keys {
		subjects[i] = b.subject(k)
	}
	ask, err := json.Marshal(map[string][]string{"multi_last": subjects})
	if err != nil {
		return nil, err
	}
	for {
		found, upTo, err := b.askMany(ctx, ask, len(keys))
		if err == nil && upTo < since && len(found) > 0 {
			err = errors.New("no replica is up to date")
			if pause(ctx, retryWait) {
				continue
			}
		}
		if err != nil {
			return nil, fmt.Errorf("%w: read from %s: %w", errUnknown, b.name, err)
		}
		return found, nil
	}
}

// askMany asks one replica for most records or fewer; upTo is the latest revision that it
// has.
func (b *bucket) askMany(ctx context.Context, ask []byte, most int) (found map[string]record, upTo uint64, err error) {
	found = make(map[string]record, most)
	var failure error
	err = b.conn.RequestMany(ctx, "$JS.API.DIRECT.GET."+b.stream(), ask, most+1, func(answer *nats.Msg) bool {
		switch answer.Header.Get("Status") {
		case "204": // that was all
			upTo, failure = strconv.ParseUint(answer.Header.Get(upToHeader), 10, 64)
			return false
		case "404": // there is nothing
			return false
		}
		key, rec, err := b.direct(answer)
		if err != nil {
			failure = err
			return false
		}
		found[key] = rec
		return true
	})
	return found, upTo, errors.Join(err, failure)
}

func (b *bucket) getLeader(ctx context.Context, key string) (record, error) {
	ctx, cancel := context.WithTimeout(ctx, kvTimeout)
	defer cancel()
	ask, err := json.Marshal(map[string]string{"last_by_subj": b.subject(key)})
	if err != nil {
		return record{}, err
	}
	answer, err := b.conn.Request(ctx, "$JS.API.STREAM.MSG.GET."+b.stream(), ask)
	if err != nil {
		return record{}, fmt.Errorf("%w: read from %s: %w", errUnknown, b.name, err)
	}
	return parseStored(answer.Data)
}

func (b *bucket) keys(ctx context.Context) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, kvTimeout)
	defer cancel()
	stream, err := b.conn.JetStream().Stream(ctx, b.stream())
	if err != nil {
		return nil, err
	}
	info, err := stream.Info(ctx, jetstream.WithSubjectFilter(b.subject(">")))
	if err != nil {
		return nil, err
	}
	keys := make([]string, 0, len(info.State.Subjects))
	for s := range info.State.Subjects {
		keys = append(keys, strings.TrimPrefix(s, b.subject("")))
	}
	return keys, nil
}

func (b *bucket) stream() string { return "KV_" + b.name }

// stored is JetStream's answer to STREAM.MSG.GET.
type stored struct {
	Message *struct {
		Sequence uint64 `json:"seq"`
		Header   []byte `json:"hdrs"`
		Data     []byte `json:"data"`
	} `json:"message"`
	Error *jetstream.APIError `json:"error"`
}

func parseStored(p []byte) (record, error) {
	var s stored
	if err := json.Unmarshal(p, &s); err != nil {
		return record{}, fmt.Errorf("%w: answer is not JSON", errUnknown)
	}
	switch {
	case s.Error != nil && s.Error.ErrorCode == jetstream.JSErrCodeMessageNotFound:
		return record{}, nil
	case s.Error != nil:
		return record{}, fmt.Errorf("%w: %w", errUnknown, s.Error)
	case s.Message == nil:
		return record{}, fmt.Errorf("%w: answer without a message", errUnknown)
	}
	ended := bytes.Contains(s.Message.Header, []byte(operationHeader)) ||
		bytes.Contains(s.Message.Header, []byte(jetstream.MarkerReasonHeader))
	return record{value: s.Message.Data, revision: s.Message.Sequence, exists: !ended}, nil
}
