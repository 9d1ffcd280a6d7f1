#!/usr/bin/env bash
# One run on all hosts of a Cloud TPU slice.
#
#   TPU=my-tpu ZONE=us-central2-b launch/tpu_vm.sh \
#       --config configs/cifar10.py --workdir /mnt/shared/runs/cifar10 --config.num_clients=1000
#
# The TPU VM exists and `gcloud` may reach it. This folder's committed state is copied to every host
# and installed there with the extra `tpu`; then every host runs mocosfl_jax.main with the arguments
# given and --multihost. --workdir and the data must lie on a file system that all hosts mount.
# Ctrl-C ends the connection, not the run; this lets the run save and end:
#
#   gcloud compute tpus tpu-vm ssh my-tpu --zone=us-central2-b --worker=all \
#       --command='pkill -TERM -f mocosfl_jax.main'
#
# When a preempted slice has been made anew, the same command resumes.
set -euo pipefail

: "${TPU:?the name of the TPU VM is needed, see the top of launch/tpu_vm.sh}"
: "${ZONE:?the zone of the TPU VM is needed, see the top of launch/tpu_vm.sh}"
: "${1:?arguments of mocosfl_jax.main are needed, see the top of launch/tpu_vm.sh}"
cd "$(dirname "$0")/.."

archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
git archive --format=tar.gz --output="$archive" HEAD

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"
}

gcloud compute tpus tpu-vm scp "$archive" "$TPU:mocosfl_jax.tar.gz" --zone="$ZONE" --worker=all
on_all_hosts 'set -eu
  rm -rf mocosfl_jax && mkdir mocosfl_jax && tar -xzf mocosfl_jax.tar.gz -C mocosfl_jax
  cd mocosfl_jax && python3 -m venv ~/mocosfl_venv && ~/mocosfl_venv/bin/pip install -q ".[tpu]"'
printf -v arguments ' %q' "$@"
on_all_hosts "cd mocosfl_jax && exec ~/mocosfl_venv/bin/python -m mocosfl_jax.main --multihost$arguments"
