"""When a run must have exited, and how long before that it must start to stop."""

import os
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from common.errors import UserError
from common.periodic import Periodic
from train.settings.sections import parse_time

SAFETY = 1.5  # the next step, validation or save may take this many times as long as the longest so far
READ_SECONDS = 60.0  # between questions to Slurm: limits get extended
ANSWER_SECONDS = 10.0
NO_TIME = 1e11  # seconds since the epoch that no job will reach
END_VARIABLE = "SLURM_JOB_END_TIME"
NO_LIMIT = ("Unknown", "None", "N/A")  # what scontrol gives as the end of a job without a time limit
ORPHAN_SECONDS = 60.0  # a worker without a launcher has this and twice the margin


@dataclass
class StopMargin:
    """How long it takes from a step boundary to the end of the process, by measurements so far."""

    at_least_seconds: float
    _longest: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timing(self, part: str) -> Iterator[None]:
        """Measure one part of what may come between a boundary and the end of the process."""
        started = time.monotonic()
        yield
        self.saw(part, time.monotonic() - started)

    def saw(self, part: str, seconds: float) -> None:
        """Record how long a part took."""
        self._longest[part] = max(seconds, self._longest.get(part, 0.0))

    def seconds(self) -> float:
        """One more of everything at its slowest, and a reserve: what is due next, a running save, and the last save."""
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
        self.report: Callable[[str], None] | None = None  # where log lines go, once there is a log
        self._lines: deque[str] = deque()

    def is_near(self) -> bool:
        """Whether another step could be one too many. Logs news about the end."""
        while self.report is not None and self._lines:
            self.report(self._lines.popleft())
        return self.end is not None and time.time() + self.margin.seconds() >= self.end

    def close(self) -> None:
        pass


class SlurmDeadline(Deadline):
    """The end of this Slurm job, asked for repeatedly by a thread: no step waits for an answer."""

    def __init__(self, margin: StopMargin, job_id: str, read_seconds: float) -> None:
        super().__init__(margin)
        self._job_id = job_id
        self._asked = False
        self._reader = Periodic("deadline", read_seconds, self._read, at_once=True)

    def close(self) -> None:
        self._reader.stop()

    def _read(self) -> None:
        try:
            self.end = slurm_end(self._job_id)
        except UserError as error:  # the last answer holds until there is another
            if not self._asked:
                self.end = end_by_environment()
                self._lines.append(_without_answer(error, self.end))
        self._asked = True


def check_deadline(choice: str | None) -> None:
    """Raises UserError where `run.deadline` is slurm and there is no job, or its end is unknown."""
    if choice == "slurm":
        if "SLURM_JOB_ID" not in os.environ:
            raise UserError("run.deadline is slurm, but this is not a Slurm job (no SLURM_JOB_ID): use auto or a time")
        if end_by_environment() is None:
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
    environment = os.environ | {"SLURM_TIME_FORMAT": "%s"}  # strftime's seconds since the epoch: no time comes twice
    try:
        answer = subprocess.run(  # whose names and comments are anybody's bytes
            command,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=ANSWER_SECONDS,
            env=environment,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"run.deadline: scontrol does not answer ({error})") from None
    ends = [word.removeprefix("EndTime=") for word in answer.stdout.split() if word.startswith("EndTime=")]
    if answer.returncode or not ends:
        raise UserError(f"run.deadline: scontrol gives no end of job {job_id} ({answer.stderr})")
    if ends[0] in NO_LIMIT:
        return None
    try:
        # a version that does not know the format answers in local time; of an hour that comes twice, the first
        return float(ends[0]) if ends[0].isdecimal() else parse_time(ends[0])
    except ValueError:
        raise UserError(
            f"run.deadline: scontrol gives {ends[0]} as the end of job {job_id}, which is not a time"
        ) from None


def end_by_environment() -> float | None:
    """$SLURM_JOB_END_TIME, seconds since the epoch; None where it is not set, or not this job's.

    Slurm sets it since 23.02, and slurm/job.sh for older versions. A container may have it but no scontrol. One that
    has gone by is left over from another job.
    """
    text = os.environ.get(END_VARIABLE, "")
    return float(text) if text.isdecimal() and time.time() < float(text) < NO_TIME else None


def _without_answer(error: UserError, end: float | None) -> str:
    """The line for a run that could not ask for its job's end."""
    if end is not None:
        when = time.strftime("%Y-%m-%d %H:%M:%S%z", time.localtime(end))
        return f"{error}: the job's end is {END_VARIABLE}'s, {when}; an extension of the limit will not be noticed"
    return (
        f"WARNING: {error}, and {END_VARIABLE} holds no future time: the run does not know when its job ends. "
        "Give run.deadline a time, or let Slurm send a signal (sbatch --signal=B:USR1@300)"
    )
