# shellcheck shell=bash
# What every job's shell starts with: job.sh sources this, and so do the scripts that submit.py writes, each at its top
# level, so that what the site's own slurm/site.sh declares is there for the whole job.
#
# site.sh is sourced as at a prompt: without errexit, nounset and pipefail, which the shell code of `module`, `conda` and
# $PS1 don't survive, and without the job's own words in "$@". All that is restored afterwards. A command in it that
# fails is named and skipped; where the file itself ends with a status that is not 0, or ends the shell, so does the
# job, by name.
site_file=$(dirname "${BASH_SOURCE[0]}")/site.sh
site_folder=$PWD
site_options=$(set +o)
case $- in *e*) site_options+=$'\nset -e' ;; esac # which bash clears in a $(…)
site_words=("$@")

site_failed() { # WHAT HAPPENED: end the job
    trap - EXIT ERR
    echo "error: $site_file $1: the job ends before anything is started: fix the file" >&2
    exit 2
}

site_passed_over() { # STATUS LINE FILE COMMAND: a command that failed; those of files that site.sh sources are their own
    if [ "$3" = "$site_file" ]; then echo "warning: $site_file, line $2: \`$4\` ended with status $1" >&2; fi
}

site_check_array() { # NAME: srun_options or in_container, as site.sh has left it
    local declared
    declared=$(declare -p "$1" 2> /dev/null) || declared=
    case $declared in
        "declare -a"*) ;;
        "") eval "$1=()" ;;
        *) site_failed "sets $1 as one word: write it as an array, $1=(…)" ;;
    esac
}

# after sbatch --export=NONE (for example by a site's SBATCH_EXPORT) srun would pass nothing on of what is exported here
export SLURM_EXPORT_ENV=ALL
unset srun_options in_container
if [ -e "$site_file" ]; then
    trap 'site_failed "ended the shell with status $? instead of returning"' EXIT
    trap 'site_passed_over $? "$LINENO" "${BASH_SOURCE[0]}" "$BASH_COMMAND"' ERR
    set --
    set +eu +o pipefail
    # shellcheck disable=SC1090
    . "$site_file"
    site_status=$?
    eval "$site_options"
    set -- "${site_words[@]}"
    case $(trap -p EXIT) in *site_failed*) trap - EXIT ;; esac # another one is the site's own
    trap - ERR
    IFS=$' \t\n'
    cd "$site_folder" || exit
    if [ "$site_status" != 0 ]; then
        site_failed "ended with status $site_status (its last command's; where that is no failure, add a line: true)"
    fi
fi
site_check_array srun_options
site_check_array in_container
# Python programs read these settings, and site.sh need not export them
for site_name in "${!LONGHAUL_@}"; do export "${site_name?}"; done

# what a launcher around sbatch may have left behind would mislead the trainers
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT LONGHAUL_STORE LONGHAUL_MEETING_KEY
# compute nodes need nothing from the network, and waiting for it costs minutes
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1

# a container may have no scontrol to ask for the job's end; older Slurms don't set this, and another job may have
if [ -n "${SLURM_JOB_ID:-}" ]; then
    site_record=" $(SLURM_TIME_FORMAT=%s scontrol -o show job "$SLURM_JOB_ID" 2> /dev/null || true)"
    site_end=${site_record#* EndTime=}
    site_end=${site_end%% *}
    case $site_end in *[!0-9]* | "") ;; *) export SLURM_JOB_END_TIME=$site_end ;; esac
fi
