"""What a comparison reads of a run: its figure, its curve, and whether it may be ranked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from common.curves import BUILT_IN, VALIDATION, Curve
from common.measured import like_the_newest
from common.metric_fields import LARGEST, NUMBER
from common.metrics_table import Values
from eval.comparison.result_files import read_facts, write_facts
from eval.comparison.run_facts import BITS, RunFacts, read_folder


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
class MeasuredRun(RunFacts):
    """One run, from its folder or its result file, with what comparisons ask of it."""

    path: str  # as it was given

    @classmethod
    def load(cls, path: Path) -> "MeasuredRun":
        """Raises UserError for what is neither a run's folder nor a result file, and for a run without a step yet."""
        facts = read_facts(path) if path.is_file() else read_folder(path)
        return cls(**vars(facts), path=str(path))

    def with_defaults(self, defaults: Mapping[str, Any]) -> "MeasuredRun":
        """The same with options that its version did not have yet. Args: defaults: what their absence means."""
        return replace(self, config={**defaults, **self.config})

    def write_result(self, path: Path) -> None:
        """Publish what is known of the run as a result file, which `load` reads. Raises OSError."""
        write_facts(path, self)

    @property
    def name(self) -> str:
        return str(self.config.get("run.name") or Path(self.path).stem)

    @property
    def seeds(self) -> tuple[Any, ...]:
        """Of initialisation and of data; None for the second where it is the first."""
        seed, order = self.config.get("run.seed"), self.config.get("data.seed")
        return (seed, None if order == seed else order)

    def curve(self, figure: str) -> Curve | None:
        """The description of a figure; None where the run has none."""
        return next((curve for curve in (*BUILT_IN, *self.curves) if curve.figure == figure), None)

    @property
    def figures(self) -> list[str]:
        """Those that it has recorded."""
        return [curve.figure for curve in (*BUILT_IN, *self.curves) if self.records(curve.figure)]

    def records(self, figure: str) -> list[dict[str, Any]]:
        """The records that hold a figure, by step."""
        source = self.validations if figure == VALIDATION.figure else (*self.validations, *self.evaluations)
        found = {id(record): record for record in source if figure in record}
        return sorted(found.values(), key=lambda record: int(record["step"]))

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
        records = self.validations if metric.is_loss else self._comparable(metric.figure)
        found = [_number(record.get(metric.figure)) for record in records]
        if metric.best:
            return min((value for value in found if value is not None), default=None)
        return found[-1] if found else None

    def _comparable(self, figure: str) -> list[dict[str, Any]]:
        records, curve = self.records(figure), self.curve(figure)
        return like_the_newest(curve, records) if curve is not None and records else records

    def why_unfit(self, metric: Metric) -> str:
        """Why it can't be ranked, in words; empty where it can."""
        steps, last = self.max_steps, self.step
        if self.leaks:
            return "not causal: it sees tokens that it predicts, so its losses mean nothing"
        if steps is None:
            return "its configuration names no run.max_steps, so it can't be seen whether it has ended"
        if last < steps:
            return f"at step {last:,} of {steps:,}: the middle of a schedule is not ranked against finished runs"
        if self.value(metric) is None:
            at_end = self.validations if metric.is_loss else self.records(metric.figure)
            return f"its {metric.figure} is not finite" if at_end else f"it records no {metric.figure}"
        records = self.validations if metric.is_loss else self.records(metric.figure)
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
        tokens, per_token = record.get("tokens"), self.flops_per_token
        return float(tokens * per_token) if tokens is not None and per_token is not None else None

    @cached_property
    def hours_by_step(self) -> dict[int, float]:
        """In steps, up to each validation; without validation, saving and pauses."""
        return {record["step"]: hours for record, hours in zip(self.validations, self.hours, strict=True)}

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
        return run.hours_by_step[record["step"]]
    value = run.flops(record) if amount == "flops" else record.get("tokens")
    return None if value is None else float(value)


def _number(value: Any) -> float | None:
    return float(value) if NUMBER.has(value) else None
