#!/usr/bin/env bash
# faults for each combination of optimizer and sharding that the plain campaign does not have
set -euo pipefail
cd "$(dirname "$0")/../.."
faults() { python tests/chaos/run.py --without freeze --executed-share 0.1 "$@"; }
here=records/2026-11-28-chaos-muon
faults --faults 40 --seed 2 --option optim.kind=muon --option optim.shard=true --json $here/muon-sharded.json
faults --faults 30 --seed 3 --option optim.kind=muon --json $here/muon.json
faults --faults 30 --seed 4 --option optim.shard=true --json $here/adamw-sharded.json
faults --faults 20 --seed 5 --spikes --option optim.kind=muon --option optim.shard=true --json $here/rolled-back.json
