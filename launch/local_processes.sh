#!/usr/bin/env bash
# Runs a command in N processes on this machine as one run, on virtual CPU devices: a small pod.
#
#   launch/local_processes.sh [--dry-run] N pemoe train …
#
# DEVICES_PER_PROCESS (default: 1) is the number of devices of each process; COORDINATOR_PORT
# (default: a free port) is the port of process 0, where the processes meet. Each line of output
# starts with the number of its process. If a process fails, the others are ended within
# GRACE_SECONDS (default: 10), and the script exits with the exit code of the failed one.
set -euo pipefail

dry_run=
if [[ ${1-} == --dry-run ]]; then
  dry_run=1
  shift
fi
if [[ ! ${1-} =~ ^[1-9][0-9]*$ || $# -lt 2 ]]; then
  echo "${0##*/}: expected [--dry-run], a number of processes and a command, got: $*" >&2
  exit 2
fi
count=$1
shift

free_port() {
  local port
  while :; do
    # Below 32768, where Linux's ports of outgoing connections begin.
    port=$((20000 + RANDOM % 12000))
    if ! (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
      echo "$port"
      return
    fi
  done
}

port=${COORDINATOR_PORT:-$(free_port)}
devices=--xla_force_host_platform_device_count=${DEVICES_PER_PROCESS:-1}
# The user's XLA flags, without a number of devices.
others=$(sed -E 's/ *--xla_force_host_platform_device_count=[0-9]+//g' <<<"${XLA_FLAGS-}")
settings=(
  "JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}"
  "XLA_FLAGS=${others:+$others }$devices"
  "JAX_COORDINATOR_ADDRESS=127.0.0.1:$port"
  "JAX_NUM_PROCESSES=$count"
)

if [[ $dry_run ]]; then
  for ((i = 0; i < count; i++)); do
    printf '%q ' env "${settings[@]}" "JAX_PROCESS_ID=$i" "$@"
    echo '&'
  done
  exit
fi

pids=()

signal_all() { # sent to process groups, to reach the children of the processes too
  local pid
  for pid in "${pids[@]}"; do
    kill "-$1" -- "-$pid" 2>/dev/null || true
  done
}

end_all() { # sends signal $1, then SIGKILL after GRACE_SECONDS
  signal_all "$1"
  local deadline=$((SECONDS + ${GRACE_SECONDS:-10})) pid
  for pid in "${pids[@]}"; do
    while kill -0 "$pid" 2>/dev/null && ((SECONDS < deadline)); do sleep 0.1; done
  done
  signal_all KILL
}

trap 'end_all INT; exit 130' INT
trap 'end_all TERM; exit 143' TERM

prefix() { # ends at the end of its input, not by a signal: a last error line must get through
  trap '' INT TERM
  exec sed -u "s/^/[$1] /"
}

set -m # job control: each process gets a process group, which signal_all needs
for ((i = 0; i < count; i++)); do
  (
    exec > >(prefix "$i") 2> >(prefix "$i" >&2)
    exec env "${settings[@]}" "JAX_PROCESS_ID=$i" "$@"
  ) </dev/null &
  pids[i]=$!
done
set +m # without messages about jobs; the process groups remain

exec 3>&2 # the loop's stderr is closed: bash reports children that a signal ended
while ((${#pids[@]})); do
  for i in "${!pids[@]}"; do
    kill -0 "${pids[i]}" 2>/dev/null && continue
    code=0
    wait "${pids[i]}" || code=$?
    unset "pids[i]"
    ((code)) || continue
    how="exit code $code"
    ((code <= 128)) || how="SIG$(kill -l $((code - 128)))"
    echo "${0##*/}: process $i of $count ended with $how: ending the others" >&3
    end_all TERM
    exit "$code"
  done
  sleep 0.2
done 2>/dev/null
