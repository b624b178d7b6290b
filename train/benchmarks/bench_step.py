"""Measure an optimizer step: Longhaul's beside others of the same model, on a CPU or a GPU.

    python train/benchmarks/bench_step.py --preset gpt2-124m --micro-batch 1 --json step.json
    python train/benchmarks/bench_step.py --config train/configs/demo.yaml --optim.kind adamw --micro-batch 8 1
    python train/benchmarks/bench_step.py --cases record --json record.json

Contestants take turns, each in a process of its own, on the same random ids, from the same weights: Longhaul's step as
it is configured; a textbook's (all logits, AdamW unfused, eager); nanoGPT's (vocabulary padded, AdamW fused); that of
transformers' class for the same model; and the ceiling, the step's matrix products and nothing else.
"""

import os
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import psutil

from common.errors import exit_on_user_error
from common.host_limits import allowed_cores
from common.progress import progress_bar
from common.publish import write_json_output
from common.version import VERSION
from train.benchmarks.step_cases import Case, build_parser, read_cases
from train.benchmarks.step_figures import Row, ratios, summary, table
from train.benchmarks.step_turns import take_turns

VARIABLES = ("OMP_NUM_THREADS", "THP_MEM_ALLOC_ENABLE", "PYTORCH_CUDA_ALLOC_CONF", "CUDA_VISIBLE_DEVICES")


def main() -> int:
    cases, file = read_cases(build_parser(__doc__), sys.argv[1:])
    figures: dict[str, Any] = {"longhaul": VERSION, "machine": machine(), "ratios": {}, "cases": []}
    with progress_bar(sum(answers_of(case) * len(case.contestants) for case in cases), "turn", "steps") as bar:
        for case in cases:
            rows = {name: Row(name) for name in case.contestants}
            figures["cases"].append({})
            for name, kind, answer in take_turns(case):
                row = rows[name]
                row.take(kind, answer)
                bar.update(answers_of(case) - answered(row) if kind == "error" else kind != "facts")
                figures["cases"][-1], figures["ratios"][case.name] = case_figures(case, rows), ratios(rows)
                if file is not None:
                    write_json_output(file, figures)
            bar.clear()
            print(table(case, rows), end="\n\n", flush=True)
    return 0


def answers_of(case: Case) -> int:
    """Of each contestant: its warm-up, its turns, its trace."""
    return 1 + case.turns + bool(case.profile)


def answered(row: Row) -> int:
    return bool(row.warm_up_seconds) + len(row.turns)


def case_figures(case: Case, rows: dict[str, Row]) -> dict[str, Any]:
    """A case as JSON has it, so far."""
    config = case.config
    return {
        "name": case.name,
        "model": asdict(config.model.architecture()),
        "settings": {
            "micro_batch": case.micro_batch,
            "accumulation": case.accumulation,
            "tokens_per_step": config.batch.tokens_per_step,
            "document_mask": config.data.masks_documents,
            "optim": asdict(config.optim),
            "recompute": asdict(config.recompute),
            "dtype": config.run.dtype,
            "compile": config.run.compile,
            "seed": config.run.seed,
            "threads": case.threads,
            "warm_up": case.warm_up,
            "turns": case.turns,
            "steps": case.steps,
        },
        "machine": next((row.machine for row in rows.values() if row.machine), None),
        "contestants": [summary(row, case) for row in rows.values()],
    }


def machine() -> dict[str, Any]:
    """What is known of this machine without torch; what each case used stands with it."""
    return {
        "processor": processor_name(),
        "cores": allowed_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # no Linux
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    exit_on_user_error(main)
