#!/usr/bin/env bash
# Train with N processes on this machine: one a GPU, or N on its CPU.
#
#   examples/launch/one_node.sh 8 steering --out runs/steering
#   LAUNCHER=accelerate examples/launch/one_node.sh 8 steering --out runs/steering
#
# RESTARTS=3 starts all of them again, up to three times, when one ends with an error; the run then
# goes on from its last checkpoint. The command is the same at first and later.
set -euo pipefail

processes=${1:?"give the number of processes, then what meal_fast.train is given"}
shift
python=${PYTHON:-python}
train=(-m meal_fast.train "$@" --resume-or-start)

# What a stop may take (SIGTERM, Ctrl-C): the rest of a meta-step, which is given up where it would
# not end in two thirds of this, and a checkpoint. torchrun would kill after 30 seconds.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${GRACE:-600}

case ${LAUNCHER:-torchrun} in
torchrun)
    exec "$python" -m torch.distributed.run --standalone --nproc-per-node "$processes" \
        --max-restarts "${RESTARTS:-0}" "${train[@]}"
    ;;
accelerate)
    # --multi_gpu is what starts several processes, and needs no GPU; with --cpu there is one.
    exec "$python" -m accelerate.commands.launch --multi_gpu --num_processes "$processes" \
        --num_machines 1 --main_process_port 0 --max_restarts "${RESTARTS:-0}" \
        --mixed_precision no --dynamo_backend no "${train[@]}"
    ;;
*)
    echo "LAUNCHER=$LAUNCHER: torchrun or accelerate" >&2
    exit 2
    ;;
esac
