package gateway

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/pyrycode/pyrycode-relay/bus"
	"github.com/pyrycode/pyrycode-relay/registry"
	"github.com/pyrycode/pyrycode-relay/testenv"
)

// benchPair is a phone and a binary on one node, over real sockets. Allocations
// include those of the two peers.
func benchPair(b *testing.B) (*testenv.Phone, *testenv.Binary) {
	b.Helper()
	log := slog.New(slog.DiscardHandler)
	id := bus.NewNodeID("bench")
	conn, err := bus.Dial(bus.ConnConfig{URL: natsURL}, id, log)
	if err != nil {
		b.Fatal(err)
	}
	reg := registry.New(bus.New(conn, id, bus.Config{}, log), registry.Config{KVPrefix: "bench", Memory: true, KVReplicas: 1}, log)
	if err := reg.Start(); err != nil {
		b.Fatal(err)
	}
	gw := New(reg, log, WithConfig(Config{UpgradeBurst: -1}))
	srv := httptest.NewServer(gw.Handler())
	b.Cleanup(func() {
		gw.Shutdown(context.Background())
		srv.Close()
		reg.Stop(context.Background())
		conn.Close()
	})
	await(b, "ready", func() bool { return reg.Ready() == nil })
	url, serverID := "ws"+strings.TrimPrefix(srv.URL, "http"), newServerID()
	binary, err := testenv.DialBinary(b.Context(), url, testenv.BinaryOptions{ServerID: serverID})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(binary.Drop)
	phone, err := testenv.DialPhone(b.Context(), url, testenv.PhoneOptions{ServerID: serverID})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(phone.Drop)
	return phone, binary
}

// benchWindow is how many frames are on their way at once.
const benchWindow = 64

func BenchmarkPhoneToBinary(b *testing.B) {
	for _, size := range []int{300, 8 << 10, 128 << 10} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			phone, binary := benchPair(b)
			frame := sealedFrame(size)
			b.ReportAllocs()
			b.SetBytes(int64(size))
			benchmarkFlow(b, func() error { return phone.Send(context.Background(), frame) }, binary.Peer)
		})
	}
}

func BenchmarkBinaryToPhone(b *testing.B) {
	for _, size := range []int{300, 8 << 10, 128 << 10} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			phone, binary := benchPair(b)
			if err := phone.Send(b.Context(), []byte("1")); err != nil {
				b.Fatal(err)
			}
			e, err := binary.NextEnvelope(b.Context())
			if err != nil {
				b.Fatal(err)
			}
			id, _ := json.Marshal(e.ConnID)
			message := fmt.Appendf(nil, `{"conn_id":%s,"frame":%s}`, id, sealedFrame(size))
			b.ReportAllocs()
			b.SetBytes(int64(size))
			benchmarkFlow(b, func() error { return binary.SendRaw(context.Background(), message) }, phone.Peer)
		})
	}
}

func benchmarkFlow(b *testing.B, send func() error, to *testenv.Peer) {
	room := make(chan struct{}, benchWindow)
	b.ResetTimer()
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		for range b.N {
			room <- struct{}{}
			if err := send(); err != nil {
				b.Error(err)
				return
			}
		}
	}()
	for range b.N {
		if _, err := to.Next(context.Background()); err != nil {
			b.Fatal(err)
		}
		<-room
	}
	<-sent
}
