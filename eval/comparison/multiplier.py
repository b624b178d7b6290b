"""How much less compute (or tokens, or hours) a variant needs for a loss than the baseline does.

The multiplier at a loss L is C_baseline(L) / C_variant(L): 1.3 means that the baseline needs 1.3 times as much. One of
the two is a whole run, which ends at L; where the other one passes L is read off its curve, log-log between points:

- of final losses, where there are runs of several budgets, each with a schedule of its own (`budgets`);
- else of one budget's validations (`curve`). L is then the worse of the two final losses, as the better group's own
  is never reached by the other. Inside a schedule that decays, losses are higher than those of shorter runs that have
  ended: such a multiplier is nearer to 1 than that of budgets.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy import optimize, special

from eval.comparison.differences import LEVEL, welch_sum

Values = npt.NDArray[np.float64]
SAME = 1 + 1e-12  # means of the same numbers may differ by their rounding
SLOPE_RATIO = 1.5  # the slope at a point is that of the curve within this factor of it to both sides


@dataclass(frozen=True)
class End:
    """What whole runs reach: the mean of N final losses, at an amount of compute."""

    amount: float
    loss: float
    deviation: float
    count: int


@dataclass(frozen=True)
class LossCurve:
    """Mean losses (P,) of several runs at growing amounts (P,), their deviation over runs, and how many there are.

    Attributes:
        runs: the losses (N, P) themselves, where all points are of the same runs; those of budgets are not.
    """

    amounts: Values
    means: Values
    deviations: Values
    counts: tuple[int, ...]
    runs: Values | None = None

    @classmethod
    def of_runs(cls, amounts: Values, losses: Values) -> "LossCurve":
        """From validations of N runs: amounts (P,), losses (N, P)."""
        deviations = losses.std(axis=0, ddof=1) if len(losses) > 1 else np.zeros(losses.shape[1])
        return cls(amounts, losses.mean(axis=0), deviations, (len(losses),) * losses.shape[1], losses)

    @classmethod
    def of_budgets(cls, ends: Sequence[End]) -> "LossCurve":
        ends = sorted(ends, key=lambda end: (end.amount, end.loss))
        columns = np.array([[end.amount, end.loss, end.deviation] for end in ends]).T
        return cls(columns[0], columns[1], columns[2], tuple(end.count for end in ends))


@dataclass(frozen=True)
class Crossing:
    """Where a curve passes a loss, how steeply (loss per unit of ln amount), and how sure its loss there is."""

    amount: float
    slope: float
    variances: tuple[tuple[float, int], ...]  # of the mean loss, each part with its degrees of freedom


@dataclass(frozen=True)
class Multiplier:
    """`interval`: of 95 %; None where a group is a single run."""

    value: float
    interval: tuple[float, float] | None


def cross(curve: LossCurve, loss: float) -> Crossing | str:
    """Where the curve first reaches a loss; in words why it has no such point."""
    if len(curve.amounts) < 2:
        return "its curve has a single point"
    falling = np.asarray(optimize.isotonic_regression(curve.means, increasing=False).x)
    if loss > falling[0]:
        return "the loss is reached before the curve's first point"
    if loss * SAME < falling[-1]:
        return "the curve does not reach the loss"
    after = max(1, int(np.argmax(falling <= loss * SAME)))
    logs, heights = np.log(curve.amounts), np.log(falling)
    fall = heights[after - 1] - heights[after]
    share = (heights[after - 1] - math.log(loss)) / fall if fall > 0 else 0.0  # of the way from one point to the next
    share = min(1.0, max(0.0, share))
    place = logs[after - 1] + share * (logs[after] - logs[after - 1])
    near = np.abs(logs - place) <= math.log(SLOPE_RATIO)
    near[[after - 1, after]] = True
    centred = logs[near] - logs[near].mean()
    slope = -float(centred @ curve.means[near] / (centred @ centred))
    if slope <= 0:
        return "the loss does not fall there"
    return Crossing(math.exp(place), slope, _variances(curve, after, share))


def _variances(curve: LossCurve, after: int, share: float) -> tuple[tuple[float, int], ...]:
    """Of the mean loss between two points: the parts of both, or of one where both are of the same runs."""
    before = after - 1
    weights = {before: 1 - share, after: share}
    if curve.runs is None:
        parts = {at: (weight * curve.deviations[at]) ** 2 / curve.counts[at] for at, weight in weights.items()}
        return tuple((float(part), curve.counts[at] - 1) for at, part in parts.items() if weights[at] > 0)
    between = weights[before] * curve.runs[:, before] + weights[after] * curve.runs[:, after]  # (N,)
    count = len(between)
    return ((float(between.var(ddof=1)) / count if count > 1 else 0.0, count - 1),)


def multiplier(baseline: End | LossCurve, variant: End | LossCurve) -> Multiplier | str:
    """One of the two is whole runs, whose loss the other's curve passes. In words why there is none.

    The error of both mean losses moves the place on the curve by as much as the slope there has it.
    """
    end, curve = (baseline, variant) if isinstance(baseline, End) else (variant, baseline)
    assert isinstance(end, End)
    assert isinstance(curve, LossCurve)
    found = cross(curve, end.loss)
    if isinstance(found, str):
        return found
    ratio = end.amount / found.amount
    value = ratio if end is baseline else 1 / ratio
    parts = [(end.deviation**2 / end.count, end.count - 1), *found.variances]
    if min(freedom for _, freedom in parts) < 1:
        return Multiplier(value, None)
    error, freedom = welch_sum(parts)
    reach = float(special.stdtrit(freedom, (1 + LEVEL) / 2) * error) / found.slope
    return Multiplier(value, (value * math.exp(-reach), value * math.exp(min(reach, 700.0))))


def multiplier_of_curves(
    baseline: End, baseline_curve: LossCurve, variant: End, variant_curve: LossCurve
) -> Multiplier | str:
    """At the worse of the two final losses, which both curves pass. In words why there is none.

    A group that overfits has passed its final loss long before its end.
    """
    if baseline.loss >= variant.loss:
        return multiplier(_as_reached(baseline, baseline_curve), variant_curve)
    return multiplier(baseline_curve, _as_reached(variant, variant_curve))


def _as_reached(end: End, curve: LossCurve) -> End:
    found = cross(curve, end.loss)
    return end if isinstance(found, str) else replace(end, amount=found.amount)
