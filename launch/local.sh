#!/usr/bin/env bash
# One run as several processes of this machine, which talk over the loopback interface.
#
#   launch/local.sh 2 --config configs/quickstart.py --workdir runs/two
#
# The first argument is the number of processes; the others are those of mocosfl_jax.main. With GPUs
# (CUDA_VISIBLE_DEVICES, or all) process i of N uses every N-th one from the i-th on. PORT chooses the
# coordinator's port, PYTHON the interpreter. SIGTERM and Ctrl-C reach every process; if one fails,
# the others are asked to stop. The exit status is the worst of all: 0 done, 143 stopped and saved,
# else what the first one that failed said.
set -euo pipefail

usage="usage: launch/local.sh PROCESSES --config FILE --workdir DIR [--config.field=value ...]"
if (($# == 0)); then
  echo "$usage" >&2
  exit 2
fi
processes=$1
shift
if ! [[ $processes =~ ^[1-9][0-9]*$ ]]; then
  echo "launch/local.sh: PROCESSES = '$processes': a number of at least 1 is needed" >&2
  exit 2
fi
python=${PYTHON:-python}
coordinator=127.0.0.1:${PORT:-$((20000 + RANDOM % 10000))}

gpus=()
if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
  IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
elif command -v nvidia-smi >/dev/null; then
  mapfile -t gpus < <(nvidia-smi --query-gpu=index --format=csv,noheader)
fi

# The GPUs of process $1, separated by commas.
share() {
  local index chosen=()
  for ((index = $1; index < ${#gpus[@]}; index += processes)); do
    chosen+=("${gpus[index]}")
  done
  local IFS=,
  echo "${chosen[*]-}"
}

pids=()
asked=0 # whether the processes were asked to stop; asked again they would not save
stop() {
  asked=1
  kill -TERM "${pids[@]}" 2>/dev/null || true
}
trap stop TERM INT HUP

# Job control gives each process a group of its own, so that Ctrl-C reaches it once, by the trap.
set -m
for ((id = 0; id < processes && !asked; id++)); do
  (
    if ((${#gpus[@]})); then
      CUDA_VISIBLE_DEVICES=$(share "$id")
      export CUDA_VISIBLE_DEVICES
    fi
    exec "$python" -m mocosfl_jax.main "$@" \
      --coordinator "$coordinator" --num_processes "$processes" --process_id "$id" </dev/null
  ) &
  pids+=($!)
done
set +m

worst=0
while ((${#pids[@]})); do
  for index in "${!pids[@]}"; do
    if kill -0 "${pids[index]}" 2>/dev/null; then
      continue
    fi
    status=0
    wait "${pids[index]}" || status=$?
    unset "pids[index]"
    if ((status)); then
      ((asked)) || stop
      if ((worst == 0 || worst == 143)); then
        worst=$status
      fi
    fi
  done
  sleep 0.2 &
  wait $! || true # unlike a command in the foreground, it lets the trap of SIGINT run at once
done
exit "$worst"
