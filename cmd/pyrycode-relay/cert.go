package main

import (
	"crypto/tls"
	"errors"
	"log/slog"
	"net/http"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/acme"
	"golang.org/x/crypto/acme/autocert"
)

const (
	certCheckInterval = time.Second // between two looks at the certificate files
	acmeLogInterval   = time.Minute // between two lines about the same trouble; also autocert's retry interval
)

// getCertificate has the type of tls.Config.GetCertificate.
type getCertificate func(*tls.ClientHelloInfo) (*tls.Certificate, error)

// newTLSConfig leaves out HTTP/2, over which no client opens a WebSocket.
func newTLSConfig(certificate getCertificate) *tls.Config {
	return &tls.Config{
		MinVersion:     tls.VersionTLS12,
		NextProtos:     []string{"http/1.1"},
		GetCertificate: certificate,
	}
}

// certFiles is a certificate read from files, and again when they change. It is
// safe for concurrent use.
type certFiles struct {
	// Set by openCertFiles, then read-only.
	certFile, keyFile string
	log               *slog.Logger

	pair atomic.Pointer[tls.Certificate] // the last one that was good

	// Guarded by checking. It is only ever tried: one handshake looks at the
	// files, the others go on with the pair there is.
	checking sync.Mutex
	next     time.Time // no look before
	seen     [2]fileStamp
}

// fileStamp tells two states of a file apart; zero if there is no such file.
type fileStamp struct {
	modified int64 // Unix nanoseconds
	size     int64
}

// openCertFiles reads a certificate chain and its key.
func openCertFiles(certFile, keyFile string, log *slog.Logger) (*certFiles, error) {
	f := &certFiles{certFile: certFile, keyFile: keyFile, log: log}
	f.seen = f.stamps()
	f.next = time.Now().Add(certCheckInterval)
	return f, f.load()
}

// certificate returns the pair in the files, or the one before if they are
// broken.
func (f *certFiles) certificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	if f.checking.TryLock() {
		defer f.checking.Unlock()
		f.check()
	}
	return f.pair.Load(), nil
}

// check loads files that changed. One change is tried and logged once: a pair
// caught between the writing of its halves changes again.
func (f *certFiles) check() {
	now := time.Now()
	if now.Before(f.next) {
		return
	}
	f.next = now.Add(certCheckInterval)
	stamps := f.stamps()
	if stamps == f.seen {
		return
	}
	f.seen = stamps
	if err := f.load(); err != nil {
		f.log.Warn("tls_reload_failed", "error", err)
		return
	}
	f.log.Info("tls_reloaded")
}

func (f *certFiles) load() error {
	pair, err := tls.LoadX509KeyPair(f.certFile, f.keyFile)
	if err != nil {
		return err
	}
	f.pair.Store(&pair)
	return nil
}

func (f *certFiles) stamps() (stamps [2]fileStamp) {
	for i, name := range []string{f.certFile, f.keyFile} {
		if info, err := os.Stat(name); err == nil {
			stamps[i] = fileStamp{info.ModTime().UnixNano(), info.Size()}
		}
	}
	return stamps
}

// acmeCerts gets the certificate of one domain from Let's Encrypt.
type acmeCerts struct {
	domain  string
	manager *autocert.Manager
	log     *slog.Logger

	lastLog atomic.Int64 // Unix seconds
}

func newACME(domain, cacheDir string, log *slog.Logger) *acmeCerts {
	return &acmeCerts{
		domain: domain,
		log:    log,
		manager: &autocert.Manager{
			Prompt:     autocert.AcceptTOS,
			Cache:      autocert.DirCache(cacheDir),
			HostPolicy: autocert.HostWhitelist(domain),
		},
	}
}

func (a *acmeCerts) tlsConfig() *tls.Config {
	config := newTLSConfig(a.certificate)
	config.NextProtos = append(config.NextProtos, acme.ALPNProto)
	return config
}

var errOtherName = errors.New("server name is not the domain")

// certificate is the only place where an operator can learn why there is no
// certificate; strangers who ask for other names are not worth a line.
func (a *acmeCerts) certificate(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	if !isHost(hello.ServerName, a.domain) {
		return nil, errOtherName
	}
	pair, err := a.manager.GetCertificate(hello)
	if err != nil && !isChallenge(hello) {
		a.logFailure(err)
	}
	return pair, err
}

func (a *acmeCerts) logFailure(err error) {
	now, last := time.Now().Unix(), a.lastLog.Load()
	if now-last >= int64(acmeLogInterval/time.Second) && a.lastLog.CompareAndSwap(last, now) {
		a.log.Warn("acme_failed", "domain", a.domain, "error", err)
	}
}

// isChallenge reports whether the peer is a certificate authority at work.
func isChallenge(hello *tls.ClientHelloInfo) bool {
	return slices.Equal(hello.SupportedProtos, []string{acme.ALPNProto})
}

// challengeHandler answers ACME challenges for the domain, and nothing else.
func (a *acmeCerts) challengeHandler() http.Handler {
	notFound := http.HandlerFunc(http.NotFound)
	return onlyHost(a.domain, http.StatusNotFound, a.manager.HTTPHandler(notFound))
}
