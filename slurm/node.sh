#!/usr/bin/env bash
# One task of a job: on each node the launcher of its ranks, or one rank (LONGHAUL_LAUNCH=srun). slurm/job.sh starts it:
#   bash slurm/node.sh PYTHON [TRAINER OPTION…]
set -euo pipefail
trap '' USR1 USR2 # until the trainer handles them: a request to save must not kill a rank with nothing to save yet

python=$1
shift
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

count_of() { # NAME VALUE: the value, which must be a number
    case $2 in
        "" | *[!0-9]*)
            echo "error: $1 is '$2': use a whole number" >&2
            exit 2
            ;;
    esac
    echo "$2"
}

if [ "$SLURM_STEP_NUM_NODES" -gt 1 ] && [ -z "${GLOO_SOCKET_IFNAME:-}" ]; then
    # only where the node's own name would mislead gloo, and of NCCL's variables none
    printed=$("$python" "$project/slurm/print_interface.py" "$LONGHAUL_MEETING_HEAD")
    interface=$(sed -n 's/^longhaul:interface=//p' <<< "$printed") # and no banner of a wrapper's
    if [ -n "$interface" ]; then export GLOO_SOCKET_IFNAME=$interface; fi
fi

if [ "$LONGHAUL_LAUNCH" = srun ]; then
    export MASTER_ADDR=$LONGHAUL_MEETING_HEAD MASTER_PORT=$LONGHAUL_MEETING_PORT
    exec "$python" "$project/train/pretrain.py" "$@"
fi

gpus=${SLURM_GPUS_ON_NODE:-${SLURM_GPUS_PER_NODE:-0}}
gpus=$(count_of "the number of GPUs of a node" "${gpus##*:}") # a type may precede it
if [ "$gpus" = 0 ]; then gpus=1; fi
ranks=$(count_of LONGHAUL_RANKS_PER_NODE "${LONGHAUL_RANKS_PER_NODE:-$gpus}")
if [ "$SLURM_STEP_NUM_NODES" = 1 ]; then
    meeting=(--standalone)
else
    export PET_RDZV_ID=$LONGHAUL_MEETING_KEY # --rdzv_id, where no other user can read it
    meeting=(--nnodes="$SLURM_STEP_NUM_NODES" --node_rank="$SLURM_NODEID"
        --master_addr="$LONGHAUL_MEETING_HEAD" --master_port="$LONGHAUL_MEETING_PORT")
fi
exec "$python" "$project/train/launch.py" "${meeting[@]}" --nproc_per_node="$ranks" --max-restarts=0 \
    "$project/train/pretrain.py" "$@"
