#!/usr/bin/env bash
# the demo's model with a residual stream in fp32 and in bf16, three seeds each; compared at the end
set -euo pipefail
cd "$(dirname "$0")/../.."
data=${1:-data/demo}
[ -e "$data" ] || python data_prep/docstrings.py --tokenizer gpt2-8k --out "$data"
for seed in 1 2 3; do
  for stream in fp32 bf16; do
    python train/pretrain.py --config train/configs/demo.yaml --data.path "$data" --run.dtype bf16 \
      --run.stream_dtype $stream --run.seed $seed --run.max_steps 800 --eval.every_steps 200 --eval.tokens 65536 \
      --eval.sample_every_steps 0 --checkpoint.every_steps 0 --run.name stream-$stream-$seed
  done
done
python train/study.py --compare fp32=runs/stream-fp32-1,runs/stream-fp32-2,runs/stream-fp32-3 \
  bf16=runs/stream-bf16-1,runs/stream-bf16-2,runs/stream-bf16-3 --baseline fp32 --json "$(dirname "$0")/comparison.json"
