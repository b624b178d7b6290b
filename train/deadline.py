"""When a run has to be gone, and how long before that it must begin to leave."""

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from common.errors import UserError
from common.periodic import Periodic
from train.run_config import parse_time

SAFETY = 1.5  # the next step, validation or save may take this many times as long as the longest so far
READ_SECONDS = 60.0  # from one question to Slurm to the next: limits get extended
ANSWER_SECONDS = 10.0
ORPHAN_SECONDS = 60.0  # a worker without a launcher has this and twice the margin


@dataclass
class StopMargin:
    """How long it takes from a step boundary to the end of the process, by what has been measured so far."""

    at_least_seconds: float
    _longest: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timing(self, part: str) -> Iterator[None]:
        """Measure one part of what may lie between a boundary and the end of the process."""
        started = time.monotonic()
        yield
        self.saw(part, time.monotonic() - started)

    def saw(self, part: str, seconds: float) -> None:
        """Take note of how long a part took."""
        self._longest[part] = max(seconds, self._longest.get(part, 0.0))

    def seconds(self) -> float:
        """One more of everything at its slowest, and some: what is due next, a save under way, and the last save."""
        longest = sum(self._longest.values()) + self._longest.get("save", 0.0)
        return max(self.at_least_seconds, SAFETY * longest)

    def seconds_to_leave(self) -> float:
        """How long a worker whose launcher is gone may stay."""
        return ORPHAN_SECONDS + 2 * self.seconds()


class Deadline:
    """A time by which the run must have ended, or none."""

    def __init__(self, margin: StopMargin, end: float | None = None) -> None:
        self.margin = margin
        self.end = end  # seconds since the epoch

    def is_near(self) -> bool:
        """Whether another step could be one too many."""
        return self.end is not None and time.time() + self.margin.seconds() >= self.end

    def close(self) -> None:
        pass


class SlurmDeadline(Deadline):
    """The end of this Slurm job, asked for again and again by a thread: no step waits for an answer."""

    def __init__(self, margin: StopMargin, job_id: str, read_seconds: float) -> None:
        super().__init__(margin)
        self._job_id = job_id
        self._reader = Periodic("deadline", read_seconds, self._read, at_once=True)

    def close(self) -> None:
        self._reader.stop()

    def _read(self) -> None:
        with contextlib.suppress(UserError):  # the last answer holds until there is another
            self.end = slurm_end(self._job_id)


def check_deadline(choice: str | None) -> None:
    """Raises UserError where `run.deadline` is slurm and there is no job, or no answer."""
    if choice == "slurm":
        if "SLURM_JOB_ID" not in os.environ:
            raise UserError("run.deadline is slurm, but this is no Slurm job (no SLURM_JOB_ID): use auto or a time")
        slurm_end(os.environ["SLURM_JOB_ID"])


def open_deadline(choice: str | None, margin: StopMargin) -> Deadline:
    """The deadline that a (checked) `run.deadline` names: a time, slurm, auto or none."""
    job_id = os.environ.get("SLURM_JOB_ID")
    if choice in ("slurm", "auto") and job_id is not None:
        return SlurmDeadline(margin, job_id, READ_SECONDS)
    return Deadline(margin, None if choice in ("slurm", "auto", None) else parse_time(choice))


def slurm_end(job_id: str) -> float | None:
    """When a job ends, in seconds since the epoch; None for one without a limit. Raises UserError without an answer."""
    command = ["scontrol", "--oneliner", "show", "job", job_id]
    environment = os.environ | {"SLURM_TIME_FORMAT": "standard"}
    try:
        answer = subprocess.run(  # whose names and comments are anybody's bytes
            command, capture_output=True, text=True, errors="replace", timeout=ANSWER_SECONDS, env=environment
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"run.deadline: scontrol does not answer ({error})") from None
    ends = [word.removeprefix("EndTime=") for word in answer.stdout.split() if word.startswith("EndTime=")]
    if answer.returncode or not ends:
        raise UserError(f"run.deadline: scontrol knows no end of job {job_id} ({answer.stderr})")
    try:
        return parse_time(ends[0])
    except ValueError:  # Unknown, None
        return None
