"""Whether a run makes progress, as far as its folder and this machine show: the one judgement that all views share.

What counts is progress (records, another step or phase), not a beat: a rank's heartbeat comes from a thread of its own,
which keeps beating when training hangs. What can't be read is unknown, never guilty.
"""

from dataclasses import dataclass
from typing import Any, Literal

from common.curves import SECONDS
from common.errors import UserError
from common.metric_fields import TIME
from common.metrics_file import last_json_lines, record_kind
from common.processes import ProcessIdentity
from common.progress import format_duration
from common.rewritten_file import read_record
from common.run_folder import RunFolder

Verdict = Literal["running", "silent", "gone", "unknown", "ended"]
Process = Literal["alive", "gone", "unknown"]

ENDED = ("done", "failed", "preempted")
SILENT_SECONDS = 120.0  # without progress after which a run counts as silent, unless its pieces of work take long
SILENT_STEPS = 20.0  # times a step's usual time
SILENT_PIECES = 3.0  # times the longest of its latest validations and the like
SIGN_SECONDS = 60.0  # after its last sign of life, when a process that can't be seen from here may be gone
BESIDE_TRAINING = "save_seconds"  # how long a save takes, which may run beside it
OVER = {  # Slurm's states of a job without processes
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PENDING",
    "PREEMPTED",
    "REQUEUED",
    "REQUEUE_HOLD",
    "REVOKED",
    "SPECIAL_EXIT",
    "TIMEOUT",
}


@dataclass(frozen=True)
class Signs:
    """What a run's folder shows at one moment. Times in seconds since the epoch, by the trainer's clock."""

    status: str | None  # of `state`; None where there is none, or it can't be read
    reason: str
    trouble: str  # what it can't write at present
    suspect: str  # the rank that it waits for
    job_id: str | None
    process: Process  # of the first rank, which holds the lock, as far as this machine can see
    pid: int | None
    host: str | None
    phase: str | None  # that the first rank is in, such as "validating"
    progress: float | None  # the newest record, or change of step or phase
    sign: float | None  # the newest sign of life of any kind
    patience_seconds: float  # without progress that are nothing unusual for this run


@dataclass(frozen=True)
class Liveness:
    """The judgement: the verdict, the reason in a few words, and the status that the run recorded."""

    verdict: Verdict
    why: str
    status: str
    trouble: str = ""  # what it can't write at present; in `why`, too
    suspect: str = ""  # the rank that it waits for at present; in `why`, too

    @property
    def word(self) -> str:
        """The one word for people: how the run ended, or the verdict."""
        return self.status if self.verdict == "ended" else self.verdict

    @property
    def is_progressing(self) -> bool:
        """Whether there is a point in an ETA."""
        return self.verdict == "running"

    def __str__(self) -> str:
        return f"{self.word}: {self.why}" if self.why else self.word


def look_at(folder: RunFolder, now: float, *, job_id: str | None = None, job_state: str | None = None) -> Liveness:
    """`read_signs` and `judge`."""
    return judge(read_signs(folder), now, job_id=job_id, job_state=job_state)


def judge(signs: Signs, now: float, *, job_id: str | None = None, job_state: str | None = None) -> Liveness:
    """What a run's signs mean.

    Args:
        now: seconds since the epoch, by this machine's clock.
        job_id, job_state: Slurm's state of a job. It counts if that is the job that `state` names.
    """
    verdict, why = _judge(signs, now, job_state if job_id is not None and job_id == signs.job_id else None)
    if signs.trouble and verdict != "ended":
        why = "; ".join(filter(None, (why, f"NOT SAVED: {signs.trouble}")))
    suspect = signs.suspect if verdict == "silent" else ""
    return Liveness(verdict, why, signs.status or "unknown", signs.trouble, suspect)


def _judge(signs: Signs, now: float, job_state: str | None) -> tuple[Verdict, str]:
    if signs.status in ENDED:
        return "ended", signs.reason
    where = f" on {signs.host}" if signs.host else ""
    if signs.process == "gone":
        return "gone", f"its process {signs.pid}{where} is gone"
    if job_state in OVER:
        return "gone", f"its job {signs.job_id} is {job_state}"
    if signs.status is None and signs.process == "unknown" and signs.sign is None:
        return "unknown", "no readable state"
    now = max(now, signs.sign or now)  # the trainer's clock may be ahead
    doing = signs.phase or signs.reason
    if signs.suspect:
        return "silent", f"waits for {signs.suspect}"
    if signs.progress is not None and now - signs.progress <= signs.patience_seconds:
        return "running", doing
    if signs.process == "alive" or (signs.sign is not None and now - signs.sign <= SIGN_SECONDS):
        since = f" for {format_duration(now - signs.progress)}" if signs.progress is not None else " yet"
        return "silent", f"no progress{since}" + (f" ({doing})" if doing else "")
    since = f" for {format_duration(now - signs.sign)}" if signs.sign is not None else ""
    return "unknown", f"no sign of life{since}, and its process{where} can't be seen from here"


def read_signs(folder: RunFolder) -> Signs:
    """Read a run's folder as it is. Files that are missing, torn or of another kind are passed over."""
    state = _read_state(folder)
    owner, beat = read_record(folder.lock) or {}, read_record(folder.rank_file(0)) or {}
    holder, beating = _identity(owner), _identity(beat)
    if holder is not None and beating != holder:  # an earlier start's
        beat = {}
    identity = holder or beating
    records = last_json_lines(folder.metrics)
    recorded = [time for record in records[::-1] if (time := _number(record, "time")) is not None][:1]
    progress = [*recorded, *_numbers(beat, "progressed")]
    signs = [*progress, *_numbers(beat, "time"), *_numbers(owner, "renewed")]
    return Signs(
        status=_text(state, "status"),
        reason=_text(state, "reason") or "",
        trouble=_text(state, "trouble") or "",
        suspect=_text(state, "suspect") or "",
        job_id=_text(state, "job_id"),
        process="unknown" if identity is None else _process(identity),
        pid=identity.pid if identity else None,
        host=identity.host if identity else _text(state, "host"),
        phase=_text(beat, "phase"),
        progress=max(progress, default=None),
        sign=max(signs, default=None),
        patience_seconds=_patience(records),
    )


def _process(identity: ProcessIdentity) -> Process:
    if not identity.is_here():
        return "unknown"
    return "gone" if identity.is_gone() else "alive"


def _patience(records: list[dict[str, Any]]) -> float:
    """Seconds that a run may go without progress, judged by what its latest pieces of work took."""
    steps = [s for record in records if record_kind(record) == "train" for s in _numbers(record, "step_seconds")]
    pieces = [s for record in records if record_kind(record) != "train" for s in _pieces(record)]
    usual = sum(steps) / len(steps) if steps else 0.0
    return max(SILENT_SECONDS, SILENT_STEPS * usual, SILENT_PIECES * max(pieces, default=0.0))


def _pieces(record: dict[str, Any]) -> list[float]:
    """How long work took that training waited for. By the keys' ends, as what describes them may lie far before."""
    keys = [key for key in record if key.endswith(SECONDS) and key != BESIDE_TRAINING]
    return [seconds for key in keys for seconds in _numbers(record, key)]


def _read_state(folder: RunFolder) -> dict[str, Any]:
    try:
        return folder.read_state() or {}
    except (OSError, UserError):
        return {}


def _identity(record: dict[str, Any]) -> ProcessIdentity | None:
    """The process that a record names; None for a record that does not name one in our format."""
    try:
        return ProcessIdentity.from_record(record)
    except KeyError:
        return None


def _number(record: dict[str, Any], key: str) -> float | None:
    value: Any = record.get(key)
    return float(value) if TIME.has(value) else None


def _numbers(record: dict[str, Any], key: str) -> list[float]:
    """The number under a key, or none."""
    value = _number(record, key)
    return [] if value is None else [value]


def _text(record: dict[str, Any], key: str) -> str | None:
    value = record.get(key)
    return value if isinstance(value, str) else None
