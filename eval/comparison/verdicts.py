"""A variant beside the baseline: its figures, its multipliers, and both as one plain sentence."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from eval.comparison.differences import LEVEL, MOST_SEEDS, Test, mean_half_width, pooled_deviation, seeds_to_show
from eval.comparison.measured_runs import Metric
from eval.comparison.multiplier import End, LossCurve, Multiplier, multiplier, multiplier_of_curves
from eval.comparison.run_groups import Group, alike

LARGEST_P = 1 - LEVEL
COMPUTE = "flops"
Interval = tuple[float, float]


@dataclass(frozen=True)
class Setting:
    """What all variants of a comparison share. `families`: groups that differ in their budget only."""

    metric: Metric
    unit: str
    baseline: Group
    families: dict[str, list[Group]]
    comparisons: int  # how many variants are tested together


@dataclass(frozen=True)
class Multipliers:
    """In compute, tokens and hours; None with a reason, or where it is not known."""

    compute: Multiplier | None = None
    tokens: Multiplier | None = None
    hours: Multiplier | None = None
    taken_from: str | None = None  # "budgets" or "curve"
    why_not: str = ""


@dataclass(frozen=True)
class Verdict:
    """One variant's entry. Amounts in the comparison's unit; None is what can't be known."""

    mean: float | None
    std: float | None
    interval: Interval | None
    seeds: int
    difference: float | None
    difference_interval: Interval | None
    p_value: float | None
    multipliers: Multipliers
    memory_gib: float | None
    tokens_per_second: float | None
    sentence: str = ""

    def as_json(self) -> dict[str, Any]:
        found = self.multipliers
        compute, tokens, hours = found.compute, found.tokens, found.hours
        return {
            "mean": self.mean,
            "std": self.std,
            "interval": self.interval,
            "seeds": self.seeds,
            "difference": self.difference,
            "difference_interval": self.difference_interval,
            "p_value": self.p_value,
            "multiplier": compute and compute.value,
            "multiplier_interval": compute and compute.interval,
            "multiplier_from": found.taken_from,
            "multiplier_tokens": tokens and tokens.value,
            "multiplier_hours": hours and hours.value,
            "memory_gib": self.memory_gib,
            "tokens_per_second": self.tokens_per_second,
            "sentence": self.sentence,
        }


def verdict(group: Group, test: Test | None, setting: Setting, shared: tuple[float, int]) -> Verdict:
    """Args: test: None for the baseline, and where there is nothing to test. shared: pooled deviation, its freedom."""
    values, baseline = group.values(setting.metric), setting.baseline.values(setting.metric)
    is_baseline = group is setting.baseline
    mean = float(values.mean()) if len(values) else None
    difference = float(values.mean() - baseline.mean()) if len(values) and len(baseline) and not is_baseline else None
    multipliers = Multipliers() if is_baseline or is_budget(group, setting) else find_multipliers(group, setting)
    found = Verdict(
        mean=mean,
        std=float(values.std(ddof=1)) if len(values) > 1 else None,
        interval=_mean_interval(values, shared),
        seeds=len(values),
        difference=difference,
        difference_interval=(test.difference - test.half_width, test.difference + test.half_width) if test else None,
        p_value=test.p_value if test else None,
        multipliers=multipliers,
        memory_gib=max((run.memory_gib for run in group.runs if run.memory_gib is not None), default=None),
        tokens_per_second=_mean([run.tokens_per_second for run in group.runs]),
    )
    return replace(found, sentence=" ".join(_sentences(group, found, test, setting)))


def _mean_interval(values: Any, shared: tuple[float, int]) -> Interval | None:
    """By the deviation over all groups; by the group's own where that is much larger."""
    if len(values) < 2:
        return None
    deviation, freedom = shared
    own = float(values.std(ddof=1))
    if own > 2 * deviation:
        deviation, freedom = own, len(values) - 1
    half = mean_half_width(deviation, freedom, len(values))
    return float(values.mean()) - half, float(values.mean()) + half


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def find_multipliers(group: Group, setting: Setting) -> Multipliers:
    if not setting.metric.is_loss or setting.metric.best:
        return Multipliers(why_not="multipliers are of final losses")
    if not group.runs or not setting.baseline.runs:
        return Multipliers()
    found, taken_from = _multiplier(group, setting, COMPUTE)
    if isinstance(found, str):
        return Multipliers(why_not=found)
    tokens, _ = _multiplier(group, setting, "tokens")
    machines = {run.machine for run in (*group.runs, *setting.baseline.runs)}
    hours = _multiplier(group, setting, "hours")[0] if len(machines) == 1 and machines != {()} else ""
    if found.interval is None:
        return Multipliers(why_not="a single seed shows no multiplier")
    return Multipliers(
        found,
        None if isinstance(tokens, str) else tokens,
        None if isinstance(hours, str) else hours,
        taken_from,
    )


def _multiplier(group: Group, setting: Setting, what: str) -> tuple[Multiplier | str, str]:
    """From final losses of several budgets where either has them, the baseline's first; else from curves."""
    metric, baseline = setting.metric, setting.baseline
    ends = [each.end(metric, what) for each in (baseline, group)]
    if ends[0] is None or ends[1] is None:
        return f"the {what} of its runs are not known", "curve"
    why = ""
    for place, each in enumerate((baseline, group)):
        budgets = _budget_ends(each, setting, what)
        if len(budgets) < 2:
            continue
        curve = LossCurve.of_budgets(budgets)
        found = multiplier(curve, ends[1]) if place == 0 else multiplier(ends[0], curve)
        if isinstance(found, Multiplier):
            return found, "budgets"
        why = why or f"of {each.name}'s budgets {found}"
    if why:
        return why, "budgets"
    curves = [each.curve(metric, what) for each in (baseline, group)]
    if curves[0] is None or curves[1] is None:
        return "there are no validations on the way that all seeds have", "curve"
    return multiplier_of_curves(ends[0], curves[0], ends[1], curves[1]), "curve"


def _budget_ends(group: Group, setting: Setting, what: str) -> list[End]:
    """Of the group, and of its family's groups at other budgets, one of each."""
    ends: list[End] = []
    for member in (group, *setting.families[group.family]):
        end = member.end(setting.metric, what)
        if end is not None and not any(alike(end.amount, other.amount) for other in ends):
            ends.append(end)
    return ends


def _sentences(group: Group, found: Verdict, test: Test | None, setting: Setting) -> Iterator[str]:
    name, baseline = group.name, setting.baseline
    if group is baseline:
        yield f"{name} is the baseline, {_seeds(found.seeds)}."
    elif found.seeds == 0:
        yield f"No verdict on {name}: none of its runs can be ranked."
    elif not baseline.runs:
        yield f"No verdict on {name}: no run of the baseline {baseline.name} can be ranked."
    elif (whole := _whose_budget(group, setting)) is not None:
        yield f"{name} is {whole.name} at another budget: it counts for multipliers only."
    elif test is None:
        one = name if found.seeds < 2 else baseline.name
        yield f"No verdict on {name}: {one} has one seed, and one seed shows no deviation."
    else:
        yield _judgement(group, test, setting, found.seeds)
    if group.left_out:
        yield f"{len(group.left_out)} of its {len(group.left_out) + found.seeds} runs left out."
    if group is not baseline and found.seeds and baseline.runs:
        yield from _budgets(group, found.multipliers, setting)
        yield from _of_multiplier(found.multipliers, baseline.name)


def _judgement(group: Group, test: Test, setting: Setting, seeds: int) -> str:
    name, baseline, unit = group.name, setting.baseline, setting.unit
    size = f"{abs(test.difference):.4f} ± {test.half_width:.4f} {unit}"
    rest = f"({LEVEL:.0%} interval, {_seeds(seeds)} and {baseline.count} of {baseline.name}, p = {test.p_value:.2g}"
    rest += f", {test.method})" if test.method != "Student" else ")"
    if test.p_value < LARGEST_P:
        better = (test.difference > 0) == setting.metric.higher_is_better
        return f"{name} is {'better' if better else 'worse'} than {baseline.name} by {size} {rest}."
    text = f"Undecided: {name} less {baseline.name} is {test.difference:+.4f} ± {test.half_width:.4f} {unit} {rest};"
    wanted = seeds_to_show(test.difference / 2, test.deviation, setting.comparisons)
    many = f"over {MOST_SEEDS:,} seeds each" if wanted is None else f"{wanted} seeds each"
    return f"{text} to show half that difference takes {many}."


def _budgets(group: Group, multipliers: Multipliers, setting: Setting) -> Iterator[str]:
    """Said, not hidden: what else differs than the variant."""
    if is_budget(group, setting):
        return
    pairs = {what: (group.amount(what), setting.baseline.amount(what)) for what in ("tokens", COMPUTE)}
    unequal = {what: pair for what, pair in pairs.items() if not alike(*pair)}
    if len(unequal) == len(pairs):
        ratios = [f"{one / other:.3g} times the {'FLOPs' if what == COMPUTE else what}" for what, (one, other)
                  in unequal.items() if one and other]  # fmt: skip
        alone = "" if multipliers.compute else ": without a multiplier the difference is not of the variant only"
        yield f"Unequal budgets: it had {' and '.join(ratios)} of {setting.baseline.name}{alone}."
    precisions = [sorted({run.precision for run in each.runs}) for each in (group, setting.baseline)]
    if precisions[0] != precisions[1]:
        yield f"Mixed precision: {', '.join(precisions[0])} beside {', '.join(precisions[1])}."


def _of_multiplier(found: Multipliers, baseline: str) -> Iterator[str]:
    if found.compute is None:
        if found.why_not:
            yield f"No compute multiplier: {found.why_not}."
        return
    assert found.compute.interval is not None
    low, high = found.compute.interval
    source = "final losses of several budgets" if found.taken_from == "budgets" else (
        "curves inside one schedule, which are biased")  # fmt: skip
    yield (
        f"{baseline} needs {found.compute.value:.3f} times the compute for the same loss ({low:.3f} to {high:.3f}, "
        f"from {source})."
    )


def is_budget(group: Group, setting: Setting) -> bool:
    """Whether a group is the baseline, or a variant, at another budget than the baseline's."""
    return _whose_budget(group, setting) is not None


def _whose_budget(group: Group, setting: Setting) -> Group | None:
    amount = setting.baseline.amount("tokens")
    if alike(group.amount("tokens"), amount):
        return None
    family = setting.families[group.family]
    others = [each for each in family if each is not group and alike(each.amount("tokens"), amount)]
    return setting.baseline if setting.baseline in others else next(iter(others), None)


def _seeds(count: int) -> str:
    return f"{count} seed" if count == 1 else f"{count} seeds"


def shared_deviation(groups: Sequence[Group], metric: Metric) -> tuple[float, int] | None:
    """Of a run from its group's mean, over all groups of two seeds or more; None without any."""
    several = [group.values(metric) for group in groups if group.count > 1]
    if not several:
        return None
    deviation, freedom = pooled_deviation(several)
    return float(deviation), freedom
