#!/bin/bash
# Trains on slices of Cloud TPUs by queued resources. In the repository's root:
#
#   export NAME=dense-7b ZONE=us-east5-a TYPE=v5p-128 RUNTIME=v2-alpha-tpuv5 SLICES=2
#   launch/tpu/queue.sh create          # ask for the slices; add --spot or --reserved as you need
#   launch/tpu/queue.sh wait            # until they are there
#   launch/tpu/queue.sh install         # copy this checkout to all hosts, and install it
#   launch/tpu/queue.sh train --config=configs/dense_7b.py --workdir=gs://BUCKET/dense_7b \
#     --config.mesh.data=2
#   launch/tpu/queue.sh log             # the last lines of each host
#   launch/tpu/queue.sh stop            # SIGTERM: all hosts save, and end
#   launch/tpu/queue.sh delete          # give the slices back
#
# `train` starts launch/tpu/host.sh on every host, as a unit of systemd: it goes on when this shell
# ends, and starts again what a restart can help. The same command resumes a run.
set -euo pipefail

usage() {
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "$0" >&2
  exit 2
}

for variable in NAME ZONE; do
  [ -n "${!variable-}" ] || { echo "error: $variable is not set: export it" >&2; exit 2; }
done
[ $# -gt 0 ] || usage
action=$1
shift

queued_resources() { gcloud compute tpus queued-resources "$1" "$NAME" "--zone=$ZONE" "${@:2}"; }

on_all_hosts() { queued_resources ssh --node=all --worker=all "--command=$1"; }

case $action in
  create)
    for variable in TYPE RUNTIME; do
      [ -n "${!variable-}" ] || { echo "error: $variable is not set: export it" >&2; exit 2; }
    done
    if [ "${SLICES-1}" -gt 1 ]; then
      nodes=("--node-count=$SLICES" "--node-prefix=$NAME")
    else
      nodes=("--node-id=$NAME")
    fi
    queued_resources create "--accelerator-type=$TYPE" "--runtime-version=$RUNTIME" \
      "${nodes[@]}" "$@"
    ;;
  wait)
    while state=$(queued_resources describe '--format=value(state.state)'); do
      echo "$(date +%T) $NAME is $state"
      case $state in
        ACTIVE) exit 0 ;;
        FAILED | SUSPENDED | SUSPENDING | DELETING) exit 1 ;; # delete it, and create it again
      esac
      sleep "${POLL_S-30}"
    done
    exit 1
    ;;
  install)
    archive=$(mktemp)
    trap 'rm -f "$archive"' EXIT
    git archive --format=tar.gz --output="$archive" HEAD
    gcloud compute tpus queued-resources scp "$archive" "$NAME:moe.tar.gz" "--zone=$ZONE" \
      --node=all --worker=all
    # The images of TPU VMs may have a Python older than 3.11, so uv brings one.
    on_all_hosts "rm -rf moe && mkdir moe && tar -xzf moe.tar.gz -C moe && cd moe &&
      python3 -m pip install --quiet --user uv && uv=\$HOME/.local/bin/uv &&
      \$uv venv --quiet --python=3.11 .venv && \$uv pip install --quiet --python=.venv/bin/python \
      --requirement=requirements.txt --constraint=launch/kubernetes/constraints.txt \
      'jax[tpu]' gcsfs"
    ;;
  train)
    # %q quotes each word for the shell of the host.
    words=$(printf '%q ' "$@")
    on_all_hosts "cd moe && sudo systemctl reset-failed moe-train 2>/dev/null;
      sudo systemd-run --unit=moe-train --uid=\$(id -u) --setenv=HOME=\$HOME \
      --working-directory=\$PWD --property=KillMode=mixed --property=TimeoutStopSec=600 \
      --property=LimitMEMLOCK=infinity bash launch/tpu/host.sh .venv/bin/python -m \
      launch.train $words"
    ;;
  log) on_all_hosts "journalctl --unit=moe-train --lines=${LINES-20} --no-pager --output=cat" ;;
  stop) on_all_hosts "sudo systemctl stop moe-train" ;;
  delete) queued_resources delete --force --quiet ;;
  *) usage ;;
esac
