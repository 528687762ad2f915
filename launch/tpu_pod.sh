#!/usr/bin/env bash
# Runs a command on all hosts of a Cloud TPU: creates the TPU if needed, copies the clone, installs,
# runs the command on every worker and shows their output.
#
#   TPU_NAME=mov TPU_TYPE=v4-64 ZONE=us-central2-b \
#     launch/tpu_pod.sh [--dry-run] [--spot] [--delete] \
#       pemoe train … --gin.MODEL_DIR=/mnt/share/mov
#
# --spot: uses a preemptible TPU; after a preemption it is created again, and the same command
# resumes from its newest checkpoint. --delete: deletes the TPU at the end, also after a failure.
# RUNTIME (default: tpu-ubuntu2204-base): the image; v5e and v6e need others. SETUP: a command that
# each worker runs first, e.g. to mount a shared folder. Variables that start with PEMOE_ are passed
# on to the workers. The project and account are those of `gcloud config`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

dry_run='' spot='' delete=''
while [[ ${1-} == --* ]]; do
  case $1 in
    --dry-run) dry_run=1 ;;
    --spot) spot=1 ;;
    --delete) delete=1 ;;
    *)
      echo "tpu_pod.sh: expected --dry-run, --spot or --delete, got $1" >&2
      exit 2
      ;;
  esac
  shift
done
for name in TPU_NAME TPU_TYPE ZONE; do
  if [[ -z ${!name-} ]]; then
    echo "tpu_pod.sh: $name is not set: expected TPU_NAME, TPU_TYPE and ZONE" >&2
    exit 2
  fi
done
if (($# == 0)); then
  echo "tpu_pod.sh: expected a command, e.g. pemoe train …" >&2
  exit 2
fi

gcloud=(gcloud compute tpus tpu-vm)
where=("$TPU_NAME" "--zone=$ZONE")

run() { # prints a command, and runs it unless --dry-run is set
  if [[ $dry_run ]]; then
    printf '%q ' "$@" && echo
  else
    { printf '+ ' && printf '%q ' "$@" && echo; } >&2
    "$@"
  fi
}

on_all() { run "${gcloud[@]}" ssh "${where[@]}" --worker=all "--command=$1"; }

state() { # prints READY, PREEMPTED, …; nothing if the TPU does not exist
  [[ ! $dry_run ]] || return 0
  "${gcloud[@]}" describe "${where[@]}" '--format=value(state)' 2>/dev/null || true
}

remove() { run "${gcloud[@]}" delete "${where[@]}" --quiet; }

create() {
  run "${gcloud[@]}" create "${where[@]}" "--accelerator-type=$TPU_TYPE" \
    "--version=${RUNTIME:-tpu-ubuntu2204-base}" ${spot:+--spot}
}

ensure_tpu() { # creates the TPU unless it is ready
  case $(state) in
    READY) ;;
    '') create ;;
    *) remove && create ;;
  esac
}

archive=${TMPDIR:-/tmp}/$TPU_NAME.pemoe_jax.tar.gz
# shellcheck disable=SC2016
pack='git ls-files -z --cached --others --exclude-standard | tar -czf "$1" --null --files-from=-'
# uv installs its own Python: that of the image may be older than 3.11.
install='mkdir -p pemoe_jax && tar -xzf pemoe_jax.tar.gz -C pemoe_jax && cd pemoe_jax'
install+=' && python3 -m pip install --quiet --user uv'
install+=' && python3 -m uv venv --quiet --allow-existing --python 3.11 .venv'
install+=' && python3 -m uv pip install --quiet --python .venv -c constraints.txt -e ".[tpu]"'

copy() { # the working tree without files that git ignores
  run bash -o pipefail -c "$pack" pack "$archive" &&
    run "${gcloud[@]}" scp "$archive" "$TPU_NAME:pemoe_jax.tar.gz" "--zone=$ZONE" --worker=all &&
    on_all "$install" &&
    { [[ -z ${SETUP-} ]] || on_all "$SETUP"; }
}

settings='PEMOE_DISTRIBUTED=1'
for name in "${!PEMOE_@}"; do
  [[ $name == PEMOE_DISTRIBUTED ]] || settings+=" $name=$(printf '%q' "${!name}")"
done
# $PWD and $PATH are expanded on the worker.
# shellcheck disable=SC2016
command='cd pemoe_jax && env "PATH=$PWD/.venv/bin:$PATH"'" $settings$(printf ' %q' "$@")"

# A training that is preempted saves and ends with exit code 0 too: it has finished only if the TPU
# is still there.
finish() { on_all "$command" && [[ ! $spot || $dry_run || $(state) == READY ]]; }

[[ ! $delete ]] || trap remove EXIT

ensure_tpu && copy && finish && exit
code=$?
while [[ $spot && $(state) != READY ]]; do
  echo "tpu_pod.sh: $TPU_NAME was preempted: creating it again" >&2
  until ensure_tpu; do sleep 60; done # there may be no capacity for a while
  copy && finish && exit
  code=$?
done
exit "$code"
