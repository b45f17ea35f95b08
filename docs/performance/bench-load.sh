#!/usr/bin/env bash
# Measures the relay beside the baselines of a load generator (docs/performance.md), and prints
# the tables in Markdown. Needs Linux, two cores that nothing else uses, 20,000 file descriptors,
# curl, and the load generator's source in $LOAD.
#
#   LOAD=../shared/load ROUNDS=3 docs/performance/bench-load.sh [one] [two] [idle] [storm] [redial] [profile]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
sections=("$@")
((${#sections[@]})) || sections=(one two idle storm redial)

rounds=${ROUNDS:-3} secs=${SECS:-4}
out=${OUT:-$(mktemp -d)} # programs, logs and profiles
pids=()
trap 'stop' EXIT
ulimit -n "$(ulimit -Hn)"

stop() {
  for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
  for pid in "${pids[@]}"; do wait "$pid" 2>/dev/null || true; done
  pids=()
}

# start NAME PROGRAM ARGS…: on the core of the relays. Sets $pid.
start() {
  local name=$1
  shift
  PROFILE_LISTEN=${PROFILE_LISTEN:-} taskset -c 1 "$@" >"$out/$name.log" 2>&1 &
  pid=$!
  pids+=("$pid")
}

await() { # URL
  for _ in $(seq 100); do
    curl -fs -o "$out/answer" "$1" && return
    sleep 0.1
  done
  echo "no answer from $1; see $out" >&2
  exit 1
}

relay() { # NAME PORT ARGS…
  local name=$1 port=$2
  shift 2
  start "$name" "$out/pyrycode-relay" serve --insecure-listen "127.0.0.1:$port" --metrics-listen "127.0.0.1:$((port + 1000))" \
    --upgrade-burst 0 --log-level warn --gateway-id "$name" "$@"
  await "http://127.0.0.1:$port/readyz"
}

pipe_baseline() {
  start pipe "$out/load" baseline pipe -listen 127.0.0.1:17101
  pipe=pipe=ws://127.0.0.1:17101,ws://127.0.0.1:17101,$pid
}

one_relay() {
  relay one 17102
  one=relay=ws://127.0.0.1:17102,ws://127.0.0.1:17102,$pid
}

nats_baseline() {
  start nats-0 "$out/nats-server" -a 127.0.0.1 -p 17201
  local server=$pid
  sleep 0.5
  start half-a "$out/load" baseline nats -nats nats://127.0.0.1:17201 -id a -peer b -listen 127.0.0.1:17103
  local a=$pid
  start half-b "$out/load" baseline nats -nats nats://127.0.0.1:17201 -id b -peer a -listen 127.0.0.1:17104
  sleep 0.5
  nats=nats=ws://127.0.0.1:17104,ws://127.0.0.1:17103,$server+$a+$pid
}

two_relays() { # ARGS…
  start nats-1 "$out/nats-server" -a 127.0.0.1 -p 17202 -js -sd "$out/jetstream"
  local server=$pid
  sleep 0.5
  relay a 17105 --nats-url nats://127.0.0.1:17202 "$@"
  relay_a=$pid
  relay b 17106 --nats-url nats://127.0.0.1:17202 "$@"
  relay_b=$pid
  two=relay=ws://127.0.0.1:17106,ws://127.0.0.1:17105,$server+$relay_a+$relay_b
}

# against BASELINE TARGET COLUMNS COMMAND…
against() {
  local base=$1 mine=$2 show=$3
  shift 3
  echo
  taskset -c "${LOAD_CORE:-0}" "$out/load" compare -rounds "$rounds" -quiet 60 -md -show "$show" -target "$base" -target "$mine" -- "$@"
}

frames() { # BASELINE TARGET: the rows about frames
  local show=relay_us_per_frame,frames_per_s,load_cpu_pct,gaps,errors
  against "$1" "$2" "$show" flood -pairs 50 -size 300 -window 8 -dir both -for "${secs}s"
  against "$1" "$2" "$show" flood -pairs 50 -size 8192 -window 8 -dir both -for "${secs}s"
  against "$1" "$2" "$show" flood -pairs 50 -size 300 -window 1 -dir both -for "${secs}s"
  LOAD_CORE=1 against "$1" "$2" p50_us,p99_us,lost,errors rtt -pairs 1 -rate 1000 -size 300 -for "${secs}s"
}

# held PORT: how many binaries a relay holds.
held() {
  curl -s "http://127.0.0.1:$1/healthz" | sed 's/.*"connected_binaries":\([0-9]*\).*/\1/'
}

# profile NAME BINARY-PORT PHONE-PORT PPROF-PORT: of the relay at PPROF-PORT, under the flood of 300 B.
profile() {
  taskset -c 0 "$out/load" flood -binary "ws://127.0.0.1:$2" -phone "ws://127.0.0.1:$3" -pairs 50 -size 300 -window 8 -dir both -for 12s >"$out/$1.flood.log" &
  local load=$!
  sleep 2
  curl -s "http://127.0.0.1:$4/debug/pprof/profile?seconds=8" >"$out/$1.cpu.pprof"
  curl -s "http://127.0.0.1:$4/debug/pprof/heap" >"$out/$1.heap.pprof"
  wait "$load"
}

# counters PORTS: heap objects allocated and frames forwarded so far, by all of these relays.
counters() {
  local total_mallocs=0 total_frames=0 port
  for port in "$@"; do
    curl -s "http://127.0.0.1:$((port + 1000))/metrics" >"$out/metrics"
    total_mallocs=$(awk -v t="$total_mallocs" '/^go_memstats_mallocs_total/ {t += $2} END {printf "%.0f", t}' "$out/metrics")
    total_frames=$(awk -v t="$total_frames" '/^pyrycode_relay_frames_forwarded_total/ {t += $2} END {printf "%.0f", t}' "$out/metrics")
  done
  echo "$total_mallocs $total_frames"
}

# allocations BINARY-PORT PHONE-PORT
allocations() {
  local ports=("$1") before after
  [[ $1 == "$2" ]] || ports+=("$2")
  before=$(counters "${ports[@]}")
  taskset -c 0 "$out/load" flood -binary "ws://127.0.0.1:$1" -phone "ws://127.0.0.1:$2" -pairs 50 -size 300 -window 8 -dir both -for "${secs}s" >"$out/flood.log"
  after=$(counters "${ports[@]}")
  echo "$before $after" | awk '{printf "\nallocations a routed frame: %.3f (%.0f in %.0f frames)\n", ($3-$1)/($4-$2), $3-$1, $4-$2}'
}

go build -trimpath -tags profile -o "$out/pyrycode-relay" ./cmd/pyrycode-relay
go build -trimpath -o "$out/nats-server" github.com/nats-io/nats-server/v2
(cd "${LOAD:-../shared/load}" && GOFLAGS=-mod=mod go build -o "$out/load" .)
echo "commit $(git describe --always --dirty), $(go version | cut -d' ' -f3), $(nproc) cores, $(date -u +%F)"

for section in "${sections[@]}"; do
  echo
  echo "## $section"
  case $section in
    one)
      pipe_baseline
      one_relay
      frames "$pipe" "$one"
      allocations 17102 17102
      ;;
    two)
      nats_baseline
      two_relays
      frames "$nats" "$two"
      allocations 17106 17105
      ;;
    idle)
      pipe_baseline
      taskset -c 0 "$out/load" idle -binary ws://127.0.0.1:17101 -phone ws://127.0.0.1:17101 -binaries 5000 -phones-per 1 -for 5s -pids "$pid"
      stop
      one_relay
      taskset -c 0 "$out/load" idle -binary ws://127.0.0.1:17102 -phone ws://127.0.0.1:17102 -binaries 5000 -phones-per 1 \
        -for "${IDLE:-65}s" -pids "$pid" -metrics http://127.0.0.1:18102/metrics
      ;;
    storm)
      pipe_baseline
      one_relay
      against "$pipe" "$one" in_p50_ms,in_all_ms,relay_cpu_us_per_claim,binaries_in,phone_4404_lies,binary_4409,binary_503 storm -n 2000
      ;;
    redial) # 9,900 connections are lost with b, and redial a, which has 9,900 of its own
      two_relays --max-connections 19900
      taskset -c 0 "$out/load" storm -binary ws://127.0.0.1:17106,ws://127.0.0.1:17105 -phone ws://127.0.0.1:17106 -n 19800 -sample 0 \
        -limit 120s -settle 40s >"$out/redial.log" &
      storm=$!
      for _ in $(seq 120); do [[ $(($(held 17105) + $(held 17106))) -ge 19800 ]] && break; sleep 0.5; done
      taskset -c 0 "$out/load" rtt -binary ws://127.0.0.1:17105 -phone ws://127.0.0.1:17105 -pairs 20 -rate 20 -for 20s >"$out/others.log" &
      others=$!
      sleep 3
      [[ -z ${PROFILE_LISTEN:-} ]] || curl -s "http://$PROFILE_LISTEN/debug/pprof/profile?seconds=12" >"$out/redial.cpu.pprof" &
      start=$(date +%s.%N)
      kill -9 "$relay_b"
      until [[ $(held 17105) -ge 19820 ]]; do
        sleep 0.1
        awk -v s="$start" -v n="$(date +%s.%N)" 'BEGIN {exit n - s > 60}' || break
      done
      awk -v s="$start" -v n="$(date +%s.%N)" 'BEGIN {printf "all back after %.1f s\n", n - s}'
      echo "the others meanwhile:"
      wait "$others"
      cat "$out/others.log"
      wait "$storm" || true
      cat "$out/redial.log"
      ;;
    profile) # CPU and heap of one node and of two, under the flood of 300 B
      PROFILE_LISTEN=127.0.0.1:17901
      one_relay
      profile one 17102 17102 17901
      stop
      PROFILE_LISTEN=127.0.0.1:17902
      two_relays
      profile two 17106 17105 17902
      ;;
    *)
      echo "no section $section: one, two, idle, storm, redial or profile" >&2
      exit 2
      ;;
  esac
  stop
done
echo
echo "programs, logs and profiles: $out"
