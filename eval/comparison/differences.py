"""Whether groups of runs differ from a baseline's, by how much, and how sure that is. A value is one run's figure.

All differences are tested together, so that among many variants of no effect one in twenty studies, not one in twenty
variants, has a false alarm: by Dunnett's test, with one deviation pooled over all groups (that of three runs says
little), for a single variant Student's. A group whose deviation is over `OUTLIER` times that of the others goes by
Welch's test with Holm's correction, and so do all where it is the baseline. There is no bootstrap: of a few values it
finds too short intervals.

K variants, N runs of a group; leading axes (...) are trials.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import optimize, special

Values = npt.NDArray[np.float64]

LEVEL = 0.95  # of all intervals
OUTLIER = 3.0
RNG_SEED = 0  # of Dunnett's p-values, which scipy integrates at random points
POWER = 0.8  # with which a number of seeds shows a difference
MOST_SEEDS = 1000


@dataclass(frozen=True)
class Test:
    """A variant's mean less the baseline's. `deviation` of one run from its group's mean is what it rests on."""

    difference: float
    half_width: float  # of the interval, to each side
    p_value: float
    deviation: float
    method: str


def pooled_deviation(groups: Sequence[Values]) -> tuple[Values, int]:
    """Standard deviation of a run over all groups (..., N) together, (...), and its degrees of freedom."""
    freedom = sum(values.shape[-1] - 1 for values in groups)
    if not freedom:
        return np.full(groups[0].shape[:-1] if groups else (), np.nan), 0
    squares = sum(values.var(axis=-1) * values.shape[-1] for values in groups)
    return np.sqrt(squares / freedom), freedom


def mean_half_width(deviation: float, freedom: int, count: int) -> float:
    """Half the width of the interval of the mean of `count` runs."""
    return float(special.stdtrit(freedom, (1 + LEVEL) / 2)) * deviation / math.sqrt(count)


def two_groups(baseline: Values, variant: Values) -> tuple[Values, Values, Values, npt.NDArray[np.bool_]]:
    """Difference of means, half width of its interval, p-value, and whether it goes by Welch's test, each (...).

    Args:
        baseline: (..., N). variant: (..., N'), both of two runs or more.
    """
    difference = variant.mean(axis=-1) - baseline.mean(axis=-1)
    deviations = [np.asarray(values.std(axis=-1, ddof=1)) for values in (baseline, variant)]
    welch = np.maximum(*deviations) > OUTLIER * np.minimum(*deviations)
    pooled, freedom = pooled_deviation([baseline, variant])
    error = pooled * math.sqrt(1 / baseline.shape[-1] + 1 / variant.shape[-1])
    apart, apart_freedom = _welch(baseline, variant)
    error, degrees = np.where(welch, apart, error), np.where(welch, apart_freedom, freedom)
    half_width = special.stdtrit(degrees, (1 + LEVEL) / 2) * error
    return difference, half_width, _two_sided(difference, error, degrees), welch


def paired(baseline: Values, variant: Values) -> tuple[Values, Values, Values]:
    """Difference, its standard error and degrees of freedom of runs (..., N) in pairs of equal seeds."""
    each = variant - baseline
    count = each.shape[-1]
    error = np.asarray(each.std(axis=-1, ddof=1)) / math.sqrt(count)
    return np.asarray(each.mean(axis=-1)), error, np.full(error.shape, count - 1.0)


def compare_groups(baseline: Values, variants: Mapping[str, Values], *, in_pairs: bool = False) -> dict[str, Test]:
    """Every variant against the baseline, each of two runs (N,) or more, by name.

    Args:
        in_pairs: the groups' values are in the order of the same seeds: they are compared in pairs, with Holm's
            correction.
    """
    names = sorted(variants)
    if in_pairs:
        spread = {name: float((variants[name] - baseline).std(ddof=1)) / math.sqrt(2) for name in names}
        parts = {name: paired(baseline, variants[name]) for name in names}
        return _holm(parts, len(names), spread, "in pairs of the same seed")
    if len(names) == 1:
        found = two_groups(baseline, variants[names[0]])
        difference, half_width, p_value, welch = (value.item() for value in map(np.asarray, found))
        deviation = pooled_deviation([baseline, variants[names[0]]])[0].item()
        return {names[0]: Test(difference, half_width, p_value, deviation, "Welch" if welch else "Student")}
    apart = _outliers(baseline, variants)
    together = {name: variants[name] for name in names if name not in apart}
    tests = _dunnett(baseline, together) if together else {}
    parts = {
        name: (variants[name].mean() - baseline.mean(), *_welch(baseline, variants[name])) for name in sorted(apart)
    }
    spread = {name: pooled_deviation([baseline, variants[name]])[0].item() for name in apart}
    return tests | _holm(parts, len(names), spread, "Welch with Holm")


def seeds_to_show(difference: float, deviation: float, comparisons: int = 1) -> int | None:
    """How many runs of each group show a true difference in four of five studies; None where over `MOST_SEEDS` would.

    Args:
        deviation: of one run. comparisons: how many variants are tested.
    """
    if deviation == 0:
        return 2 if difference else None

    def shown(count: int) -> bool:
        freedom, shift = 2 * count - 2, abs(difference) / deviation / math.sqrt(2 / count)
        limit = special.stdtrit(freedom, 1 - (1 - LEVEL) / 2 / comparisons)
        return bool(special.nctdtr(freedom, shift, limit) <= 1 - POWER)

    low, high = 1, 2
    while not shown(high):
        low, high = high, 2 * high
        if low >= MOST_SEEDS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if shown(middle) else (middle, high)
    return high if high <= MOST_SEEDS else None


def _welch(baseline: Values, variant: Values) -> tuple[Values, Values]:
    """Standard error of the difference of means, and Welch's degrees of freedom, each (...)."""
    return welch_sum([
        (values.var(axis=-1, ddof=1) / values.shape[-1], values.shape[-1] - 1) for values in (baseline, variant)
    ])  # fmt: skip


def welch_sum(parts: Sequence[tuple[Values | float, int]]) -> tuple[Values, Values]:
    """Root of a sum of variances, each with its degrees of freedom, and the sum's own (Welch 1947)."""
    total = np.asarray(sum(variance for variance, _ in parts), dtype=np.float64)
    squares = np.asarray(sum(np.square(variance) / freedom for variance, freedom in parts), dtype=np.float64)
    fewest = min(freedom for _, freedom in parts)
    known = np.divide(np.square(total), squares, out=np.full(total.shape, float(fewest)), where=squares > 0)
    return np.sqrt(total), known


def _two_sided(difference: Values, error: Values, freedom: Values) -> Values:
    """p-values of Student's t; without any deviation whatever differs differs."""
    error, difference = np.asarray(error), np.asarray(difference)
    infinite = np.where(difference == 0, 0.0, np.inf)
    ratio = np.divide(np.abs(difference), error, out=np.broadcast_to(infinite, error.shape).copy(), where=error > 0)
    return np.asarray(2 * special.stdtr(freedom, -ratio))


def _outliers(baseline: Values, variants: Mapping[str, Values]) -> set[str]:
    """The variants that can't share one deviation with the others and the baseline."""
    groups: dict[str | None, Values] = {None: baseline} | dict(variants.items())

    def is_outlier(name: str | None) -> bool:
        others, _ = pooled_deviation([groups[other] for other in groups if other != name])
        return bool(groups[name].std(ddof=1) > OUTLIER * others)

    return set(variants) if is_outlier(None) else {name for name in variants if is_outlier(name)}


def _holm(
    parts: Mapping[str, tuple[Values, Values, Values]], count: int, spread: Mapping[str, float], method: str
) -> dict[str, Test]:
    """Of (difference, standard error, degrees of freedom) by name: Holm's p-values and Bonferroni's intervals.

    Args:
        count: of all variants, of which these are some. spread: the deviation of a run in each.
    """
    alone = {name: float(_two_sided(*part)) for name, part in parts.items()}
    tests, highest = {}, 0.0
    for rank, name in enumerate(sorted(alone, key=lambda name: (alone[name], name))):
        difference, error, freedom = (float(value) for value in parts[name])
        highest = max(highest, min(1.0, alone[name] * (count - rank)))
        half_width = float(special.stdtrit(freedom, 1 - (1 - LEVEL) / 2 / count)) * error
        tests[name] = Test(difference, half_width, highest, spread[name], method)
    return tests


def _dunnett(baseline: Values, variants: Mapping[str, Values]) -> dict[str, Test]:
    names = sorted(variants)
    deviation, freedom = pooled_deviation([baseline, *(variants[name] for name in names)])
    differences = np.array([variants[name].mean() - baseline.mean() for name in names])  # (K,)
    shares = np.array([len(variants[name]) / (len(variants[name]) + len(baseline)) for name in names])  # (K,)
    errors = deviation * np.sqrt(1 / len(baseline) / shares)  # (K,): 1/n + 1/m = (1/m) / (n/(n+m))
    alone = _two_sided(differences, errors, np.full(errors.shape, float(freedom)))
    found = alone
    if deviation > 0 and len(names) > 1:
        from scipy import stats  # which takes half a second

        test = stats.dunnett(*(variants[name] for name in names), control=baseline, rng=np.random.default_rng(RNG_SEED))
        found = np.clip(test.pvalue, alone, np.minimum(1.0, len(names) * alone))  # between which it lies exactly
    halves = dunnett_limit(shares, freedom) * errors
    return {
        name: Test(float(difference), float(half), float(p_value), float(deviation), "Dunnett")
        for name, difference, half, p_value in zip(names, differences, halves, found, strict=True)
    }


def dunnett_limit(shares: Values, freedom: int) -> float:
    """The t that the largest of K differences from one baseline exceeds in 5 % of studies of no effect.

    By quadrature: scipy's own interval is searched among random integrals, and may end at a level of 94 %.

    Args:
        shares: (K,) N/(N + M) of each variant's N runs and the baseline's M.
    """
    if len(shares) == 1:
        return float(special.stdtrit(freedom, (1 + LEVEL) / 2))
    z, z_weights = np.polynomial.hermite_e.hermegauss(60)
    q, q_weights = np.polynomial.legendre.leggauss(120)
    scale = np.sqrt(special.chdtri(freedom, (1 - q) / 2) / freedom)[:, None, None]  # quantiles of the pooled deviation
    shared, own = np.sqrt(shares), np.sqrt(1 - shares)  # of a difference's error: the baseline's part is common to all

    def beyond(limit: float) -> float:
        ends = [special.ndtr((side * limit * scale - shared * z[:, None]) / own) for side in (1, -1)]  # (q, z, K)
        within = np.prod(ends[0] - ends[1], axis=-1) @ (z_weights / z_weights.sum())
        return float(within @ (q_weights / 2)) - LEVEL

    single = special.stdtrit(freedom, (1 + LEVEL) / 2)
    every = special.stdtrit(freedom, 1 - (1 - LEVEL) / 2 / len(shares))
    return float(optimize.brentq(beyond, 0.99 * single, 1.01 * every, xtol=1e-10))
