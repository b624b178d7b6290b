"""Groups of runs that differ in their seeds only, and whether several groups may be compared at all."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from common.curves import VALIDATION
from common.errors import UserError
from common.measured import describe_validation, measured_alike
from common.paths import expand_path
from common.publish import canonical_json
from eval.comparison.differences import Values
from eval.comparison.measured_runs import MeasuredRun, Metric, curve_points
from eval.comparison.multiplier import End, LossCurve
from eval.comparison.run_facts import BITS

OF_A_GROUP = ("run.seed", "data.seed", "run.name")  # in which runs of one group may differ
# In which runs of several budgets may differ as well: how long they are, and what they measure on the way.
OF_A_BUDGET = ("run.max_steps", "schedule.warmup", "schedule.decay", "eval.every_steps", "eval.sample_every_steps",
               "eval.hellaswag_every_steps")  # fmt: skip
ABSENT = "(absent)"
ALIKE = 0.01  # by how much amounts may differ that count as equal
Field = dict[str, Any]


@dataclass(frozen=True)
class Group:
    """The runs of one variant that may be ranked, by seed, and why others may not, by path."""

    name: str
    runs: tuple[MeasuredRun, ...]
    left_out: dict[str, str]
    config: dict[str, Any]  # of any of them, by field
    _points: dict[tuple[str, str], tuple[Values, Values] | None] = field(default_factory=dict, repr=False)

    @property
    def count(self) -> int:
        return len(self.runs)

    @property
    def seeds(self) -> list[tuple[Any, ...]]:
        return [run.seeds for run in self.runs]

    @cached_property
    def family(self) -> str:
        """The same for groups that differ in their budget only."""
        own = {
            name: value
            for name, value in self.config.items()
            if name not in (*OF_A_GROUP, *OF_A_BUDGET) and name.split(".")[0] not in ("checkpoint", "log")
        }
        return canonical_json(own)

    def values(self, metric: Metric) -> Values:
        """(N,)"""
        return np.array([run.value(metric) for run in self.runs], dtype=np.float64)

    def amount(self, what: str) -> float | None:
        """Of `flops`, `tokens` or `hours` that a whole run takes, the mean of the runs; None where it is unknown."""
        found = self.points(VALIDATION.figure, what)
        return None if found is None else float(found[0][-1])

    def end(self, metric: Metric, what: str) -> End | None:
        amount, values = self.amount(what), self.values(metric)
        if amount is None or not len(values):
            return None
        deviation = float(values.std(ddof=1)) if len(values) > 1 else 0.0
        return End(amount, float(values.mean()), deviation, len(values))

    def curve(self, metric: Metric, what: str) -> LossCurve | None:
        found = self.points(metric.figure, what)
        return None if found is None else LossCurve.of_runs(*found)

    def points(self, figure: str, what: str) -> tuple[Values, Values] | None:
        """As `curve_points`."""
        if (figure, what) not in self._points:
            self._points[figure, what] = curve_points(self.runs, figure, what)
        return self._points[figure, what]


def parse_groups(texts: Sequence[str]) -> dict[str, list[Path]]:
    """`NAME=RUN,RUN,…` by name. Raises UserError for anything else, and for a run that is named twice."""
    groups: dict[str, list[Path]] = {}
    for text in texts:
        name, equals, paths = text.partition("=")
        found = [path for path in paths.split(",") if path]
        if not name or not equals or not found:
            raise UserError(f"--compare has {text!r}: use NAME=RUN,RUN,… with folders or result files of runs")
        if name in groups:
            raise UserError(f"--compare names {name} twice: give all of its runs at once, NAME=RUN,RUN,…")
        groups[name] = [expand_path(path) for path in found]
    if len(groups) < 2:
        raise UserError("--compare needs two groups of runs or more: A=RUN,RUN,… B=RUN,RUN,…")
    counts = Counter(path.resolve() for paths in groups.values() for path in paths)
    if twice := sorted(path for path, count in counts.items() if count > 1):
        raise UserError(f"--compare names {twice[0]} twice: each run counts once")
    return groups


def make_group(name: str, runs: Sequence[MeasuredRun], metric: Metric) -> Group:
    """Raises UserError where its runs differ in more than seed and name, or share a seed. Without runs it is empty."""
    ordered = sorted(runs, key=lambda run: (canonical_json(run.seeds), run.path))
    for option, values in differing({run.path: run.config for run in ordered}).items():
        if option not in OF_A_GROUP:
            examples = {canonical_json(value): f"{value} in {path}" for path, value in reversed(values.items())}
            told = ", ".join(sorted(examples.values())[:3])
            raise UserError(
                f"the runs of {name} differ in {option} ({told}): they may differ in {', '.join(OF_A_GROUP)} only"
            )
    whys = {run.path: run.why_unfit(metric) for run in ordered}
    fit = tuple(run for run in ordered if not whys[run.path])
    if twice := [seeds for seeds, count in Counter(run.seeds for run in fit).items() if count > 1]:
        same = [run.path for run in fit if run.seeds == twice[0]]
        seed, order = twice[0]
        both = f"run.seed, {seed}" if order is None else f"run.seed and data.seed, {seed} and {order}"
        raise UserError(f"{same[0]} and {same[1]} of {name} have the same {both}: name one of them")
    return Group(name, fit, {path: why for path, why in whys.items() if why}, ordered[0].config if ordered else {})


def differing(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Field]:
    """By option that is not the same in all configurations: its value in each."""
    options = sorted(set().union(*configs.values()))
    found = {option: {name: config.get(option, ABSENT) for name, config in configs.items()} for option in options}
    return {option: values for option, values in found.items() if len({canonical_json(v) for v in values.values()}) > 1}


def check_same_text(runs: Sequence[MeasuredRun]) -> bool:
    """Whether all losses are of the same tokens; else they are of the same text in other tokens.

    Raises UserError where they are of other texts, or of other parts of it.
    """
    ordered = sorted(runs, key=lambda run: run.path)
    first = ordered[0]
    same_tokens = True
    for run in ordered[1:]:
        pair = f"{first.path} and {run.path}"
        one, other = first.last, run.last
        tokens_alike = one.get("val_sha256") == other.get("val_sha256") or None in (
            one.get("val_sha256"), other.get("val_sha256"))  # fmt: skip
        texts = {one.get("val_text_sha256"), other.get("val_text_sha256")}
        if not tokens_alike and (len(texts) > 1 or None in texts):
            known = "other" if None not in texts else "unknown (no val_text_sha256)"
            raise UserError(
                f"{pair} were validated on other tokens (SHA-256 {one['val_sha256'][:12]}… and "
                f"{other['val_sha256'][:12]}…), and the texts are {known}: their losses do not compare"
            )
        same_tokens = same_tokens and tokens_alike
        amount = "val_tokens" if tokens_alike else "val_bytes"
        if not alike(one.get(amount), other.get(amount)):
            raise UserError(
                f"{pair} were validated on {one[amount]:,} and {other[amount]:,} {amount.removeprefix('val_')} of the "
                "same text: their losses do not compare; train with an eval.tokens that covers it all"
            )
    if not same_tokens and not all(run.has_bits for run in ordered):
        lacking = next(run.path for run in ordered if not run.has_bits)
        raise UserError(
            f"{lacking} records no bits per byte, in which losses of other tokenizers compare: train it anew"
        )
    return same_tokens


def check_measured_alike(runs: Sequence[MeasuredRun], metric: Metric) -> None:
    """Raises UserError where a figure other than a loss was measured on something else."""
    ordered = sorted(runs, key=lambda run: run.path)
    curve = next((found for run in ordered if (found := run.curve(metric.figure))), None)
    records = [(run.path, rows[-1]) for run in ordered if (rows := run.records(metric.figure))]
    for path, record in records[1:]:
        if curve is not None and not measured_alike(curve, records[0][1], record):
            pair = f"{records[0][0]} and {path}"
            raise UserError(f"{metric.figure} of {pair} was measured on something else: measure both on the same")


def alike(one: float | None, other: float | None) -> bool:
    """Whether two amounts are equal but for a hundredth; what is not known counts as equal."""
    return not one or not other or abs(one - other) <= ALIKE * max(one, other)


def find_metric(name: str, runs: Iterable[MeasuredRun]) -> Metric:
    """`final` or `best` loss, or a figure that the runs record. Raises UserError where they record none of the name."""
    runs = list(runs)
    if name in ("final", "best"):
        figure = BITS if all(run.has_bits for run in runs if run.validations) else VALIDATION.figure
        return Metric(name, figure, best=name == "best")
    known = {figure: curve for run in runs for figure in run.figures if (curve := run.curve(figure)) is not None}
    if name in (VALIDATION.figure, BITS):
        return Metric(name, name)
    if name not in known:
        others = sorted(known.keys() - {VALIDATION.figure})
        raise UserError(f"no run records {name}: --metric is one of {', '.join(['final', 'best', *others])}")
    return Metric(name, name, known[name].higher_is_better)


def describe_data(runs: Sequence[MeasuredRun]) -> list[str]:
    """On what the losses were measured, each way once."""
    return sorted({describe_validation(run.last) for run in runs} - {""})
