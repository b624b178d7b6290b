"""The runs that `slurm/submit.py` is asked for: one configuration, a sweep of it, or a list of runs in a file."""

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.liveness import OVER
from common.paths import expand_path
from common.run_files import unreadable
from common.run_folder import RunFolder
from slurm.controller import job_record
from slurm.history import read_starts
from train.settings.command_line import find_config, read_config

ENDED = OVER - {"PENDING", "PREEMPTED", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT"}  # Slurm starts it no more


@dataclass(frozen=True)
class Job:
    """One run to submit."""

    name: str
    folder: Path
    options: list[str]

    @property
    def submitit(self) -> Path:
        """Where submitit keeps the jobs of all runs beside this one."""
        return self.folder.parent / "submitit"


def plan_jobs(config: str, options: list[str], sweeps: list[str]) -> list[Job]:
    """The runs of a configuration, one for each combination of the sweeps' values.

    Raises UserError for options that no trainer would accept.
    """
    jobs = []
    for values in itertools.product(*map(_sweep_values, sweeps)):
        file = expand_path(find_config(config)).absolute()
        chosen = [f"--config={file}", *options, *(f"--{key}={value}" for key, value in values)]
        name = str(read_config(chosen)[0].run.name)
        for key, value in values:
            name += f"-{key.split('.')[-1]}-{value}"
        jobs.append(_job([*chosen, f"--run.name={name}"]))
    if twice := _given_twice(jobs):
        raise UserError(f"--sweep has {twice[0]} twice, and two jobs can't train one run: give each value once")
    return jobs


def listed_jobs(path: Path, options: list[str]) -> list[Job]:
    """The runs of a file: on each line a JSON list of train/pretrain.py's options, to which `options` are added.

    Raises UserError for a line that is none, and for options that no trainer would accept.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="strict").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(unreadable(path, error) if isinstance(error, OSError) else f"{path} is not UTF-8") from None
    jobs = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            jobs.append(_job([*_options_of(line, f"{path}, line {number}"), *options]))
    if twice := _given_twice(jobs):
        raise UserError(f"{path} has {twice[0]} twice, and two jobs can't train one run: give each another run.name")
    if not jobs:
        raise UserError(f"{path} is empty: give a JSON list of train/pretrain.py's options on each line")
    return jobs


def leave_out_queued(jobs: Sequence[Job]) -> tuple[list[Job], list[str]]:
    """The jobs to submit, and a line for each run that is done or whose last job Slurm has not ended yet."""
    left, lines = [], []
    for job in jobs:
        if why := _why_not(RunFolder(job.folder)):
            lines.append(f"{job.name} is not submitted: {why}")
        else:
            left.append(job)
    return left, lines


def _why_not(folder: RunFolder) -> str:
    if (folder.read_state() or {}).get("status") == "done":
        return "it is done"
    starts = read_starts(folder)
    if not starts or not (job_id := starts[-1]["job_id"]):
        return ""
    state = job_record(job_id).get("JobState", "")
    return f"its job {job_id} is {state}" if state and state not in ENDED else ""


def _options_of(line: str, where: str) -> list[str]:
    try:
        options = json.loads(line)
    except ValueError:
        options = None
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise UserError(f'{where}: give a JSON list of options, such as ["--config=FILE", "--run.name=NAME"]')
    return options


def _job(options: list[str]) -> Job:
    config, _ = read_config(options)
    name = str(config.run.name)
    return Job(name, RunFolder.find(config.run.root, name).path, options)


def _given_twice(jobs: Sequence[Job]) -> list[str]:
    return sorted(name for name, count in Counter(job.name for job in jobs).items() if count > 1)


def _sweep_values(sweep: str) -> list[tuple[str, str]]:
    key, _, values = sweep.partition("=")
    if not key or not values:
        raise UserError(f"--sweep {sweep}: give KEY=VALUE,VALUE,… such as optim.lr=3e-4,6e-4")
    return [(key, value) for value in values.split(",")]
