"""Peaks of real training processes on a CPU beside the estimate of the same configuration, in all its parts.

    python records/2026-11-28-planning/memory.py --json records/2026-11-28-planning/memory.json [NAME …]

Each case is train/pretrain.py for two steps with a validation before and after and a save, in processes of their own;
the peak is the largest resident set of one of them (ru_maxrss, the kernel's VmHWM), compiler processes included. It is
run twice: with MALLOC_MMAP_THRESHOLD_=65536, by which glibc keeps no freed tensor, and as glibc is by default. Peaks
that the file has already are kept, unless their case is named; the estimates are always those of the code as it is.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(PROJECT))

from model.memory import MemoryEstimate
from tests.helpers.process_memory import RETURNED, peak_bytes
from tests.helpers.token_sets import make_token_set
from train.batches.plan import plan_batch
from train.estimates.run_memory import MMAP_THRESHOLD, estimated_memory
from train.settings.command_line import read_config
from train.settings.sections import Config

VOCABULARY = 257  # of the byte tokenizer in the data; tables are widened by `vocab_multiple`
GPT2, LLAMA = "--model.preset=gpt2-124m", "--model.preset=llama-124m"
# Activations are most of it, of models so narrow that they take little time; or weights, most of them in a wide table
NARROW = ["--model.n_embd=64", "--model.n_head=1", "--model.n_layer=12", "--model.vocab_multiple=1024"]
NARROW_GPT2, NARROW_LLAMA = [GPT2, *NARROW], [LLAMA, *NARROW]
HEAVY = ["--model.n_layer=4", "--model.vocab_multiple=65536"]
HEAVY_GPT2, HEAVY_LLAMA = [GPT2, *HEAVY], [LLAMA, *HEAVY]
FP32, BF16, MUON, COMPILED = "--run.dtype=fp32", "--run.dtype=bf16", "--optim.kind=muon", "--run.compile=true"
FULL, EVERY, NORMS = "--recompute.mode=full", "--recompute.mode=every", "--recompute.norms=true"
SHARDED, WHOLE, AVERAGED = "--optim.shard=true", "--optim.shard=false", "--optim.ema_half_life_tokens=1000"
HEAPS: dict[str, dict[str, str]] = {"returned": RETURNED, "default": {}}
# name: ranks, sequences of a micro-batch, sequences of a step, tokens of a sequence, options
CASES: dict[str, tuple[int, int, int, int, list[str]]] = {
    "gpt2-fp32": (1, 208, 208, 128, [*NARROW_GPT2, FP32]),
    "gpt2-bf16": (1, 352, 352, 128, [*NARROW_GPT2, BF16]),
    "gpt2-fp32-accumulating": (1, 208, 416, 128, [*NARROW_GPT2, FP32]),
    "gpt2-fp32-norms": (1, 256, 256, 128, [*NARROW_GPT2, FP32, NORMS]),
    "gpt2-bf16-every-2": (1, 640, 640, 128, [*NARROW_GPT2, BF16, EVERY]),
    "llama-fp32": (1, 160, 160, 128, [*NARROW_LLAMA, FP32]),
    "llama-bf16": (1, 288, 288, 128, [*NARROW_LLAMA, BF16]),
    "llama-fp32-full": (1, 1024, 1024, 128, [*NARROW_LLAMA, FP32, FULL]),
    "gpt2-fp32-weights": (1, 2, 4, 64, [*HEAVY_GPT2, FP32]),
    "llama-bf16-weights": (1, 4, 4, 64, [*HEAVY_LLAMA, BF16]),
    "llama-fp32-muon-average": (1, 2, 2, 64, [*HEAVY_LLAMA, FP32, MUON, AVERAGED]),
    "gpt2-fp32-2-ranks": (2, 2, 4, 64, [*HEAVY_GPT2, FP32, WHOLE]),
    "llama-bf16-2-ranks-sharded": (2, 2, 8, 64, [*HEAVY_LLAMA, BF16, SHARDED]),
    "llama-bf16-2-ranks-muon-sharded": (2, 2, 4, 64, [*HEAVY_LLAMA, BF16, MUON, SHARDED]),
    "gpt2-fp32-compiled": (1, 256, 256, 128, [*NARROW_GPT2, FP32, COMPILED]),
    "llama-bf16-compiled": (1, 384, 384, 128, [*NARROW_LLAMA, BF16, COMPILED]),
}


def options_of(name: str) -> tuple[int, list[str]]:
    """Ranks, and the trainer's options."""
    ranks, micro_batch, sequences, length, options = CASES[name]
    return ranks, [
        *options, f"--model.block_size={length}", f"--batch.micro_batch={micro_batch}",
        f"--batch.tokens_per_step={sequences * length}", "--run.max_steps=2", "--eval.tokens=8192",
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


def estimate_of(name: str, heap: str) -> MemoryEstimate:
    config, (ranks, micro_batch, _, length, _) = config_of(name), CASES[name]
    plan = plan_batch(config.batch.tokens_per_step, length, micro_batch, ranks)
    os.environ.pop(MMAP_THRESHOLD, None)
    os.environ.update(HEAPS[heap])
    return estimated_memory(config, plan, "cpu")


def peak_of(name: str, heap: str, data: Path, root: Path) -> int:
    """Bytes: the largest resident set among the processes of a run."""
    ranks, options = options_of(name)
    options = [*options, f"--data.path={data}", f"--run.root={root}", f"--run.name={name}"]
    peak = peak_bytes(ranks, options, root / f"{name}.out", HEAPS[heap])
    shutil.rmtree(root / name)
    return peak


def row_of(name: str, heap: str, peak: int) -> dict[str, Any]:
    estimate = estimate_of(name, heap)
    return {
        "name": name,
        "heap": heap,
        "peak_bytes": peak,
        "estimated_bytes": estimate.total,
        "ratio": estimate.total / peak,
        "largest_phase": estimate.largest_phase,
        "parts": estimate.parts,
        "phases": estimate.phases,
    }


def table_of(rows: list[dict[str, Any]]) -> list[str]:
    """As it stands in README.md and docs/planning.md."""
    lines = [
        "| case | peak, GiB | estimated | | by default, GiB | estimated | | largest phase |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in CASES:
        here = {row["heap"]: row for row in rows if row["name"] == name}
        if not here:
            continue
        cells = []
        for heap in HEAPS:
            if (row := here.get(heap)) is None:
                cells += ["", "", ""]
                continue
            cells += [f"{row[key] / 2**30:.3f}" for key in ("peak_bytes", "estimated_bytes")] + [
                f"{row['ratio'] - 1:+.1%}"
            ]
        lines.append(f"| {' | '.join([name, *cells, next(iter(here.values()))['largest_phase']])} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="cases to measure (default: those without a peak yet)")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--heap", choices=HEAPS, help="only with this heap (default: one after the other)")
    parser.add_argument("--estimates-only", action="store_true", help="measure nothing")
    a = parser.parse_args()
    found = json.loads(a.json.read_text(encoding="utf-8")) if a.json.exists() else []
    peaks = {(row["name"], row.get("heap", "default")): row["peak_bytes"] for row in found}
    wanted = [(name, heap) for heap in HEAPS if a.heap in (None, heap) for name in a.names or CASES]
    work = [] if a.estimates_only else [key for key in wanted if a.names or key not in peaks]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        make_token_set(data, train_tokens=400_000, val_tokens=20_000)
        for key in [*work, None]:
            if key is not None:
                peaks[key] = peak_of(*key, data, Path(folder))
            rows = [row_of(*known, peaks[known]) for known in wanted if known in peaks]
            a.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
            print("\n".join(table_of(rows)), flush=True)


if __name__ == "__main__":
    main()
