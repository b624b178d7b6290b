"""Where a run's time went, from the seconds in its records and the times they were written at."""

import math
from dataclasses import asdict, dataclass
from itertools import pairwise

import numpy as np

from common.metrics_table import MetricsTable


@dataclass(frozen=True)
class TimeSpent:
    """Wall-clock seconds from the first start to the last record; the parts add up to `total`."""

    compute: float  # steps that count, without their wait for data
    data: float  # steps that count, waiting for data
    validation: float
    hellaswag: float
    save: float  # training stood still for it
    starting: float  # from a start to its first piece of work: warm-up, compilation
    done_again: float  # work that no checkpoint held when the run stopped
    other: float  # samples, records, garbage collection
    stopped: float  # from the last record before a stop to the next start
    total: float

    @property
    def parts(self) -> dict[str, float]:
        """Every part but the total."""
        parts = asdict(self)
        del parts["total"]
        return parts


LABELS = {
    "compute": "computing",
    "data": "waiting for data",
    "validation": "validation",
    "hellaswag": "HellaSwag",
    "save": "saving",
    "starting": "starting up",
    "done_again": "lost, done again",
    "other": "samples and other",
    "stopped": "stopped, between starts",
}


def time_spent(table: MetricsTable) -> TimeSpent:
    """Account for a run's time. What no record explains is `other`."""
    lives = table.lives
    times = [life.end for life in lives if math.isfinite(life.end)]
    # 0 where no record has a time
    total = max(0.0, max(times, default=math.nan) - lives[0].start)
    stopped = sum(max(0.0, after.start - before.end) for before, after in pairwise(lives))
    data = float(np.nansum(table.column("data_wait_seconds")))
    compute = max(0.0, float(np.nansum(table.column("step_seconds"))) - data)
    known = {
        "compute": compute,
        "data": data,
        "validation": _event_seconds(table, "val_seconds"),
        "hellaswag": _event_seconds(table, "hellaswag_seconds"),
        "save": _save_seconds(table),
        "starting": sum(life.starting_seconds or 0.0 for life in lives),
        "done_again": table.lost.seconds,
        "stopped": stopped,
    }
    return TimeSpent(**known, other=max(0.0, total - sum(known.values())), total=total)


def _event_seconds(table: MetricsTable, key: str) -> float:
    return float(sum(event[key] or 0.0 for event in table.of_kind(key)))


def _save_seconds(table: MetricsTable) -> float:
    """How long training stood still for saves: less than a save in the background takes."""
    saves = table.of_kind("save_seconds")
    return float(sum(save.get("save_blocked_seconds", save["save_seconds"]) or 0.0 for save in saves))
