"""How far a study is, while it runs: on a terminal one line kept up to date, elsewhere a line every 10 seconds."""

import sys
import time
from dataclasses import dataclass, field

from common.metrics_file import last_json_lines, record_kind
from common.plain_text import one_line
from common.progress import LINE_SECONDS, format_duration
from eval.comparison.measured_runs import MeasuredRun
from train.studies.planning import PlannedRun
from train.studies.study_folder import StudyFolder
from train.studies.work_queue import WorkQueue

TERMINAL_SECONDS = 1.0


@dataclass
class ProgressView:
    """Events as lines of their own, and how far all is."""

    terminal: bool = field(default_factory=sys.stdout.isatty)
    _last: float = 0.0
    _shown: bool = False

    def event(self, text: str) -> None:
        self._clear()
        print(f"{time.strftime('%H:%M:%S')} {one_line(text)}", flush=True)

    def show(self, queue: WorkQueue) -> None:
        now = time.monotonic()
        if now - self._last < (TERMINAL_SECONDS if self.terminal else LINE_SECONDS):
            return
        self._last = now
        text = progress_line(queue)
        self._clear()
        if self.terminal:
            print(text[:200], end="", flush=True)
            self._shown = True
        else:
            print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)

    def _clear(self) -> None:
        if self._shown:
            print("\r\x1b[2K", end="")
            self._shown = False


def progress_line(queue: WorkQueue) -> str:
    """Counts, the runs that are trained, and an ETA by the compute that is left."""
    running = [(slot.run, _fraction(slot.run, queue.folder)) for slot in queue.slots if slot.run is not None]
    done = sum(run.name in queue.results for run in queue.runs)
    total = len(queue.runs) + len(queue.waiting)
    parts = [f"{done} of {total} runs done"]
    if running:
        parts.append(", ".join(f"{run.name} {fraction:.0%}" for run, fraction in running))
    if queue.failed:
        parts.append(f"{len(queue.failed)} failed")
    if queue.waiting:
        parts.append(f"{len(queue.waiting)} wait for trials")
    if queue.stopped_by:
        return "; ".join([*parts, "stopping: the runs save and exit"])
    if (left := eta(queue, {run.name: fraction for run, fraction in running})) is not None:
        parts.append(f"ETA {format_duration(left)}")
    return "; ".join(parts)


def eta(queue: WorkQueue, fractions: dict[str, float]) -> float | None:
    """Seconds; None before there is anything to judge by. Runs that wait for trials count as their variant's others."""
    speeds = [found for run in queue.runs if (found := seconds_per_flop(run, queue.results.get(run.name))) is not None]
    for slot in queue.slots:
        fraction = fractions.get(slot.run.name, 0.0) if slot.run else 0.0
        if slot.run and not speeds and fraction > 0.02:
            speeds = [(time.monotonic() - slot.started) / (fraction * slot.run.flops)]
    if not speeds:
        return None
    flops = sum(run.flops * (1 - fractions.get(run.name, 0.0)) for run in queue.missing)
    usual = sum(run.flops for run in queue.runs) / max(1, len(queue.runs))
    flops += usual * len(queue.waiting)
    jobs = max(1, min(len(queue.slots), len(queue.missing) + len(queue.waiting)))
    return flops * sum(speeds) / len(speeds) / jobs


def seconds_per_flop(run: PlannedRun, result: MeasuredRun | None) -> float | None:
    """In steps; validations and starts are not counted."""
    if result is None or not result.hours or not result.hours[-1]:
        return None
    return result.hours[-1] * 3600 / run.flops


def _fraction(run: PlannedRun, folder: StudyFolder) -> float:
    steps = [record["step"] for record in last_json_lines(folder.run(run.name).metrics)
             if record_kind(record) in ("train", "validation", "start")]  # fmt: skip
    return min(1.0, steps[-1] / run.steps) if steps else 0.0
