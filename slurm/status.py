"""The status of runs on the cluster: state, step, ETA, speed, restarts, and how the allocated time was used.

    python slurm/status.py              every run in runs/
    python slurm/status.py runs/a runs/b --json status.json

Goodput is the time of steps that count over the time the nodes were allocated. The second table has the rest: waiting
for data, validations, saves, starts, steps that were lost and done again, hangs.
"""

import itertools
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.early_end import end_in_one_line

    sys.excepthook = end_in_one_line

from common.batch_stages import BatchStages
from common.checkpoint_files import seconds_since_save
from common.command_line import CommandParser
from common.errors import UserError, exit_on_user_error
from common.liveness import Verdict, look_at
from common.metric_fields import is_step
from common.metrics_file import holding, read_records
from common.metrics_table import MetricsTable
from common.plain_text import one_line
from common.progress import format_count, format_duration
from common.publish import file_to_write, write_json_output
from common.run_files import leniently, read_configuration, unreadable
from common.run_folder import RunFolder
from common.time_spent import TimeSpent, labels_of, time_spent
from slurm.controller import job_record
from slurm.history import nodes_left_out, read_starts

RECENT_STEPS = 20  # the speed is the median of these


@dataclass(frozen=True)
class RunStatus:
    """One run. None stands for what can't be known."""

    run: str
    status: str  # the status that the run recorded
    alive: Verdict  # whether it makes progress, as far as can be seen from here
    job_id: str | None
    slurm_state: str | None
    step: int
    max_steps: int | None
    tokens_per_second: float | None
    eta_seconds: float | None
    restarts: int
    allocated_seconds: float
    goodput: float | None
    lost_steps: int
    left_out: list[str]  # nodes that the job's latest requeue has left out
    skips: int  # steps that were skipped as spikes
    rollbacks: int
    suspect: str  # the rank that it waits for
    checkpoint_age_seconds: float | None  # since its newest one was published
    spent: TimeSpent | None  # where its time went, over all starts
    reason: str  # the run's own
    why: str  # of the verdict

    def as_json(self) -> dict[str, Any]:
        found = asdict(self)
        del found["spent"]
        return found | {"seconds": None if self.spent is None else self.spent.as_json()}

    @property
    def word(self) -> str:
        """For people: the status that the run recorded at its end, also before its first start, else the verdict."""
        return self.status if self.alive == "ended" or self.status in ("submitted", "unreadable") else self.alive


def read_status(folder: RunFolder, now: float) -> RunStatus:
    """Read a run's folder, and ask Slurm about its last job.

    What can't be read is reported in the run's own line: the other runs are reported all the same.
    """
    complaints: list[str] = []
    state = leniently(lambda: folder.read_state() or {}, complaints) or {}
    lines = leniently(lambda: read_starts(folder), complaints) or []
    records = leniently(lambda: _read_records(folder), complaints) or []
    config = leniently(lambda: read_configuration(folder), complaints) or {}
    max_steps, stages = _max_steps(config), BatchStages.of_config(config)
    if complaints:
        state |= {"status": "unreadable", "trouble": "; ".join(complaints)}
    job_id = lines[-1]["job_id"] if lines else state.get("job_id")
    job = job_record(str(job_id)) if job_id else {}
    slurm_state = job.get("JobState")
    trained = [record for record in records if record.get("step_seconds") is not None]
    kept = [record for record in holding(records) if record.get("step_seconds") is not None]
    recent = sorted(record["step_seconds"] for record in kept[-RECENT_STEPS:])
    rates = sorted(rate for record in kept[-RECENT_STEPS:] if (rate := record.get("tokens_per_second")) is not None)
    step = max([record["step"] for record in kept], default=state.get("step", 0))
    alive = look_at(folder, now, job_id=str(job_id) if job_id else None, job_state=slurm_state)
    left: float | None = max_steps - step if max_steps is not None and alive.is_progressing else None
    if left and left > 0 and stages is not None and kept and type(kept[-1].get("tokens")) is int:
        left = stages.steps_left(int(left), kept[-1]["tokens"])  # a batch that grows takes longer
    allocated = allocated_seconds(lines, trained, now if slurm_state == "RUNNING" else None)
    metrics = MetricsTable(folder.metrics)
    metrics.add(records)  # as they are: reading them again takes as long
    spent = time_spent(metrics) if metrics.lives else None
    return RunStatus(
        run=folder.path.name,
        status=str(state.get("status", "submitted" if lines else "unknown")),
        alive=alive.verdict,
        job_id=str(job_id) if job_id else None,
        slurm_state=slurm_state,
        step=step,
        max_steps=max_steps,
        tokens_per_second=rates[len(rates) // 2] if rates else None,
        eta_seconds=left * recent[len(recent) // 2] if recent and left is not None else None,
        restarts=max(0, sum(line["kind"] == "start" for line in lines) - 1),
        allocated_seconds=allocated,
        goodput=spent.compute / allocated if spent is not None and allocated and kept else None,
        lost_steps=len(trained) - len(kept),
        left_out=nodes_left_out(lines, str(job_id)),
        skips=last_count(records, "skips"),
        rollbacks=last_count(records, "rollback"),
        suspect=alive.suspect,
        checkpoint_age_seconds=seconds_since_save(folder.checkpoints, now),
        spent=spent,
        reason=str(state.get("trouble") or state.get("reason", "")),
        why=alive.why,
    )


def last_count(records: list[dict[str, Any]], key: str) -> int:
    """The newest value of a count that the run keeps itself, in whatever record has it; 0 for none."""
    return next((record[key] for record in reversed(records) if record.get(key)), 0)


def allocated_seconds(lines: list[dict[str, Any]], trained: list[dict[str, Any]], now: float | None) -> float:
    """For how many seconds the run's jobs have had their nodes.

    Args:
        lines: slurm.jsonl. A start that Slurm killed has no end there: its last step is taken as its end.
        trained: the records of all steps, those that were done again included.
        now: if the last job is still running.
    """
    total = 0.0
    starts = [position for position, line in enumerate(lines) if line["kind"] == "start"]
    for position, following in itertools.zip_longest(starts, starts[1:]):
        begun = lines[position]["time"]
        until = lines[following]["time"] if following is not None else float("inf")
        ends = [line["time"] for line in lines[position:following] if line["kind"] == "end"]
        if not ends and following is None and now is not None:
            ends = [now]
        steps = [time for record in trained if (time := record.get("time")) is not None and begun <= time < until]
        total += max(0.0, max([*ends, *steps[-1:]], default=begun) - begun)
    return total


def _read_records(folder: RunFolder) -> list[dict[str, Any]]:
    try:
        return read_records(folder.metrics)
    except OSError as error:
        raise UserError(unreadable(folder.metrics, error)) from None


def _max_steps(config: dict[str, Any]) -> int | None:
    section = config.get("run")
    steps = section.get("max_steps") if isinstance(section, dict) else None
    return steps if is_step(steps) else None


def table(statuses: list[RunStatus]) -> str:
    """The runs as text, a line each."""
    head = ["run", "status", "job", "Slurm", "step", "ETA", "tokens/s", "restarts", "goodput", "lost steps", "skips"]
    return _aligned([[*head, "saved", "suspect", "reason"], *map(_cells, statuses)])


def time_table(statuses: list[RunStatus]) -> str:
    """Where the runs' time went, a line each; "" where no run has any."""
    runs = [(status.run, status.spent) for status in statuses if status.spent is not None and status.spent.total > 0]
    labels = labels_of(spent for _, spent in runs)
    shown = [part for part in labels if any(spent.parts.get(part, 0.0) > 0 for _, spent in runs)]
    rows = [
        [
            one_line(run),
            format_duration(spent.total),
            *(f"{spent.parts.get(part, 0.0) / spent.total:.1%}" for part in shown),
        ]
        for run, spent in runs
    ]
    return _aligned([["run", "time", *(one_line(labels[part]) for part in shown)], *rows]) if rows else ""


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _cells(s: RunStatus) -> list[str]:
    cells = [
        s.run,
        s.word,
        s.job_id or "-",
        s.slurm_state or "-",
        f"{s.step}/{s.max_steps}" if s.max_steps is not None else str(s.step),
        "-" if s.eta_seconds is None else format_duration(s.eta_seconds),
        "-" if s.tokens_per_second is None else format_count(s.tokens_per_second),
        str(s.restarts),
        "-" if s.goodput is None else f"{s.goodput:.0%}",
        str(s.lost_steps),
        f"{s.skips}, {s.rollbacks} roll-back{'s' if s.rollbacks > 1 else ''}" if s.rollbacks else str(s.skips),
        "-" if s.checkpoint_age_seconds is None else f"{format_duration(s.checkpoint_age_seconds)} ago",
        s.suspect.partition(",")[0] or "-",
        (s.why if s.word == s.alive else s.reason) + (f" (without {','.join(s.left_out)})" if s.left_out else ""),
    ]
    return list(map(one_line, cells))


def find_runs(paths: list[Path], root: Path) -> list[RunFolder]:
    """The runs to report. Raises UserError where there are none."""
    if not paths and os.path.isdir(root):
        try:
            paths = sorted(path for path in root.iterdir() if _is_run(path))
        except OSError as error:
            raise UserError(f"{root} can't be read ({error.strerror}): give another --root") from None
    if not paths:
        raise UserError(f"no runs in {root}: give folders of runs, or --root")
    for path in paths:
        if not os.path.isdir(path):
            raise UserError(f"{path} is not a run's folder: give the folder of one, such as runs/demo")
    return [RunFolder(path) for path in paths]


def _is_run(path: Path) -> bool:
    """Whether this looks like a run's folder; a folder that may not be read may be one."""
    if not os.path.isdir(path):
        return False
    there = any(os.path.lexists(path / name) for name in ("state", "slurm.jsonl"))
    return there or not os.access(path, os.X_OK)


def main() -> int:
    parser = CommandParser(__doc__)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folders of runs; default: all below --root")
    parser.add_argument("--root", type=Path, default=Path("runs"), help="where runs are; default runs")
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="also write the figures to this file")
    a = parser.parse_args()
    statuses = [read_status(folder, time.time()) for folder in find_runs(a.runs, a.root)]
    print(table(statuses))
    if times := time_table(statuses):
        print(f"\nwhere the time went, over all starts:\n{times}")
    if a.json:
        write_json_output(a.json, [status.as_json() for status in statuses])
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
