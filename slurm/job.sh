# shellcheck shell=bash
# What every job of this project does. Sourced by the batch scripts beside it and by submit.py's.
#
# The job runs on the allocation's first node: it checks options, data and nodes, starts the trainers, passes on
# requests to save and leave, and when they have ended asks decide.py what becomes of the job.
#
# Settings, from the environment of sbatch or from slurm/site.sh (which is sourced here, and not in the repository):
#   LONGHAUL_PYTHON            Python with the requirements                    (default .venv/bin/python)
#   LONGHAUL_LAUNCH            torchrun (one task a node) or srun (one a rank)  (default torchrun)
#   LONGHAUL_RANKS_PER_NODE    ranks that torchrun starts on each node          (default: the GPUs, or 1 without)
#   LONGHAUL_FRUITLESS_STARTS  starts in a row without a new checkpoint before the job is given up  (default 3)
# and, in site.sh only, two arrays:
#   srun_options=(…)           more options of srun, such as a container's
#   in_container=(…)           words before every Python command, such as: apptainer exec --nv image.sif
set -euo pipefail

asked=  # the user signal that has come, if any
told=   # SIGTERM, if it has come

say() { echo "[$(date +%T) job ${SLURM_JOB_ID}.${SLURM_RESTART_COUNT:-0}] $*"; }

run_job() { # DEFAULT_CONFIG [TRAINER OPTION…]: the whole life of a job
    trap 'asked=USR1' USR1 USR2
    trap 'told=TERM' TERM
    enter_repository
    local options=("${@:2}")
    names_config "${options[@]}" || options=("--config=$1" "${options[@]}")
    begin "${options[@]}"
    if [ -z "$asked$told" ]; then check_nodes; fi
    if [ -z "$asked$told" ]; then train "${options[@]}"; fi
    conclude
}

enter_repository() {
    cd "$SLURM_SUBMIT_DIR"
    srun_options=() in_container=()
    # after sbatch --export=NONE (a site's SBATCH_EXPORT, say) srun would pass nothing on of what is exported here
    export SLURM_EXPORT_ENV=ALL
    # shellcheck disable=SC1091
    if [ -r slurm/site.sh ]; then . slurm/site.sh; fi
    LONGHAUL_LAUNCH=${LONGHAUL_LAUNCH:-torchrun}
    python=("${in_container[@]}" "${LONGHAUL_PYTHON:-.venv/bin/python}")
    # what a launcher around sbatch may have left behind would mislead the trainers
    unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
    # compute nodes need nothing from the network, and waiting for it costs minutes
    export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 LONGHAUL_LAUNCH
    # begin.py sets these, for functions that come later
    nodes="" run_folder="" head="" port="" meeting_id="" resume="" beginning=""
    launcher_status=1
}

names_config() { # [TRAINER OPTION…]: whether a configuration file is among them
    local option
    for option in "$@"; do
        case $option in --config | --config=*) return 0 ;; esac
    done
    return 1
}

begin() { # [TRAINER OPTION…]: write down the start, and where the ranks meet
    local node addresses=() assignments
    nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tr '\n' ' ')
    for node in $nodes; do
        addresses+=("$(scontrol -o show node "$node" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')")
    done
    check_tasks
    say "on $nodes"
    assignments=$("${python[@]}" slurm/begin.py --nodes "$nodes" --addresses "${addresses[*]}" \
        --launch "$LONGHAUL_LAUNCH" -- "$@") || exit
    eval "$assignments"
    export LONGHAUL_HEAD=$head LONGHAUL_PORT=$port LONGHAUL_MEETING_ID=$meeting_id
    # srun does not inherit the CPUs of the job: without this every rank would compute on one
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-$((SLURM_CPUS_ON_NODE / ${SLURM_NTASKS_PER_NODE:-1}))}
}

check_tasks() {
    local tasks=${SLURM_NTASKS:-$SLURM_JOB_NUM_NODES}
    if [ "$LONGHAUL_LAUNCH" = torchrun ] && [ "$tasks" != "$SLURM_JOB_NUM_NODES" ]; then
        say "error: $tasks tasks on $SLURM_JOB_NUM_NODES nodes: torchrun needs one task a node" \
            "(--ntasks-per-node=1); LONGHAUL_LAUNCH=srun starts one task a rank" >&2
        exit 2
    fi
}

check_nodes() { # can all nodes reach the head, and do all see the same files?
    if [ "$SLURM_JOB_NUM_NODES" = 1 ]; then return; fi
    # --overlap: the trainers' step need not wait until Slurm has cleared this one away, which may take a minute
    srun --overlap --ntasks-per-node=1 --ntasks="$SLURM_JOB_NUM_NODES" --cpus-per-task=1 --kill-on-bad-exit=0 \
        "${srun_options[@]}" "${python[@]}" slurm/preflight.py --nodes "$nodes" "$beginning" && return
    if [ -n "$asked$told" ]; then return; fi
    say "error: the nodes can't work together, no trainer was started" >&2
    exit 2
}

train() { # [TRAINER OPTION…]: start the trainers and wait for their end, passing on requests to stop
    local step nudge="" again=()
    if [ -n "$resume" ]; then again=("--resume=$resume"); fi # whatever the first start of the job began from
    srun --kill-on-bad-exit=1 --label "${srun_options[@]}" "${in_container[@]}" \
        bash slurm/node.sh "${LONGHAUL_PYTHON:-.venv/bin/python}" "$@" "${again[@]}" &
    step=$!
    while :; do
        if [ -n "$asked" ] && [ -z "$nudge" ]; then
            say "asked to save and leave"
            pass_on &
            nudge=$!
        fi
        launcher_status=0
        wait "$step" || launcher_status=$? # a signal ends the wait, too
        kill -0 "$step" 2> /dev/null || break
    done
    if [ -n "$nudge" ]; then kill "$nudge" 2> /dev/null || true; fi
}

pass_on() { # a trainer that is still starting may miss a signal, so it is sent again until all have left
    while :; do
        scancel --signal=USR1 "$SLURM_JOB_ID" || true
        sleep 5
    done
}

conclude() {
    local status=0 flags=()
    if [ -n "$asked" ]; then flags+=(--asked); fi
    if [ -n "$told" ]; then flags+=(--told); fi
    "${python[@]}" slurm/decide.py "$run_folder" --job "$(scontrol -o show job "$SLURM_JOB_ID")" \
        --exit-status "$launcher_status" "${flags[@]}" || status=$?
    if [ "$status" != 75 ]; then exit "$status"; fi
    trap - TERM # which Slurm now sends; it would wait for whoever does not leave
    requeue || { say "not requeued by Slurm: submit again to go on"; exit 1; }
    while :; do sleep 1; done
}

requeue() { # again and again while the controller is away, as at its restart; fails where it refuses
    local heard=
    until scontrol requeue "$SLURM_JOB_ID"; do
        if [ -n "$heard" ]; then return 1; fi
        if scontrol ping | grep -q "is UP"; then
            heard=yes # or it has come back since: that is worth another try
        else
            say "the controller does not answer: asking again to be requeued"
            sleep 5
        fi
    done
}
