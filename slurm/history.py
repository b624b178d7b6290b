"""`slurm.jsonl` in a run's folder: every start and end of the run on the cluster, one JSON object a line.

The starts show how often a job came back without progress, whoever requeued it: this project's `requeue.py`, or
Slurm by itself after a node's failure.
"""

import os
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.checkpoint_files import list_checkpoints
from common.environment import whole_number
from common.errors import UserError
from common.metric_fields import fits
from common.metrics_file import MetricsFile, read_json_lines, read_records
from common.run_files import unreadable
from common.run_folder import RunFolder, restart_count

FRUITLESS_LIMIT = 3  # starts in a row from the same checkpoint, after which the job is not started again


def fruitless_limit() -> int:
    """After how many such starts to give up: $LONGHAUL_FRUITLESS_STARTS. Raises UserError where that is not a count."""
    return whole_number("LONGHAUL_FRUITLESS_STARTS", FRUITLESS_LIMIT, lowest=1)


@dataclass(frozen=True)
class StartId:
    """One start of one job: Slurm keeps the job's id over requeues and counts its restarts. Without Slurm: ""."""

    job_id: str
    restart_count: int

    @classmethod
    def of_environment(cls) -> "StartId":
        return cls(os.environ.get("SLURM_JOB_ID", ""), restart_count())

    def __str__(self) -> str:
        return f"{self.job_id or 'local'}.{self.restart_count}"

    def names(self, record: dict[str, Any]) -> bool:
        """Whether a record (`state`, or a line of slurm.jsonl) is of this start."""
        return (record.get("job_id") or "") == self.job_id and record.get("restart_count") == self.restart_count


def starts_file(folder: RunFolder) -> Path:
    return folder.path / "slurm.jsonl"


def read_starts(folder: RunFolder) -> list[dict[str, Any]]:
    """The lines of slurm.jsonl; torn and foreign ones are skipped. Raises UserError where it can't be read."""
    path = starts_file(folder)
    try:
        lines = read_json_lines(path)
    except OSError as error:
        raise UserError(unreadable(path, error)) from None
    return [line for line in lines if _is_ours(line)]


def _is_ours(line: dict[str, Any]) -> bool:
    texts = isinstance(line.get("kind"), str) and isinstance(line.get("job_id"), str)
    return texts and fits("time", line.get("time"))


def append_start(folder: RunFolder, start: StartId, nodes: list[str], launch: str) -> None:
    """Record that a job starts or resumes."""
    _append(folder, start, {"kind": "start", "from_step": saved_step(folder), "nodes": nodes, "launch": launch})


def append_end(
    folder: RunFolder, start: StartId, decision: str, reason: str, *, pre_empted: bool, left_out: Sequence[str] = ()
) -> None:
    """Record how a start ended. What Slurm kills has no such line.

    Args: left_out: nodes that Slurm shall exclude from the job's next start.
    """
    values = {"kind": "end", "decision": decision, "reason": reason, "pre_empted": pre_empted}
    _append(folder, start, values | ({"left_out": list(left_out)} if left_out else {}))


def nodes_left_out(records: list[dict[str, Any]], job_id: str) -> list[str]:
    """The nodes that the job's latest requeue has left out."""
    ends = [record for record in records if record["kind"] == "end" and record["job_id"] == job_id]
    found = ends[-1].get("left_out") if ends else None
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


def append_finding(
    folder: RunFolder, start: StartId, node: str, what: str, detail: str, *, at: float | None = None
) -> None:
    """Record that something is wrong with a node (`slurm/findings.py`).

    Args: start: in which that was seen. at: when, in seconds since the epoch; None: now.
    """
    values = {"kind": "finding", "node": node, "what": what, "detail": detail}
    _append(folder, start, values | ({} if at is None else {"time": at}))


def append_submission(folder: RunFolder, job_id: str) -> None:
    """Record that a job was submitted for the run."""
    _append(folder, StartId(job_id, 0), {"kind": "submission"})


def saved_step(folder: RunFolder) -> int:
    """The step of the newest checkpoint; 0 where there is none."""
    checkpoints = list_checkpoints(folder.checkpoints)
    return checkpoints[0][0] if checkpoints else 0


def fruitless_starts(records: list[dict[str, Any]], start: StartId, step: int) -> int:
    """How many of the job's latest starts in a row started at `step`, where the run still is.

    A pre-emption before the first save resets the count; a time limit that is too short does not.
    Another job's starts don't count: a new submission means that somebody has looked at what is wrong.
    """
    count = 0
    mine = [record for record in records if record.get("job_id") == start.job_id]
    for record in reversed(mine):
        if record["kind"] == "end" and record.get("pre_empted"):
            break
        if record["kind"] == "start":
            if record.get("from_step") != step:
                break
            count += 1
    return count


def steps_trained(folder: RunFolder, start: StartId) -> int:
    """Training steps that this start of the job has recorded. Raises UserError where its records can't be read."""
    begun = [record["time"] for record in read_starts(folder) if record["kind"] == "start" and start.names(record)]
    if not begun:
        return 0
    try:
        records = read_records(folder.metrics)
    except OSError as error:
        raise UserError(unreadable(folder.metrics, error)) from None
    return sum(1 for record in records if "step_seconds" in record and (record.get("time") or 0.0) >= begun[-1])


def _append(folder: RunFolder, start: StartId, values: dict[str, Any]) -> None:
    folder.path.mkdir(parents=True, exist_ok=True)
    record = {"time": time.time(), "job_id": start.job_id, "restart_count": start.restart_count, **values}
    with closing(MetricsFile(starts_file(folder))) as file:  # which ends a line that was torn, and syncs this one
        file.append(record)
