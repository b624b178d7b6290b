"""Are normal steps taken for spikes? Train 20,000 of them, and judge each as the trainer does.

    python records/2026-11-28-normal-steps/normal_steps.py
    … normal_steps.py --runs runs/again --steps-per-cent 5

The runs warm up, resume, change the batch and warm up again. Every recorded step is judged as with `run.on_spike
rollback`, in the order of the record; results.json has how near a spike the worst of them came. Runs resume where they
stopped when it is started again.
"""

import argparse
import math
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[1]
if __name__ == "__main__":  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(PROJECT)

import yaml

from common.command_line import CommandParser
from common.errors import UserError, exit_on_user_error
from common.metrics_file import read_records, record_kind
from common.publish import write_json_whole
from common.run_folder import RunFolder
from train.optimization.step import StepResult, Verdict
from train.optimization.trend import LEAST_NORM_SPREAD, LENGTH, NORM_OUTLIER, OUTLIER, RAISED, Level, Trend
from train.run.spikes import Spikes

CONFIG = {
    "model": {"block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 48},
    "batch": {"tokens_per_step": 512, "micro_batch": 16},
    "schedule": {"warmup": 200},
    "checkpoint": {"every_steps": 1000, "keep_last": 1, "keep_best": False},
    "eval": {"every_steps": 0, "tokens": 4096, "prompts": []},
    "log": {"every_steps": 500},
    "run": {"dtype": "fp32", "device": "cpu"},
}


@dataclass(frozen=True)
class Part:
    """Options of one start, up to `last` (in hundredths of the run's steps)."""

    last: int
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class NormalRun:
    """A run of several starts; another setting of it makes no trend with what came before."""

    steps: int
    options: tuple[str, ...]
    parts: tuple[Part, ...]


HALF_BATCH = ("--batch.tokens_per_step=256", "--batch.micro_batch=8", "--allow-change=batch.tokens_per_step")
DOUBLE_BATCH = ("--batch.tokens_per_step=1024", "--allow-change=batch.tokens_per_step")
AGAIN = ("--schedule.rewarm=true",)
RUNS = {
    "gpt-wsd": NormalRun(
        8_000,
        ("--optim.lr=3e-3", "--schedule.kind=wsd", "--schedule.decay=1000", "--run.seed=1"),
        (Part(25), Part(40), Part(70, HALF_BATCH), Part(100, DOUBLE_BATCH)),
    ),
    "llama-cosine": NormalRun(
        6_000,
        ("--model.position=rope", "--model.norm=rmsnorm", "--model.mlp=swiglu", "--model.bias=false",
         "--optim.lr=1e-2", "--run.seed=2"),
        (Part(50), Part(100)),
    ),
    "gpt-small-batch": NormalRun(
        6_000,
        ("--batch.tokens_per_step=128", "--batch.micro_batch=4", "--model.dropout=0.1", "--optim.lr=3e-3",
         "--schedule.kind=constant", "--run.seed=5"),
        (Part(30), Part(60), Part(100, AGAIN)),
    ),
}  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser(__doc__)
    parser.add_argument("--data", type=Path, default=PROJECT / "data" / "docstrings-bytes", help="the token set")
    parser.add_argument("--runs", type=Path, default=PROJECT / "runs" / "normal-steps", help="where runs go")
    parser.add_argument("--out", type=Path, default=HERE / "results.json", help="where the figures go")
    parser.add_argument("--steps-per-cent", type=int, help="hundredths of a run's steps, to try it (default: all)")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    if not (arguments.data / "manifest.json").exists():
        call(PROJECT / "data_prep" / "docstrings.py", "--out", arguments.data, "--tokenizer", "byte")
    results = {}
    for name, run in RUNS.items():
        per_cent = arguments.steps_per_cent or run.steps // 100
        folder = RunFolder(arguments.runs / name)
        train(folder, run, per_cent, arguments.data)
        results[name] = judge(folder)
        shutil.rmtree(folder.checkpoints, ignore_errors=True)
        write_json_whole(arguments.out, results)
        print(name, results[name], flush=True)
    return 0


def train(folder: RunFolder, run: NormalRun, per_cent: int, data: Path) -> None:
    """Every part of a run, as a start of its own."""
    folder.path.mkdir(parents=True, exist_ok=True)
    config = folder.path / "options.yaml"
    config.write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
    where = [f"--config={config}", f"--data.path={data}", f"--run.root={folder.path.parent}"]
    where += [f"--run.name={folder.path.name}", "--allow-change=run.max_steps", *run.options]
    for number, part in enumerate(run.parts):
        done = {record["step"] for record in read_records(folder.metrics) if record_kind(record) == "train"}
        if max(done, default=0) < part.last * per_cent:
            more = [option for earlier in run.parts[: number + 1] for option in earlier.options]
            call(PROJECT / "train" / "pretrain.py", *where, *more, f"--run.max_steps={part.last * per_cent}")


def call(*command: object) -> None:
    status = subprocess.run([sys.executable, *map(str, command)], check=False).returncode
    if status:
        raise UserError(f"{command[0]} ended with status {status}: see above")


def judge(folder: RunFolder) -> dict[str, Any]:
    """Every recorded step as `run.on_spike rollback` would judge it: how many spikes, and how near the nearest was."""
    spikes, tokens, before = Spikes(on_spike="rollback", max_skips=10**9), 0, 0
    starts = recorded = steps = judged = beyond = sustained = longest = 0
    batches: list[int] = []
    nearest = {"loss": -math.inf, "grad_norm": -math.inf}  # spreads above the median
    for record in read_records(folder.metrics):
        starts += record_kind(record) == "start"
        recorded += record_kind(record) == "spike"
        if record_kind(record) != "train":
            continue
        steps += 1
        if (batch := record["tokens"] - before) != tokens:
            spikes.trend, tokens = Trend(), batch
            batches.append(batch)
        before, loss, norm = record["tokens"], record["loss"], record["grad_norm"]
        if len(spikes.trend.steps) == LENGTH:
            judged += 1
            for key, value in above(spikes.trend, loss, norm).items():
                nearest[key] = max(nearest[key], value)
        is_spike = loss > spikes.limits.loss or norm > spikes.limits.grad_norm
        spikes.take(record["step"], StepResult(loss, norm, Verdict.BEYOND_LIMITS if is_spike else Verdict.LEARNED))
        beyond += is_spike
        sustained += spikes.sustained(record["step"]) is not None
        longest = max(longest, spikes.raised)
    return {
        "steps": steps,
        "judged": judged,
        "starts": starts,
        "tokens_per_step": batches,
        "spikes": beyond,
        "spikes_recorded_by_the_run": recorded,
        "sustained": sustained,
        "nearest_loss_in_spreads": round(nearest["loss"], 2),
        "nearest_grad_norm_in_spreads": round(nearest["grad_norm"], 2),
        "spike_in_spreads": [OUTLIER, NORM_OUTLIER],
        "most_steps_in_a_row_above_trend": longest,
    }


def above(trend: Trend, loss: float, norm: float) -> dict[str, float]:
    """How many spreads a step's loss and (the logarithm of) its gradient norm lie above their medians."""
    spread = (trend.limits.loss - trend.raised_above) / (OUTLIER - RAISED)
    level = Level.of((math.log(step[1]) for step in trend.steps), LEAST_NORM_SPREAD)
    return {
        "loss": (loss - trend.raised_above) / spread + RAISED,
        "grad_norm": (math.log(norm) - level.median) / level.spread,
    }


if __name__ == "__main__":
    exit_on_user_error(main)
