# shellcheck shell=bash
# Putting a job back into the queue, from its own shell on the host. Sourced by job.sh and by submit.py's scripts.

log() { echo "[$(date +%FT%T%z) job ${SLURM_JOB_ID}.${SLURM_RESTART_COUNT:-0}] $*"; }

end_job() { # STATUS: end with it; 75 means: to be requeued
    if [ "$1" != 75 ]; then exit "$1"; fi
    trap - TERM # which Slurm now sends; it would wait for a process that does not exit
    requeue || { log "not requeued by Slurm: submit again to resume"; exit 1; }
    while :; do sleep 1; done
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
