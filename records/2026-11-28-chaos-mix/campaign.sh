#!/usr/bin/env bash
# faults on runs over a staged mix of three sets, packed whole; what has its report already is not done again
set -euo pipefail
cd "$(dirname "$0")/../.."
here=records/2026-11-28-chaos-mix
status=0
faults() {
  [ -f "$here/$1.json" ] && return
  python tests/chaos/run.py --mix --without freeze --executed-share 0.05 --json "$here/unfinished.json" "${@:2}" || status=1
  mv "$here/unfinished.json" "$here/$1.json"
}
# each start with another number of ranks, against one undisturbed rank; then each number by itself, to the bit
faults changing-ranks --faults 30 --seed 1 --ranks 1 2 3 4
faults branches --faults 20 --seed 2 --ranks 1 2 3 4 --branches
faults two-ranks --faults 20 --seed 3
faults three-ranks --faults 10 --seed 4 --ranks 3 --without slow
faults four-ranks --faults 12 --seed 5 --ranks 4 --without slow
faults branches-of-two --faults 12 --seed 6 --branches --without slow
faults rolled-back --faults 8 --seed 7 --spikes --without slow
faults one-rank --faults 8 --seed 8 --ranks 1 --without slow
exit $status
