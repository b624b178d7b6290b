"""A few real steps of a run on the machine at hand, instead of an estimate of its speed."""

import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.metrics_file import read_metrics
from common.paths import PROJECT
from common.run_folder import RunFolder
from train.estimates.durations import Pace
from train.estimates.machines import Machine
from train.settings.sections import Config

FIRST = 2  # steps that are not counted: they take memory that later ones find
NAME = "measured"


def measure(
    config: Config, options: list[str], machine: Machine, steps: int, *, command: str = "train/pretrain.py"
) -> Pace:
    """Train so many steps in a folder that is deleted afterwards, with a validation before and after, and a save.

    Args:
        options: as the run has them. command: the trainer that takes them.

    Raises UserError with the trainer's last line where it fails.
    """
    script = [str(PROJECT / command)]
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
        line = [sys.executable, *script, *options, *(f"--{key}={value}" for key, value in changed.items())]
        started = time.monotonic()
        done = subprocess.run(line, capture_output=True, encoding="utf-8", errors="replace", check=False)
        if done.returncode:
            complaint = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
            raise UserError(f"--measure: the trainer ended with status {done.returncode}: {complaint}")
        return pace_of(RunFolder(Path(root) / NAME), time.monotonic() - started)


def pace_of(folder: RunFolder, seconds_in_all: float) -> Pace:
    """The median step, what validations and a save took, and as the start all else: processes, compilation, the end.

    Args:
        seconds_in_all: of the command.
    """
    records = list(read_metrics(folder.metrics))
    steps = [record for record in records if record.get("step_seconds") is not None]
    # from one record to the next: with what a step does beside learning
    seconds = [float(after["time"] - before["time"]) for before, after in itertools.pairwise(steps[FIRST - 1 :])]
    work = ("step_seconds", "val_seconds", "save_blocked_seconds", "held_out_seconds", "held_back_seconds")
    worked = sum(float(record[key]) for record in records for key in work if record.get(key) is not None)
    return Pace(
        step=statistics.median(seconds or [float(steps[-1]["step_seconds"])]),
        validation=max(_median(records, key) for key in ("val_seconds", "held_out_seconds", "held_back_seconds")),
        save=_median(records, "save_blocked_seconds"),
        start=max(0.0, seconds_in_all - worked),
        measured=True,
        sampling=_median(records, "rollout_seconds") or None,
    )


def _median(records: list[dict[str, Any]], key: str) -> float:
    return statistics.median([float(record[key]) for record in records if record.get(key) is not None] or [0.0])
