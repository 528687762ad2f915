#!/usr/bin/env bash
# A run on one machine with GPUs: installs once into .venv, then one process uses all of them.
#
#   launch/gpu_node.sh [--dry-run] python -m pemoe_jax.train …
#
# CUDA_VISIBLE_DEVICES chooses among them. PYTHON (python3): what .venv is made with.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

run() { "$@"; }
if [[ ${1-} == --dry-run ]]; then
  run() { printf '%q ' "$@" && echo; }
  shift
fi
if (($# == 0)); then
  echo "gpu_node.sh: expected a command, e.g. python -m pemoe_jax.train …" >&2
  exit 2
fi

if [[ ! -f .venv/.installed-gpu ]]; then
  run "${PYTHON:-python3}" -m venv .venv
  run .venv/bin/python -m pip install --quiet -c constraints.txt -e '.[gpu]'
  run touch .venv/.installed-gpu
fi
run nvidia-smi -L
# one process sees all GPUs and shares the batch out itself: no coordinator
run env -u JAX_COORDINATOR_ADDRESS "PATH=$PWD/.venv/bin:$PATH" "$@"
