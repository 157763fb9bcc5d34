#!/usr/bin/env bash
# Train on several machines: run the same line on each of them, within a quarter of an hour.
#
#   HEAD=10.0.0.1:29500 examples/launch/two_nodes.sh 8 steering --out /shared/runs/steering
#
# HEAD is one of the machines and a free port of it. --out is on a file system that all of them see.
# NODES=2 counts the machines, LOCAL_ADDR is this machine's address where its name leads to none,
# RUN_ID tells apart runs that share a HEAD, RESTARTS=3 restarts when a process or a machine fails.
set -euo pipefail

processes=${1:?"give the number of processes a machine, then what meal_fast.train is given"}
shift
: "${HEAD:?"give HOST:PORT, the same on every machine"}"
here=()
if [ -n "${LOCAL_ADDR:-}" ]; then
    here=(--local-addr "$LOCAL_ADDR")
fi
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${GRACE:-600}

exec "${PYTHON:-python}" -m torch.distributed.run --nnodes "${NODES:-2}" \
    --nproc-per-node "$processes" --rdzv-backend c10d --rdzv-endpoint "$HEAD" \
    --rdzv-id "${RUN_ID:-meal-fast}" --rdzv-conf join_timeout=900 \
    --max-restarts "${RESTARTS:-0}" "${here[@]}" \
    -m meal_fast.train "$@" --resume-or-start
