#!/usr/bin/env bash
# One run on one node of a Slurm cluster, requeued when it is preempted or out of time.
#
#   sbatch launch/slurm.sh configs/cifar10.py runs/cifar10 --config.num_clients=1000
#
# Slurm sends SIGTERM two minutes before the end; the run saves, exits with status 143, and the job is
# put back into the queue, where the same command resumes. Adapt the #SBATCH lines to your cluster.
#SBATCH --job-name=mocosfl
#SBATCH --nodes=1
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

config=${1:?usage: launch/slurm.sh CONFIG WORKDIR [--config.field=value ...]}
workdir=${2:?usage: launch/slurm.sh CONFIG WORKDIR [--config.field=value ...]}
shift 2

python -m mocosfl_jax.main --config "$config" --workdir "$workdir" "$@" &
run=$!
trap 'kill -TERM "$run"' TERM

status=0
wait "$run" || status=$?
if kill -0 "$run" 2>/dev/null; then # the trap ended the first wait; the run is still saving
  status=0
  wait "$run" || status=$?
fi
if [ "$status" -eq 143 ] && [ -n "${SLURM_JOB_ID:-}" ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
