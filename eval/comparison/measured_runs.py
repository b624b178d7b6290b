"""What a comparison reads of a run, from its folder only: its figure, its curve, and whether it may be ranked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from common.curves import VALIDATION, Curve
from common.errors import UserError
from common.measured import like_the_newest
from common.metric_fields import LARGEST, NUMBER
from common.metrics_table import Values
from common.run_files import read_configuration
from eval.reporting.key_figures import flatten
from eval.reporting.run_data import RunData, load_run

BITS = "val_bits_per_byte"
SECONDS_AN_HOUR = 3600.0
UNKNOWN_DEVICE = "unknown"


@dataclass(frozen=True)
class Metric:
    """What is compared: the last or the lowest value of a figure that validations or other evaluations record."""

    name: str  # as it is asked for
    figure: str
    higher_is_better: bool = False
    best: bool = False

    @property
    def is_loss(self) -> bool:
        return self.figure in (VALIDATION.figure, BITS)


@dataclass(frozen=True)
class MeasuredRun:
    """One run. Its records are those that were measured as its newest was."""

    path: str  # as it was given
    data: RunData = field(repr=False)

    @classmethod
    def load(cls, path: Path) -> "MeasuredRun":
        """Raises UserError for a folder that is not a run, has no training step yet, or no configuration."""
        data = load_run(path)
        if not read_configuration(data.folder):  # which raises where it can't be read
            raise UserError(f"{data.folder.config} is missing: a comparison has to know what differs")
        return cls(str(path), data)

    @cached_property
    def config(self) -> dict[str, Any]:
        """By field, such as `optim.lr`."""
        return flatten(self.data.config)

    @property
    def seeds(self) -> tuple[Any, ...]:
        """Of initialisation and of data, where these differ."""
        return (self.config.get("run.seed"), self.config.get("data.seed"))

    @cached_property
    def validations(self) -> list[dict[str, Any]]:
        return self.data.table.comparable(VALIDATION.figure)

    @property
    def last(self) -> dict[str, Any]:
        """The record of the last validation; empty where there is none."""
        return self.validations[-1] if self.validations else {}

    @property
    def has_bits(self) -> bool:
        """Whether all its validations record bits per byte, finite or not."""
        return bool(self.validations) and all(BITS in record for record in self.validations)

    def value(self, metric: Metric) -> float | None:
        """None where the run has no such figure, or NaN or inf."""
        curve = self.data.table.curves.get(metric.figure)
        records = self.validations if metric.is_loss else self._records(metric.figure, curve)
        found = [_number(record.get(metric.figure)) for record in records]
        if metric.best:
            return min((value for value in found if value is not None), default=None)
        return found[-1] if found else None

    def _records(self, figure: str, curve: Curve | None) -> list[dict[str, Any]]:
        records = self.data.table.of_kind(figure)
        return like_the_newest(curve, records) if curve is not None and records else records

    def why_unfit(self, metric: Metric) -> str:
        """Why it can't be ranked, in words; empty where it can."""
        steps, last = self.data.max_steps, self.data.newest("step")
        if self.data.leaks:
            return "not causal: it sees tokens that it predicts, so its losses mean nothing"
        if steps is None:
            return "its configuration names no run.max_steps, so it can't be seen whether it has ended"
        if last < steps:
            return f"at step {last:,} of {steps:,}: the middle of a schedule is not ranked against finished runs"
        if self.value(metric) is None:
            at_end = self.validations if metric.is_loss else self.data.table.of_kind(metric.figure)
            return f"its {metric.figure} is not finite" if at_end else f"it records no {metric.figure}"
        records = self.validations if metric.is_loss else self.data.table.of_kind(metric.figure)
        if records[-1]["step"] != last and not metric.best:
            return f"its last {metric.figure} is of step {records[-1]['step']:,}, before its end at {last:,}"
        return ""

    @property
    def knows_causality(self) -> bool:
        return isinstance(self.last.get("causal"), bool)

    def flops(self, record: Mapping[str, Any]) -> float | None:
        """Cumulative, of a validation; of an older run by the closed form."""
        if NUMBER.has(record.get("flops")):
            return float(record["flops"])
        tokens, per_token = record.get("tokens"), self.data.flops_per_token
        return float(tokens * per_token) if tokens is not None and per_token is not None else None

    def hours(self, step: int) -> float:
        """In steps, up to the end of one; without validation, saving and pauses."""
        steps, seconds = self._seconds
        done = int(np.searchsorted(steps, step, side="right"))
        return float(seconds[done - 1]) / SECONDS_AN_HOUR if done else 0.0

    @cached_property
    def _seconds(self) -> tuple[Values, Values]:
        """Steps, and the seconds that they have taken together up to each."""
        return self.data.table.column("step"), np.cumsum(np.nan_to_num(self.data.table.column("step_seconds")))

    @property
    def machine(self) -> tuple[str, ...]:
        """The device of every rank that has trained it, sorted; hours compare only where this is the same."""
        starts = self.data.starts
        found = {tuple(sorted(map(_device, start.get("ranks") or ()))) for start in starts}
        ranks = {life.world_size for life in self.data.table.lives}
        if len(found) != 1 or len(ranks) != 1 or not (machine := found.pop()) or len(machine) != ranks.pop():
            return ()
        return () if UNKNOWN_DEVICE in machine else machine

    @property
    def memory_gib(self) -> float | None:
        values = self.data.table.column("memory_gib")
        values = values[np.isfinite(values)]
        return float(values.max()) if len(values) else None

    @property
    def tokens_per_second(self) -> float | None:
        values = self.data.table.column("tokens_per_second")
        values = values[np.isfinite(values)]
        return float(np.median(values)) if len(values) else None

    @property
    def precision(self) -> str:
        """Of matrix products, as its configuration resolves it."""
        return str(self.config.get("run.dtype", "unknown"))


def curve_points(runs: Sequence[MeasuredRun], figure: str, amount: str) -> tuple[Values, Values] | None:
    """Amounts (P,) of `flops`, `tokens` or `hours` and losses (N, P) of the validations that all runs have.

    Without step 0, whose loss is that of no training. None where an amount is unknown.
    """
    by_step = [{record["step"]: record for record in run.validations if record["step"] > 0} for run in runs]
    steps = sorted(set.intersection(*map(set, by_step))) if by_step else []
    columns = []
    for step in steps:
        records = [found[step] for found in by_step]
        losses = [loss for record in records if (loss := _number(record.get(figure))) is not None]
        if len(losses) < len(runs):
            continue
        amounts = [_amount(run, record, amount) for run, record in zip(runs, records, strict=True)]
        known = [value for value in amounts if value is not None and 0 < value < LARGEST]
        if len(known) < len(runs):
            return None
        columns.append((float(np.mean(known)), losses))
    growing = all(one[0] < other[0] for one, other in pairwise(columns))
    if not columns or not growing:
        return None
    return np.array([at for at, _ in columns]), np.array([losses for _, losses in columns]).T


def _amount(run: MeasuredRun, record: Mapping[str, Any], amount: str) -> float | None:
    if amount == "hours":
        return run.hours(record["step"])
    value = run.flops(record) if amount == "flops" else record.get("tokens")
    return None if value is None else float(value)


def _number(value: Any) -> float | None:
    return float(value) if NUMBER.has(value) else None


def _device(rank: Any) -> str:
    """A rank's GPU, or its processor with the number of threads."""
    if not isinstance(rank, dict):
        return UNKNOWN_DEVICE
    if rank.get("device", "cpu") == "cpu":
        return f"{rank['cpu']}, {rank.get('threads')} threads" if rank.get("cpu") else UNKNOWN_DEVICE
    return str(rank.get("gpu") or rank["device"])
