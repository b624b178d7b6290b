"""A few real steps of a run on the machine at hand, instead of an estimate of its speed."""

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.metrics_file import read_metrics
from common.metrics_table import MetricsTable
from common.paths import PROJECT
from common.run_folder import RunFolder
from train.estimates.durations import Pace
from train.estimates.machines import Machine
from train.settings.sections import Config

FIRST = 2  # steps that are not counted: they take memory that later ones find
NAME = "measured"


def measure(config: Config, options: list[str], machine: Machine, steps: int) -> Pace:
    """Train so many steps in a folder that is deleted afterwards, with a validation before and after, and a save.

    Args:
        options: of train/pretrain.py, as the run has them.

    Raises UserError with the trainer's last line where it fails.
    """
    script = [str(PROJECT / "train" / "pretrain.py")]
    if machine.ranks_per_node > 1:
        launcher = str(PROJECT / "train" / "launch.py")
        script = [launcher, "--standalone", f"--nproc_per_node={machine.ranks_per_node}", *script]
    with tempfile.TemporaryDirectory(prefix="longhaul-plan-") as root:
        changed = {
            "run.root": root,
            "run.name": NAME,
            "run.max_steps": FIRST + steps,
            "eval.every_steps": 0,
            "eval.sample_every_steps": 0,
            "eval.hellaswag_every_steps": 0,
            "eval.choices_every_steps": 0,
            "checkpoint.every_steps": 0,
            "checkpoint.weights_every_steps": 0,
            "profile.first": 0,
            "log.wandb": "false",
        }
        command = [sys.executable, *script, *options, *(f"--{key}={value}" for key, value in changed.items())]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
        if done.returncode:
            complaint = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
            raise UserError(f"--measure: the trainer ended with status {done.returncode}: {complaint}")
        return pace_of(RunFolder(Path(root) / NAME))


def pace_of(folder: RunFolder) -> Pace:
    """The median step, and what validations, a save and the start took."""
    records = list(read_metrics(folder.metrics))
    table = MetricsTable(folder.metrics)
    table.update()
    seconds = [float(record["step_seconds"]) for record in records if "step_seconds" in record]
    starts = [life.starting_seconds for life in table.lives if life.starting_seconds is not None]
    return Pace(
        step=statistics.median(seconds[FIRST:] or seconds),
        validation=_median(records, "val_seconds"),
        save=_median(records, "save_blocked_seconds"),
        start=starts[0] if starts else 0.0,
        measured=True,
    )


def _median(records: list[dict[str, Any]], key: str) -> float:
    return statistics.median([float(record[key]) for record in records if record.get(key) is not None] or [0.0])
