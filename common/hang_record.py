"""The line in `metrics.jsonl` about a hang, by which the time that it cost is known."""

import contextlib
import time
from contextlib import closing
from typing import Any

from common.metrics_file import MetricsFile
from common.run_folder import RunFolder


def hang_record(step: int, phase: str, seconds: float, *, continued: bool) -> dict[str, Any]:
    """The record.

    Args:
        step, phase: that were under way. seconds: without any progress.
        continued: the run has made progress since, so that the time is part of that step or phase; else it was ended.
    """
    what = {"kind": "hang", "step": step, "phase": phase, "hang_seconds": round(seconds, 3), "continued": continued}
    return what | {"time": time.time()}


def append_last_hang(folder: RunFolder, step: int, phase: str, seconds: float) -> None:
    """Record the hang that ends the run, from whichever process knows: rank 0 may be the one that hangs."""
    with contextlib.suppress(OSError), closing(MetricsFile(folder.metrics)) as file:
        file.append(hang_record(step, phase, seconds, continued=False))
