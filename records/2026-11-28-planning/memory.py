"""Peaks of real training processes on a CPU beside the estimate of the same configuration, in all its parts.

    python records/2026-11-28-planning/memory.py --json records/2026-11-28-planning/memory.json [NAME …]

Each case is train/pretrain.py for two steps with validation and a save, in processes of their own; the peak is the
largest resident set of one of them (ru_maxrss, the kernel's VmHWM), compiler processes included.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(PROJECT))

from tests.helpers.token_sets import make_token_set
from train.batches.plan import plan_batch
from train.estimates.run_memory import estimated_memory
from train.settings.command_line import read_config
from train.settings.sections import Config

VOCABULARY = 257  # of the byte tokenizer in the data; tables are widened by the multiples below
TABLE = "--model.vocab_multiple=8192"
# Weights are most of it, or activations: of narrow models, which take little time
GPT2, LLAMA = ["--model.preset=gpt2-124m", TABLE], ["--model.preset=llama-124m", TABLE]
NARROW = ["--model.n_embd=128", "--model.n_head=2", "--model.n_layer=12"]
NARROW_GPT2, NARROW_LLAMA = [*GPT2, *NARROW], [*LLAMA, *NARROW]
FP32, BF16 = "--run.dtype=fp32", "--run.dtype=bf16"
FULL, EVERY, NORMS = "--recompute.mode=full", "--recompute.mode=every", "--recompute.norms=true"
# name: ranks, sequences of a micro-batch, sequences of a step, tokens of a sequence, options
CASES: dict[str, tuple[int, int, int, int, list[str]]] = {
    "gpt2-fp32": (1, 56, 56, 256, [*NARROW_GPT2, FP32]),
    "gpt2-bf16": (1, 80, 80, 256, [*NARROW_GPT2, BF16]),
    "gpt2-fp32-accumulating": (1, 48, 96, 256, [*NARROW_GPT2, FP32]),
    "gpt2-fp32-norms": (1, 64, 64, 256, [*NARROW_GPT2, FP32, NORMS]),
    "gpt2-bf16-every-2": (1, 128, 128, 256, [*NARROW_GPT2, BF16, EVERY]),
    "llama-fp32": (1, 48, 48, 256, [*NARROW_LLAMA, FP32]),
    "llama-bf16": (1, 72, 72, 256, [*NARROW_LLAMA, BF16]),
    "gpt2-fp32-compiled": (1, 80, 80, 256, [*NARROW_GPT2, FP32, "--run.compile=true"]),
    "llama-bf16-compiled": (1, 96, 96, 256, [*NARROW_LLAMA, BF16, "--run.compile=true"]),
    "gpt2-fp32-124m": (1, 4, 8, 64, [*GPT2, FP32]),
    "gpt2-fp32-124m-wide-table": (1, 4, 4, 64, [*GPT2, "--model.vocab_multiple=50304", FP32]),
    "llama-bf16-124m-full": (1, 8, 8, 64, [*LLAMA, BF16, FULL]),
    "llama-fp32-124m-muon": (1, 4, 4, 64, [*LLAMA, FP32, "--optim.kind=muon"]),
    "gpt2-fp32-124m-2-ranks": (2, 2, 4, 64, [*GPT2, FP32, "--optim.shard=false"]),
    "llama-bf16-124m-2-ranks-sharded": (2, 2, 8, 64, [*LLAMA, BF16, "--optim.shard=true"]),
}


def options_of(name: str) -> tuple[int, list[str]]:
    """Ranks, and the trainer's options."""
    ranks, micro_batch, sequences, length, options = CASES[name]
    return ranks, [
        *options, f"--model.block_size={length}", f"--batch.micro_batch={micro_batch}",
        f"--batch.tokens_per_step={sequences * length}", "--run.max_steps=2", f"--eval.tokens={micro_batch * length}",
        "--run.device=cpu", "--log.every_steps=1",
    ]  # fmt: skip


def config_of(name: str) -> Config:
    _, options = options_of(name)
    config, _ = read_config(options)
    return replace(
        config,
        model=replace(config.model, vocab_size=VOCABULARY),
        recompute=replace(config.recompute, mode="none" if config.recompute.mode == "auto" else config.recompute.mode),
        optim=replace(config.optim, shard=config.optim.shard is True),
    )


def peak_of(name: str, data: Path, root: Path) -> int:
    """Bytes: the largest resident set among the processes of a run."""
    ranks, options = options_of(name)
    command = [str(PROJECT / "train" / "pretrain.py")]
    if ranks > 1:
        command = [str(PROJECT / "train" / "launch.py"), "--standalone", f"--nproc_per_node={ranks}", *command]
    options = [*options, f"--data.path={data}", f"--run.root={root}", f"--run.name={name}"]
    log = root / f"{name}.out"
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen([sys.executable, *command, *options], stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(log.read_text(encoding="utf-8", errors="replace")[-2000:])
    return usage.ru_maxrss * 1024


def row_of(name: str, data: Path, root: Path) -> dict[str, Any]:
    config, (ranks, micro_batch, _, length, _) = config_of(name), CASES[name]
    plan = plan_batch(config.batch.tokens_per_step, length, micro_batch, ranks)
    estimate = estimated_memory(config, plan, "cpu")
    peak = peak_of(name, data, root)
    shutil.rmtree(root / name)
    return {
        "name": name,
        "peak_bytes": peak,
        "estimated_bytes": estimate.total,
        "ratio": estimate.total / peak,
        "largest_phase": estimate.largest_phase,
        "parts": estimate.parts,
        "phases": estimate.phases,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="cases (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    a = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        make_token_set(data, train_tokens=100_000, val_tokens=20_000)
        for name in a.names or CASES:
            row = row_of(name, data, Path(folder))
            rows.append(row)
            gib = {key: row[f"{key}_bytes"] / 2**30 for key in ("peak", "estimated")}
            print(f"{name:28} {gib['peak']:6.3f} GiB  estimated {gib['estimated']:6.3f}  {row['ratio']:.3f}  "
                  f"{row['largest_phase']}", flush=True)  # fmt: skip
            if a.json:
                a.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
