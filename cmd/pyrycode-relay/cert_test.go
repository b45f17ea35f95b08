package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"log/slog"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// certPair is a self-signed certificate in files.
type certPair struct{ certFile, keyFile string }

func newCertPair(t *testing.T, name string) certPair {
	t.Helper()
	dir := t.TempDir()
	p := certPair{filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")}
	p.write(t, name, time.Now())
	return p
}

// write replaces the pair by one for name, and says it was modified then.
func (p certPair) write(t *testing.T, name string, modified time.Time) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{name}, NotAfter: time.Now().Add(time.Hour)}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, p.certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}), modified)
	writeFile(t, p.keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), modified)
}

func writeFile(t *testing.T, name string, content []byte, modified time.Time) {
	t.Helper()
	if err := os.WriteFile(name, content, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(name, modified, modified); err != nil {
		t.Fatal(err)
	}
}

// nameIn returns the name that the certificate now in use is for.
func nameIn(t *testing.T, f *certFiles) string {
	t.Helper()
	pair, err := f.certificate(nil)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(pair.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	return cert.DNSNames[0]
}

func TestCertFiles_FollowChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		pair := newCertPair(t, "first")
		f, err := openCertFiles(pair.certFile, pair.keyFile, newLogger(&log, "text", "info", "relay-1"))
		if err != nil {
			t.Fatal(err)
		}
		step := func(want, wantEvents string) {
			t.Helper()
			for range 3 {
				time.Sleep(certCheckInterval) //nolint:forbidigo // in a synctest bubble
				if got := nameIn(t, f); got != want {
					t.Fatalf("got the certificate of %q, want %q", got, want)
				}
			}
			if got := events(log.String()); got != wantEvents {
				t.Fatalf("got events %q, want %q; log:\n%s", got, wantEvents, &log)
			}
			log.Reset()
		}
		step("first", "")

		pair.write(t, "second", time.Now().Add(time.Minute))
		step("second", "tls_reloaded")

		// Replaced by an older one, as from a backup.
		pair.write(t, "third", time.Now().Add(-time.Hour))
		step("third", "tls_reloaded")

		writeFile(t, pair.keyFile, []byte("half a ke"), time.Now())
		step("third", "tls_reload_failed")
		os.Remove(pair.certFile)
		step("third", "tls_reload_failed")

		pair.write(t, "fourth", time.Now())
		step("fourth", "tls_reloaded")
	})
}

func TestCertFiles_LookOnceASecond(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pair := newCertPair(t, "first")
		f, err := openCertFiles(pair.certFile, pair.keyFile, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		pair.write(t, "second", time.Now().Add(time.Minute))
		time.Sleep(certCheckInterval - 1) //nolint:forbidigo // in a synctest bubble
		if got := nameIn(t, f); got != "first" {
			t.Errorf("within a second: got the certificate of %q, want that of first", got)
		}
		time.Sleep(time.Nanosecond) //nolint:forbidigo // in a synctest bubble
		if got := nameIn(t, f); got != "second" {
			t.Errorf("after a second: got the certificate of %q, want that of second", got)
		}
	})
}

// events returns the event names in a log, separated by spaces.
func events(log string) string {
	var names []string
	for field := range strings.FieldsSeq(log) {
		if name, ok := strings.CutPrefix(field, "event="); ok {
			names = append(names, name)
		}
	}
	return strings.Join(names, " ")
}

func TestACME_TLSConfig(t *testing.T) {
	got := newACME("relay.example.com", t.TempDir(), slog.New(slog.DiscardHandler)).tlsConfig()
	if want := []string{"http/1.1", "acme-tls/1"}; !slices.Equal(got.NextProtos, want) {
		t.Errorf("got protocols %q, want %q", got.NextProtos, want)
	}
	if got.MinVersion != tls.VersionTLS12 {
		t.Errorf("got least version %s, want TLS 1.2", tls.VersionName(got.MinVersion))
	}
}

func TestACME_OtherNamesGetNoCertificateAndNoLine(t *testing.T) {
	var log bytes.Buffer
	a := newACME("relay.example.com", t.TempDir(), newLogger(&log, "text", "debug", "relay-1"))
	for _, name := range []string{"", "example.com", "www.relay.example.com"} {
		if _, err := a.certificate(&tls.ClientHelloInfo{ServerName: name}); err == nil {
			t.Errorf("server name %q: got a certificate", name)
		}
	}
	if log.Len() > 0 {
		t.Errorf("got log %q, want none", &log)
	}
}

func TestACME_TroubleIsLoggedOnceAMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		a := newACME("relay.example.com", t.TempDir(), newLogger(&log, "text", "info", "relay-1"))
		for range 3 {
			for range 10 {
				a.logFailure(http.ErrServerClosed)
			}
			time.Sleep(acmeLogInterval) //nolint:forbidigo // in a synctest bubble
		}
		if got, want := events(log.String()), "acme_failed acme_failed acme_failed"; got != want {
			t.Errorf("got events %q, want %q", got, want)
		}
	})
}

func TestACME_Port80AnswersChallengesOnly(t *testing.T) {
	cache := t.TempDir()
	a := newACME("relay.example.com", cache, slog.New(slog.DiscardHandler))
	// What autocert keeps for another process that answers the challenge.
	writeFile(t, filepath.Join(cache, "token+http-01"), []byte("proof"), time.Now())
	for _, tt := range []struct {
		host, path string
		want       int
	}{
		{"relay.example.com", "/.well-known/acme-challenge/token", 200},
		{"relay.example.com", "/.well-known/acme-challenge/other", 404},
		{"example.com", "/.well-known/acme-challenge/token", 404},
		{"relay.example.com", "/", 404},
		{"relay.example.com", "/healthz", 404},
		{"relay.example.com", "/v1/client", 404},
	} {
		r := httptest.NewRequest("GET", tt.path, nil)
		r.Host = tt.host
		w := httptest.NewRecorder()
		a.challengeHandler().ServeHTTP(w, r)
		if w.Code != tt.want {
			t.Errorf("http://%s%s: got %d %q, want %d", tt.host, tt.path, w.Code, w.Body, tt.want)
		}
	}
}
