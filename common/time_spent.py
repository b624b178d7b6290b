"""Where a run's time went, from the seconds in its records and the times they were written at."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from common.curves import BUILT_IN
from common.metric_fields import NUMBER
from common.metrics_table import Hang, MetricsTable


@dataclass(frozen=True)
class TimeSpent:
    """Wall-clock seconds from the first start to the last record; the parts add up to `total`."""

    compute: float  # steps that count, without their wait for data
    data: float  # steps that count, waiting for data
    evaluations: dict[str, float]  # by the kind of their records
    save: float  # training stood still for it
    starting: float  # from a launch to its first piece of work: processes, data, checkpoint, warm-up, compilation
    done_again: float  # work that no checkpoint held when the run stopped
    hung: float  # all waited for a rank that hung
    other: float  # samples, records, garbage collection
    stopped: float  # from the last record before a stop to the next start
    total: float
    evaluation_labels: dict[str, str]

    @property
    def goodput(self) -> float | None:
        """The share of steps that count, without their wait for data, in the time in which the run had its machines."""
        running = self.total - self.stopped
        return self.compute / running if running > 0 else None

    @property
    def parts(self) -> dict[str, float]:
        """Every part but the total."""
        before, after = ({part: getattr(self, part) for part in labels} for labels in (_BEFORE, _AFTER))
        return before | self.evaluations | after

    def as_json(self) -> dict[str, float]:
        return self.parts | {"total": self.total}


# What work is part of, by a rank's phase: an evaluation's if it is not here; "" is what no record explains.
WORK = {
    "training": "compute",
    "saving": "save",
    **dict.fromkeys(("starting", "warming up", "checking the machines"), "starting"),
    **dict.fromkeys(("sampling", "rolling back", "profiling", "leaving"), ""),
}
_BEFORE = {"compute": "computing", "data": "waiting for data"}
_AFTER = {
    "save": "saving",
    "starting": "starting up",
    "done_again": "lost, done again",
    "hung": "waiting for a hung rank",
    "other": "samples and other",
    "stopped": "stopped, between starts",
}


def labels_of(spent: Iterable[TimeSpent]) -> dict[str, str]:
    """What people read, by part, in the order in which parts are shown: with the evaluations of any of the runs."""
    evaluations = {kind: label for entry in spent for kind, label in entry.evaluation_labels.items()}
    return _BEFORE | evaluations | _AFTER


def time_spent(table: MetricsTable) -> TimeSpent:
    """Account for a run's time. What no record explains is `other`."""
    lives = table.lives
    times = [life.end for life in lives if math.isfinite(life.end)]
    # 0 where no record has a time
    total = max(0.0, max(times, default=math.nan) - lives[0].start)
    stopped = sum(max(0.0, after.start - before.end) for before, after in pairwise(lives))
    data = float(np.nansum(table.column("data_wait_seconds")))
    compute = max(0.0, float(np.nansum(table.column("step_seconds"))) - data)
    evaluations = _evaluation_seconds(table)
    known = {
        "compute": compute,
        "data": data,
        "save": _save_seconds(table),
        "starting": sum(life.starting_seconds or 0.0 for life in lives),
        "done_again": table.lost.seconds,
        "hung": sum(hang.seconds for hang in table.hangs),
        "stopped": stopped,
    }
    _take_off(table.hangs, known, evaluations)
    other = max(0.0, total - sum(known.values()) - sum(evaluations.values()))
    labels = {kind: _label(table, kind) for kind in evaluations}
    return TimeSpent(**known, evaluations=evaluations, other=other, total=total, evaluation_labels=labels)


def _take_off(hangs: Iterable[Hang], known: dict[str, float], evaluations: dict[str, float]) -> None:
    """A piece of work that continued after a hang was recorded with the time that it hung: that is no part of it."""
    for hang in hangs:
        part = WORK.get(hang.within) if hang.within else ""
        if part:
            known[part] = max(0.0, known[part] - hang.seconds)
        elif part is None and evaluations:
            longest = max(evaluations, key=evaluations.__getitem__)
            evaluations[longest] = max(0.0, evaluations[longest] - hang.seconds)


def _evaluation_seconds(table: MetricsTable) -> dict[str, float]:
    spent = dict.fromkeys(table.curves.seconds.values(), 0.0)
    for key, kind in table.curves.seconds.items():
        spent[kind] += sum(float(event[key]) for event in table.events if NUMBER.has(event.get(key)))
    return spent


def _label(table: MetricsTable, kind: str) -> str:
    """An evaluation's: that of its curve, or its own name where it has several."""
    built_in = [curve.label for curve in BUILT_IN if curve.kind == kind]
    labels = built_in or [curve.label for curve in table.curves if curve.kind == kind]
    return labels[0] if len(labels) == 1 else kind


def _save_seconds(table: MetricsTable) -> float:
    """How long training stood still for saves: less than a save in the background takes."""
    saves = table.of_kind("save_seconds")
    return float(sum(save.get("save_blocked_seconds", save["save_seconds"]) or 0.0 for save in saves))
