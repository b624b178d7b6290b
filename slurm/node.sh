#!/usr/bin/env bash
# One task of a job: on each node the launcher of its ranks, or one rank (LONGHAUL_LAUNCH=srun). slurm/job.sh starts it:
#   bash slurm/node.sh PYTHON [TRAINER OPTION…]
set -euo pipefail
trap '' USR1 USR2 # until the trainer listens: a request to save must not kill what has nothing to save yet

python=$1
shift
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if [ "$SLURM_STEP_NUM_NODES" -gt 1 ] && [ -z "${GLOO_SOCKET_IFNAME:-}" ]; then
    # only where the node's own name would mislead gloo, and of NCCL's variables none
    interface=$("$python" "$project/slurm/rendezvous.py" "$LONGHAUL_HEAD")
    if [ -n "$interface" ]; then export GLOO_SOCKET_IFNAME=$interface; fi
fi

if [ "$LONGHAUL_LAUNCH" = srun ]; then
    export MASTER_ADDR=$LONGHAUL_HEAD MASTER_PORT=$LONGHAUL_PORT
    exec "$python" "$project/train/pretrain.py" "$@"
fi

gpus=${SLURM_GPUS_ON_NODE:-${SLURM_GPUS_PER_NODE:-0}}
gpus=${gpus##*:} # a type may stand before the number
ranks=${LONGHAUL_RANKS_PER_NODE:-$((gpus > 0 ? gpus : 1))}
if [ "$SLURM_STEP_NUM_NODES" = 1 ]; then
    meeting=(--standalone --local-addr=127.0.0.1)
else
    meeting=(--nnodes="$SLURM_STEP_NUM_NODES" --node_rank="$SLURM_NODEID" --rdzv_id="$LONGHAUL_MEETING_ID"
        --master_addr="$LONGHAUL_HEAD" --master_port="$LONGHAUL_PORT")
fi
exec "$python" "$project/train/launch.py" "${meeting[@]}" --nproc_per_node="$ranks" --max-restarts=0 \
    "$project/train/pretrain.py" "$@"
