#!/usr/bin/env bash
# Runs a command on one machine with GPUs: installs into .venv once, then starts one process that
# uses all GPUs.
#
#   launch/gpu_node.sh [--dry-run] pemoe train …
#
# CUDA_VISIBLE_DEVICES selects GPUs. PYTHON (default: python3) is the interpreter of .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

run() { "$@"; }
if [[ ${1-} == --dry-run ]]; then
  run() { printf '%q ' "$@" && echo; }
  shift
fi
if (($# == 0)); then
  echo "gpu_node.sh: expected a command, e.g. pemoe train …" >&2
  exit 2
fi

if [[ ! -f .venv/.installed-gpu ]]; then
  run "${PYTHON:-python3}" -m venv .venv
  run .venv/bin/python -m pip install --quiet -c constraints.txt -e '.[gpu]'
  run touch .venv/.installed-gpu
fi
run nvidia-smi -L
# One process shards the batch over all GPUs and needs no coordinator.
run env -u JAX_COORDINATOR_ADDRESS "PATH=$PWD/.venv/bin:$PATH" "$@"
