"""What a study shows so far: a comparison for each size and budget, the ladder, and whatever is not in them, by name.

Everything is in the order of sizes, budgets, names (the baseline first) and seeds: neither the order of the study's
file nor when it was interrupted changes a byte.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from common.errors import UserError
from common.publish import canonical_json
from eval.comparison.comparing import Comparison, compare_runs, unit_of
from eval.comparison.measured_runs import MeasuredRun, Metric
from eval.comparison.run_groups import find_metric, make_group
from eval.comparison.scaling_law import Ladder, climb
from eval.comparison.study_data import Study, StudyRun
from eval.comparison.tuning import RATES, UNTUNED, Tuned, first_line, tune, usable
from eval.comparison.verdicts import COMPUTE

Runs = dict[str, list[MeasuredRun]]


@dataclass(frozen=True)
class Cell:
    """One size and budget. `comparison`: None with a reason where its runs do not compare."""

    size: str
    budget: str
    runs: Runs  # of each variant, those that a comparison may look at
    tuned: dict[str, Tuned]
    comparison: Comparison | None
    refused: str

    @property
    def label(self) -> str:
        """Empty where the study has neither sizes nor budgets."""
        parts = {"size": self.size, "budget": self.budget}
        return ", ".join(f"{name} {value}" for name, value in parts.items() if value)

    @property
    def ended(self) -> int:
        """How many runs are ranked."""
        return sum(entry.seeds for entry in self.comparison.entries.values()) if self.comparison else 0

    @property
    def deciding(self) -> int:
        """How many variants have a test."""
        entries = self.comparison.entries.values() if self.comparison else ()
        return sum(entry.difference_interval is not None for entry in entries)


@dataclass(frozen=True)
class StudyReport:
    """`names`: of the variants, the baseline first. `absent`: runs that nothing ranks, and why."""

    study: Study
    metric: Metric
    names: list[str]
    cells: list[Cell]
    ladders: dict[str, Ladder | str]
    absent: list[dict[str, Any]]

    @property
    def unit(self) -> str:
        return unit_of(self.metric)

    @property
    def main(self) -> Cell:
        """The size and budget with most verdicts, of several the largest."""
        return max(reversed(self.cells), key=lambda cell: (cell.deciding, cell.ended))

    @cached_property
    def rates(self) -> str:
        """At whose learning rate all ran."""
        found: dict[str, dict[str, str]] = {}
        for cell in self.cells:
            for name, runs in cell.runs.items():
                for run in runs:
                    shown = [
                        f"{option} = {run.config[option]:g}" for option in RATES if _is_rate(run.config.get(option))
                    ]
                    found.setdefault(name, {})[cell.label] = ", ".join(shown)
        edges = [name for cell in self.cells for name, tuned in cell.tuned.items() if set(tuned.at_edge) & set(RATES)]
        return first_line(self.study.tune, found, edges)

    def as_json(self) -> dict[str, Any]:
        return {
            "study": self.study.name,
            "question": self.study.question,
            "learning_rate": self.rates,
            "metric": self.metric.name,
            "unit": self.unit,
            "baseline": self.study.baseline,
            "changes": {name: self.study.changes.get(name, {}) for name in self.names},
            "comparisons": [
                {"size": cell.size, "budget": cell.budget}
                | (cell.comparison.as_json() if cell.comparison else {"refused": cell.refused})
                | {"tuned": {name: tuned.as_json() for name, tuned in cell.tuned.items() if tuned.sentence}}
                for cell in self.cells
            ],
            "ladder": {
                name: {"refused": found} if isinstance(found, str) else found.as_json()
                for name, found in self.ladders.items()
            },
            "absent": self.absent,
        }


def report_study(study: Study) -> StudyReport:
    """Raises UserError where no run records the study's metric."""
    known = {*study.changes, study.baseline, *(run.variant for run in study.runs)}
    names = sorted(known, key=lambda name: (name != study.baseline, name))
    runs = sorted(map(_described, study.runs), key=lambda run: _order(run, study, names))
    measured = usable(runs)
    is_known = bool(measured) or study.metric in ("final", "best")
    metric = find_metric(study.metric, measured) if is_known else Metric(study.metric, study.metric)
    groups: dict[tuple[str, str, str], list[StudyRun]] = {}
    for run in runs:
        if not run.trial:
            groups.setdefault((run.size, run.budget, run.variant), []).append(run)
    chosen = {key: usable(group) for key, group in groups.items()}
    tuned = {key: tune(runs, group[0], study.tune.get(key[2], {}), metric) for key, group in groups.items()}
    cells = []
    for size in study.sizes:
        for budget in study.shared_budgets:
            own = {name: chosen.get((size, budget, name), []) for name in names}
            others = {name: [found for (other, amount, variant), found in chosen.items()
                             if (other, variant) == (size, name) and amount != budget] for name in names}  # fmt: skip
            comparison, refused = _compare(own, others, study.baseline, metric)
            of_cell = {name: tuned.get((size, budget, name), UNTUNED) for name in names}
            cells.append(Cell(size, budget, own, of_cell, comparison, refused))
    return StudyReport(study, metric, names, cells, _ladders(chosen, names, metric), _absent(runs, metric))


def _described(run: StudyRun) -> StudyRun:
    """With its description for its path: a study may be moved, and its report is the same."""
    return run if run.run is None else replace(run, run=replace(run.run, path=describe_run(run)))


def describe_run(run: StudyRun) -> str:
    """A run that may have no folder: variant, size, budget, values and seeds."""
    parts = [run.variant, *(f"{name} {value}" for name, value in (("size", run.size), ("budget", run.budget)) if value)]
    parts += [f"{option} {value}" for option, value in sorted(run.choices.items())]
    seeds = "/".join(str(seed) for seed in run.seed if seed is not None)
    return ", ".join([*parts, f"seed {seeds}", *(["trial"] if run.trial else [])])


def _compare(
    runs: Runs, budgets: Mapping[str, Sequence[Sequence[MeasuredRun]]], baseline: str, metric: Metric
) -> tuple[Comparison | None, str]:
    if not any(runs.values()):
        return None, "no run has been trained yet"
    try:
        return compare_runs(runs, baseline, metric, budgets=budgets), ""
    except UserError as error:
        return None, str(error)


def _ladders(
    chosen: Mapping[tuple[str, str, str], Sequence[MeasuredRun]], names: Sequence[str], metric: Metric
) -> dict[str, Ladder | str]:
    """Of every variant that has several sizes or budgets."""
    if not metric.is_loss or metric.best:
        return {}
    found: dict[str, Ladder | str] = {}
    for name in names:
        groups = [runs for (_, _, variant), runs in chosen.items() if variant == name]
        if len(groups) < 2:
            continue
        try:
            ends = [make_group(name, runs, metric).end(metric, COMPUTE) for runs in groups]
        except UserError as error:
            found[name] = str(error)
            continue
        found[name] = climb([(end.amount, end.loss) for end in ends if end is not None])
    return found


def _absent(runs: Sequence[StudyRun], metric: Metric) -> list[dict[str, Any]]:
    found = []
    for run in runs:
        why = run.why or ("missing" if run.run is None else run.run.why_unfit(metric))
        if why:
            own = {"variant": run.variant, "size": run.size, "budget": run.budget, "seed": list(run.seed)}
            more = {"choices": run.choices, "trial": run.trial, "run": describe_run(run), "why": why}
            found.append(own | more)
    return found


def _is_rate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _order(run: StudyRun, study: Study, names: Sequence[str]) -> tuple[Any, ...]:
    sizes = {size: place for place, size in enumerate(study.sizes)}
    budgets: dict[str, int] = {}  # the last place that a variant has it at
    for each in study.budgets.values():
        budgets |= {budget: max(place, budgets.get(budget, 0)) for place, budget in enumerate(each)}
    return (
        sizes.get(run.size, len(sizes)), budgets.get(run.budget, len(budgets)), run.budget, names.index(run.variant),
        run.trial, canonical_json(run.choices), canonical_json(run.seed),
    )  # fmt: skip
