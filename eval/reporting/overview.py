"""All runs under a root at a glance: a line each."""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path

from common.checkpoint_files import seconds_since_save
from common.errors import UserError
from common.metrics_table import MetricsTable
from common.os_errors import refusal
from common.plain_text import one_line
from common.progress import format_count, format_duration
from common.run_folder import RunFolder
from common.time_spent import time_spent
from eval.reporting.live_view import COLORS, LiveRun, mean, seconds_left
from eval.reporting.look import Look, fit

HEADINGS = ("run", "state", "step", "ETA", "tokens/s", "suspect", "skips", "saved", "goodput", "")
RIGHT = (False, False, True, True, True, False, True, True, True, False)  # where a column's cells stand
UNKNOWN = "-"


@dataclass
class Overview:
    """The runs under a root, which are read repeatedly."""

    root: Path
    _runs: dict[Path, LiveRun] = field(default_factory=dict)

    def refresh(self) -> None:
        """Read what is new of every run, those that have come since among them.

        Raises UserError where the root can't be read.
        """
        paths = run_folders(self.root)
        self._runs = {path: self._runs.get(path) or _new_run(path) for path in paths}
        for run in self._runs.values():
            run.refresh()

    def frame(self, width: int, height: int, look: Look, now: float) -> list[str]:
        """At most `height` lines of at most `width` characters (colours not counted): what has not ended comes first.

        Args:
            now: seconds since the epoch.
        """
        words = {path: run.liveness(now).word for path, run in self._runs.items()}
        order = sorted(self._runs, key=lambda path: (words[path] in ("done", "failed", "preempted"), path.name))
        rows = [(_cells(self._runs[path], now), words[path]) for path in order]
        cells = [list(HEADINGS), *(row for row, _ in rows)]
        widths = [max(len(row[column]) for row in cells) for column in range(len(HEADINGS))]
        lines = [fit(_aligned(row, widths), width, look) for row in cells]
        colors = ["1", *(COLORS.get(word, "0") for _, word in rows)]
        lines = [look.paint(line, color) for line, color in zip(lines, colors, strict=True)]
        if not rows:
            return [fit(f"no runs in {self.root} yet", width, look)][:height]
        hidden = len(lines) - height
        return lines if hidden <= 0 else [*lines[: height - 1], fit(f"and {hidden + 1} more", width, look)][:height]


def _new_run(path: Path) -> LiveRun:
    folder = RunFolder(path)
    return LiveRun(folder, MetricsTable(folder.metrics))


def run_folders(root: Path) -> list[Path]:
    """The folders below a root that are a run's, by name. Raises UserError where the root can't be read."""
    try:
        return sorted(path for path in root.iterdir() if _is_run(path))
    except OSError as error:
        raise UserError(refusal("read", error, root, otherwise="give another --root")) from None


def _is_run(path: Path) -> bool:
    """Whether this looks like a run's folder; a folder that may not be read may be one."""
    if not os.path.isdir(path):
        return False
    folder = RunFolder(path)
    there = any(os.path.lexists(file) for file in (folder.metrics, folder.state, folder.config))
    return there or not os.access(path, os.X_OK)


def _cells(run: LiveRun, now: float) -> list[str]:
    """A run's line, by heading."""
    alive, table = run.liveness(now), run.table
    step = int(table.tail("step", 1)[0]) if len(table) else 0
    left, rate = seconds_left(run, now), mean(run, "tokens_per_second")
    age, spent = seconds_since_save(run.folder.checkpoints, now), time_spent(table) if table.lives else None
    goodput = spent.goodput if spent is not None else None
    return [
        one_line(cell)
        for cell in (
            run.folder.path.name,
            "unreadable" if run.complaints else alive.word,
            f"{step:,}/{run.max_steps:,}" if run.max_steps is not None else f"{step:,}",
            UNKNOWN if left is None else format_duration(left),
            format_count(rate) if rate else UNKNOWN,
            alive.suspect.partition(",")[0] or UNKNOWN,
            str(table.skips),
            UNKNOWN if age is None else f"{format_duration(age)} ago",
            UNKNOWN if goodput is None or not math.isfinite(goodput) else f"{goodput:.0%}",
            "; ".join(
                [*run.complaints, *([] if run.complaints else [alive.why]), *(["not causal"] if run.leaks else [])]
            ),
        )
    ]


def _aligned(row: list[str], widths: list[int]) -> str:
    cells = zip(row, widths, RIGHT, strict=True)
    return "  ".join(cell.rjust(width) if right else cell.ljust(width) for cell, width, right in cells).rstrip()
