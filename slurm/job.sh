# shellcheck shell=bash
# shellcheck disable=SC2154 # srun_options and in_container come from site_environment.sh
# What every job of this project does. Sourced by the batch scripts beside it.
#
# The job runs on the allocation's first node: it checks options, data and nodes, starts the trainers, forwards
# stop requests, and when they have ended runs requeue.py, which decides about the job.
#
# Settings, from the environment of sbatch or from slurm/site.sh (which is not in the repository, see
# site_environment.sh):
#   LONGHAUL_PYTHON            Python with the requirements                    (default .venv/bin/python)
#   LONGHAUL_CONTAINER_PYTHON  the one inside a container of srun's, where it is another  (default LONGHAUL_PYTHON)
#   LONGHAUL_LAUNCH            torchrun (one task a node) or srun (one a rank)  (default torchrun)
#   LONGHAUL_RANKS_PER_NODE    ranks that torchrun starts on each node          (default: the GPUs, or 1 without)
#   LONGHAUL_HEAD              address of the first node for the others         (default: its address that faces them)
#   LONGHAUL_FRUITLESS_STARTS  starts in a row without a new checkpoint before the job is given up  (default 3)
# and, in site.sh only, two arrays:
#   srun_options=(…)           more options of srun, such as a container's
#   in_container=(…)           words before every Python command, such as: apptainer exec --nv image.sif
set -euo pipefail

asked=  # the user signal that has come, if any
told=   # SIGTERM, if it has come
trap 'asked=USR1' USR1 USR2
trap 'told=TERM' TERM

cd "$SLURM_SUBMIT_DIR"
# shellcheck source=slurm/site_environment.sh
. slurm/site_environment.sh
# shellcheck source=slurm/requeue.sh
. slurm/requeue.sh
export LONGHAUL_LAUNCH=${LONGHAUL_LAUNCH:-torchrun}
python=("${in_container[@]}" "${LONGHAUL_PYTHON:-.venv/bin/python}") # of the job's own shell
step_python=${LONGHAUL_CONTAINER_PYTHON:-${LONGHAUL_PYTHON:-.venv/bin/python}}
# take_values sets these, from what start_job.py prints
run_folder="" head="" port="" secret="" resume="" beginning="" excluded=unchanged
nodes=() launcher_status=1

run_job() { # DEFAULT_CONFIG [TRAINER OPTION…]: the whole life of a job
    local options=("${@:2}")
    names_config "${options[@]}" || options=("--config=$1" "${options[@]}")
    start "${options[@]}"
    if [ -z "$asked$told" ]; then check_nodes; fi
    if [ -z "$asked$told" ]; then train "${options[@]}"; fi
    conclude
}

names_config() { # [TRAINER OPTION…]: whether a configuration file is among them
    local option
    for option in "$@"; do
        case $option in --config | --config=*) return 0 ;; esac
    done
    return 1
}

start() { # [TRAINER OPTION…]: record the start, and where the ranks meet
    local node addresses=() printed status=0
    list_nodes
    for node in "${nodes[@]}"; do addresses+=("$(address_of "$node")"); done
    check_tasks
    log "on ${nodes[*]}"
    printed=$("${python[@]}" slurm/start_job.py --nodes "${nodes[*]}" --addresses "${addresses[*]}" \
        --launch "$LONGHAUL_LAUNCH" -- "$@") || status=$?
    take_values <<< "$printed"
    if [ "$status" != 0 ]; then exit "$status"; fi
    if [ -z "$beginning" ]; then
        log "error: ${python[*]} slurm/start_job.py ended well, but its output has not come here: does a wrapper or a" \
            "container keep it back?" >&2
        exit 2
    fi
    # what no other user of a node may know travels in the environment: they can read command lines
    export LONGHAUL_MEETING_HEAD=$head LONGHAUL_MEETING_PORT=$port LONGHAUL_MEETING_KEY=$secret
    export LONGHAUL_BEGINNING=$beginning
    # srun does not inherit the CPUs of the job: without this every rank would compute on one
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-$((SLURM_CPUS_ON_NODE / ${SLURM_NTASKS_PER_NODE:-1}))}
}

take_values() { # from standard input: lines "longhaul:NAME=VALUE" set only these names; all others are shown
    local line name
    while IFS= read -r line; do
        name=${line#longhaul:}
        name=${name%%=*}
        case $line in
            longhaul:*=*)
                case $name in
                    run_folder | head | port | secret | resume | beginning | excluded)
                        printf -v "$name" %s "${line#*=}"
                        ;;
                esac
                ;;
            "") ;;
            *) printf '%s\n' "$line" ;; # a wrapper's or a container's own words
        esac
    done
}

list_nodes() { # the job's nodes, by their names in Slurm
    local names
    names=$(scontrol show hostnames "$SLURM_JOB_NODELIST") || names=
    mapfile -t nodes <<< "$names"
    if [ -n "$names" ] && [ "${#nodes[@]}" = "$SLURM_JOB_NUM_NODES" ]; then return; fi
    log "error: scontrol show hostnames $SLURM_JOB_NODELIST gave no list of $SLURM_JOB_NUM_NODES nodes: $names" >&2
    exit 2
}

address_of() { # NODE: the address Slurm uses for it; its name where that is not known
    local record address
    record=" $(scontrol -o show node "$1" || true)"
    address=${record#* NodeAddr=} # the first: anybody's comment comes later
    if [ "$address" = "$record" ]; then address=$1; fi
    echo "${address%% *}"
}

check_tasks() {
    local tasks=${SLURM_NTASKS:-$SLURM_JOB_NUM_NODES}
    if [ "$LONGHAUL_LAUNCH" = torchrun ] && [ "$tasks" != "$SLURM_JOB_NUM_NODES" ]; then
        log "error: $tasks tasks on $SLURM_JOB_NUM_NODES nodes: torchrun needs one task a node" \
            "(--ntasks-per-node=1); LONGHAUL_LAUNCH=srun starts one task a rank" >&2
        exit 2
    fi
}

check_nodes() { # can all nodes reach the head, and do all see the same files?
    if [ "$SLURM_JOB_NUM_NODES" = 1 ]; then return; fi
    # --overlap: the trainers' step need not wait until Slurm has cleared this one away, which may take a minute
    srun --overlap --ntasks-per-node=1 --ntasks="$SLURM_JOB_NUM_NODES" --cpus-per-task=1 --kill-on-bad-exit=0 \
        "${srun_options[@]}" "${in_container[@]}" "$step_python" slurm/preflight.py --nodes "${nodes[*]}" \
        && return
    if [ -n "$asked$told" ]; then return; fi
    log "error: the nodes can't work together, no trainer was started" >&2
    exit 2
}

train() { # [TRAINER OPTION…]: start the trainers and wait for their end, forwarding stop requests
    local step nudge="" again=()
    if [ -n "$resume" ]; then again=("--resume=$resume"); fi # whatever the first start of the job started from
    srun --kill-on-bad-exit=1 --label "${srun_options[@]}" "${in_container[@]}" \
        bash slurm/node.sh "$step_python" "$@" "${again[@]}" &
    step=$!
    while :; do
        if [ -n "$asked" ] && [ -z "$nudge" ]; then
            log "stop requested: the trainers save and exit"
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
    local status=0 flags=() record printed
    if [ -n "$asked" ]; then flags+=(--asked); fi
    if [ -n "$told" ]; then flags+=(--told); fi
    record=$(scontrol -o show job "$SLURM_JOB_ID") || true
    printed=$(partition_nodes "$record" | "${python[@]}" slurm/requeue.py "$run_folder" --job "$record" --nodes \
        --exit-status "$launcher_status" "${flags[@]}") || status=$?
    take_values <<< "$printed"
    end_job "$status" "$excluded"
}

partition_nodes() { # JOB'S RECORD: the nodes on which the job could run; nothing where Slurm does not tell
    local partition
    partition=${1#* Partition=} # the first: the job's own options come later
    if [ "$partition" = "$1" ]; then return; fi
    sinfo --noheader --Node --partition="${partition%% *}" --format='%N|%T|%c|%m|%G|%b' 2> /dev/null || true
}
