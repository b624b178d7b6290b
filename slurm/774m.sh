#!/usr/bin/env bash
# 774M parameters on 1 node of 8 GPUs, from the repository's folder:
#
#   sbatch slurm/774m.sh [--section.key value …]
#
# Options of sbatch go before the script's name and win over the lines below; partition and account may also be in
# SBATCH_PARTITION and SBATCH_ACCOUNT. What follows the name are train/pretrain.py's. Sites differ: slurm/site.sh.
# See docs/cluster.md for the rest.
#
#SBATCH --job-name=gpt2-774m
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
job=${SLURM_SUBMIT_DIR:-.}/slurm/job.sh
if [ ! -r "$job" ]; then
    echo "error: $job is not there: submit from the repository's folder (sbatch slurm/774m.sh)" >&2
    exit 2
fi
# shellcheck source=slurm/job.sh
. "$job"

run_job train/configs/gpt2-774m.yaml "$@"
