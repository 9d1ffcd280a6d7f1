#!/usr/bin/env bash
# One run on the nodes of a Slurm cluster, one process a node, requeued until it is done.
#
#   sbatch --nodes=4 launch/slurm.sh configs/cifar10.py runs/cifar10 --config.num_clients=1000
#
# WORKDIR and the data must lie where every node sees them. Adapt the #SBATCH lines to your cluster,
# or override them as --nodes above. Two minutes before the time is over Slurm sends SIGTERM to the
# processes (not to this script); they save and exit with status 143, and the job goes back into the
# queue, where the same command resumes. A job that is preempted, or loses a node, is requeued by
# Slurm itself. A job that is cancelled stays so.
#SBATCH --job-name=mocosfl
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

usage="usage: sbatch launch/slurm.sh CONFIG WORKDIR [--config.field=value ...]"
config=${1:?$usage}
workdir=${2:?$usage}
shift 2

multihost=()
if [ "${SLURM_JOB_NUM_NODES:-1}" -gt 1 ]; then
  multihost=(--multihost)
fi

# Once one process has exited, the others have 100 s to save; one that waits for a process that
# failed is ended then. (--kill-on-bad-exit would end them in the middle of saving.)
status=0
srun --kill-on-bad-exit=0 --wait=100 \
  python -m mocosfl_jax.main --config "$config" --workdir "$workdir" "${multihost[@]}" "$@" ||
  status=$?
if [ "$status" -eq 143 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
