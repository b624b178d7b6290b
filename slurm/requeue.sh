# shellcheck shell=bash
# Putting a job back into the queue, from its own shell on the host. Sourced by job.sh and by submit.py's scripts.

log() { echo "[$(date +%FT%T%z) job ${SLURM_JOB_ID}.${SLURM_RESTART_COUNT:-0}] $*"; }

end_job() { # STATUS [NODES]: end with it; 75 means: to be requeued, without the nodes (unchanged: as it is)
    local excluded=${2-unchanged}
    if [ "$1" != 75 ]; then exit "$1"; fi
    trap - TERM # which Slurm now sends; it would wait for a process that does not exit
    if [ "$excluded" != unchanged ]; then trap '' TERM; fi # there is still something to do by then
    requeue || { log "not requeued by Slurm: submit again to resume"; exit 1; }
    if [ "$excluded" != unchanged ]; then
        leave_out "$excluded"
        trap - TERM
        kill -TERM $$ # Slurm has sent it, and would wait
    fi
    while :; do sleep 1; done
}

leave_out() { # NODES: the next start does without them; Slurm takes that only once the job is requeued
    local answer="" try
    for try in 1 2 3 4 5; do
        if answer=$(scontrol update "JobId=$SLURM_JOB_ID" "ExcNodeList=$1" 2>&1); then
            log "the next start does without nodes: ${1:-none}"
            return
        fi
        sleep "$try"
    done
    log "the next start may get any node, as Slurm refused to leave out $1: $answer"
}

requeue() { # tries again while the controller doesn't answer, as at its restart; fails where it refuses
    local heard=
    until scontrol requeue "$SLURM_JOB_ID"; do
        if [ -n "$heard" ]; then return 1; fi
        if [[ $(scontrol ping) == *"is UP"* ]]; then
            heard=yes # or it has come back since: that is worth another try
        else
            log "the controller does not answer: asking again to be requeued"
            sleep 5
        fi
    done
}
