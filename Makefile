# `make check` is what CI runs. The tools are pinned in .ci/tools/go.mod, a module file of their own:
# golangci-lint's two hundred dependencies have no business in the relay's go.mod.
TOOL     := go tool -modfile=.ci/tools/go.mod
VERSION  ?= $(shell git describe --tags --always --dirty 2>/dev/null)
FUZZTIME ?= 20s
CHECKS   ?= 100000
LOAD     ?= ../shared/load

.DEFAULT_GOAL := help
.PHONY: build test allocs lint fuzz model bench bench-load e2e check vuln help

build: ## the static release binary, bin/pyrycode-relay
	CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X main.version=$(VERSION)" -o bin/pyrycode-relay ./cmd/pyrycode-relay

# One package after the other: several hold the relay to its time bounds, and would
# take the CPU from each other.
test: ## every test, race detector on, shuffled
	go test -race -shuffle=on -p 1 -timeout 15m ./...

allocs: ## what allocates nothing, without the race detector, which makes pools forget
	go test -run DoesNotAllocate ./bus ./gateway

lint: ## gofmt, golangci-lint (with gosec), tidy go.mod
	@files=$$(gofmt -l bus cmd gateway registry testenv) || exit 1; \
	if [ -n "$$files" ]; then echo "not gofmt-ed:"; echo "$$files"; exit 1; fi
	go mod tidy -diff
	$(TOOL) golangci-lint run ./...

fuzz: ## every fuzz target for FUZZTIME (20s) each
	@set -e; found=0; \
	for pkg in $$(go list ./...); do \
		list=$$(go test -list '^Fuzz' $$pkg) || { echo "$$list"; exit 1; }; \
		for name in $$(echo "$$list" | grep '^Fuzz' || true); do \
			found=1; echo "== $$pkg $$name"; \
			go test -run '^$$' -fuzz "^$$name\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 10x $$pkg; \
		done; \
	done; \
	if [ $$found = 0 ]; then echo "no fuzz target found"; exit 1; fi

model: ## the models of links and of the registry, CHECKS (100000) schedules each
	go test -run 'TestLinkStateModel' -timeout 2h ./bus -rapid.checks=$(CHECKS)
	go test -run 'TestSimulation$$' -timeout 2h ./registry -rapid.checks=$(CHECKS)

bench: ## every benchmark
	go test -run '^$$' -bench . -benchmem ./...

bench-load: ## the relay beside the baselines of $$LOAD (../shared/load): docs/performance.md
	LOAD=$(LOAD) docs/performance/bench-load.sh $(SECTIONS)

e2e: ## the built program, NATS from the shipped files, several nodes: all of cmd/
	go test -race -count=1 -v -timeout 10m ./cmd/...

check: lint test ## what CI runs

vuln: ## known vulnerabilities; needs vuln.go.dev, fails without it
	$(TOOL) govulncheck ./...

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## /{printf "  %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
