"""How often a comparison of groups of runs is wrong: false alarms, coverage, planted multipliers."""

import math
from typing import Any, cast

import numpy as np
import pytest
from scipy import stats

from eval.comparison.differences import compare_groups, dunnett_limit, pooled_deviation, seeds_to_show, two_groups
from eval.comparison.multiplier import End, LossCurve, Multiplier, cross, multiplier, multiplier_of_curves

TRIALS = 4_000
PLANTED = 1.3
COMPUTE = np.linspace(1e15, 2e16, 16)


def losses_at(compute):
    """Nats a token, of 7 to 15 points a doubling's tenth: a small model's law."""
    return 1.7 + 2.5 * (compute / 1e15) ** -0.35


@pytest.mark.parametrize("count", [3, 5])
def test_two_equal_groups_give_few_false_alarms_and_their_intervals_cover(count):
    generator = np.random.default_rng(count)
    baseline, variant = generator.normal(3.0, 0.003, size=(2, TRIALS, count))

    difference, half_width, p_value, _ = two_groups(baseline, variant - 0.01)
    _, _, same, _ = two_groups(baseline, variant)

    assert 0.02 <= np.mean(same < 0.05) <= 0.065
    assert 0.93 <= np.mean(np.abs(difference + 0.01) <= half_width) <= 0.97
    assert np.array_equal(p_value < 0.05, np.abs(difference) > half_width)


def test_among_many_variants_of_no_effect_one_study_in_twenty_has_a_false_alarm():
    """The limit of the largest of four differences, which all rest on one baseline and one pooled deviation."""
    generator = np.random.default_rng(0)
    groups = generator.normal(size=(5, 20_000, 3))
    deviation, freedom = pooled_deviation(list(groups))
    errors = deviation * math.sqrt(2 / 3)
    largest = np.max(np.abs(groups[1:].mean(axis=-1) - groups[0].mean(axis=-1)) / errors, axis=0)

    limit = dunnett_limit(np.full(4, 0.5), freedom)

    assert 0.045 <= np.mean(largest > limit) <= 0.055
    assert dunnett_limit(np.full(2, 0.5), 10) == pytest.approx(2.57, abs=0.005)  # Dunnett's tables
    assert dunnett_limit(np.full(9, 0.5), 60) == pytest.approx(2.77, abs=0.005)


def test_several_variants_go_by_dunnett_and_one_by_student():
    generator = np.random.default_rng(1)
    baseline, *others = generator.normal(size=(4, 5))
    others[0] += 2
    variants = dict(zip("bcd", others, strict=True))

    found = compare_groups(baseline, variants)
    single = compare_groups(baseline, {"b": others[0]})["b"]

    expected = stats.dunnett(*others, control=baseline, rng=np.random.default_rng(5)).pvalue
    assert [found[name].p_value for name in "bcd"] == pytest.approx(list(expected), abs=1e-3)
    assert {test.method for test in found.values()} == {"Dunnett"}
    assert single.p_value == pytest.approx(stats.ttest_ind(others[0], baseline).pvalue, rel=1e-9)
    interval = stats.ttest_ind(others[0], baseline).confidence_interval(0.95)
    assert single.difference + single.half_width == pytest.approx(interval.high, rel=1e-9)


def test_a_group_of_a_much_larger_deviation_goes_by_welch_with_holm():
    generator = np.random.default_rng(2)
    baseline, b, c, wild = generator.normal(size=(4, 5))
    wild = wild * 30 + 100

    found = compare_groups(baseline, {"b": b, "c": c, "wild": wild})
    without = compare_groups(baseline, {"b": b, "c": c})

    assert found["b"] == without["b"]  # untouched by the other's deviation
    assert found["wild"].method == "Welch with Holm"
    assert found["wild"].p_value == pytest.approx(3 * stats.ttest_ind(wild, baseline, equal_var=False).pvalue)
    assert {test.method for test in compare_groups(wild, {"b": b, "c": c}).values()} == {"Welch with Holm"}
    assert compare_groups(baseline, {"wild": wild})["wild"].method == "Welch"


def test_pairs_of_seeds_take_out_what_a_seed_does_to_both():
    generator = np.random.default_rng(3)
    of_seed = generator.normal(size=5)
    baseline = of_seed + 0.01 * generator.normal(size=5)
    variant = of_seed + 0.1 + 0.01 * generator.normal(size=5)

    pairs, apart = (compare_groups(baseline, {"v": variant}, in_pairs=paired)["v"] for paired in (True, False))

    assert pairs.p_value == pytest.approx(stats.ttest_rel(variant, baseline).pvalue)
    assert pairs.p_value < 0.01 < 0.5 < apart.p_value


def test_groups_without_any_deviation_differ_or_do_not():
    same, other = np.full(3, 2.0), np.full(3, 2.5)

    assert compare_groups(same, {"v": other})["v"].p_value == 0
    assert compare_groups(same, {"v": same})["v"].p_value == 1
    both = compare_groups(same, {"v": other, "w": same})
    assert (both["v"].p_value, both["w"].p_value) == (0, 1)


def test_how_many_seeds_show_a_difference():
    assert [seeds_to_show(difference, 1.0) for difference in (3.1, 2.0, 1.0, 0.5)] == [3, 6, 17, 64]
    assert (seeds_to_show(2.0, 1.0, comparisons=5) or 0) > 6
    assert seeds_to_show(1e-4, 1.0) is None
    assert seeds_to_show(0.0, 0.0) is None
    generator = np.random.default_rng(4)
    baseline, variant = generator.normal(size=(2, TRIALS, 17))
    shown = two_groups(baseline, variant + 1.0)[2] < 0.05
    assert 0.77 <= np.mean(shown) <= 0.84  # four of five


def test_planted_multipliers_are_found_and_their_intervals_cover():
    """Noise of 0.003 nats, 3 seeds: half of it the run's own, half of it each validation's."""
    generator = np.random.default_rng(5)
    noise = 0.003 * math.sqrt(0.5) * (
        generator.normal(size=(TRIALS, 2, 3, 1)) + generator.normal(size=(TRIALS, 2, 3, len(COMPUTE)))
    )  # fmt: skip
    means = np.stack([losses_at(COMPUTE), losses_at(COMPUTE * PLANTED)])[:, None, :]
    found: list[Any] = []
    for losses in means + noise:
        curves = [LossCurve.of_runs(COMPUTE, group) for group in losses]
        ends = [End(COMPUTE[-1], group[:, -1].mean(), group[:, -1].std(ddof=1), 3) for group in losses]
        found.append(multiplier_of_curves(ends[0], curves[0], ends[1], curves[1]))

    assert all(isinstance(each, Multiplier) for each in found)
    assert 0.93 <= np.mean([each.interval[0] <= PLANTED <= each.interval[1] for each in found]) <= 0.97
    assert np.mean([abs(each.value / PLANTED - 1) <= 0.05 for each in found[:1000]]) >= 0.99


@pytest.mark.parametrize("planted", [1.3, 0.8])
def test_multipliers_from_budgets_cover(planted):
    generator = np.random.default_rng(6)
    budgets = 1e16 * np.array([0.5, 0.7, 1.0, 1.4, 2.0])
    found: list[Any] = []
    for _ in range(1_000):
        groups = [losses_at(budget) + generator.normal(0, 0.003, 3) for budget in (*budgets, 1e16 * planted)]
        amounts = (*budgets, 1e16)
        ends = [End(at, group.mean(), group.std(ddof=1), 3) for at, group in zip(amounts, groups, strict=True)]
        found.append(multiplier(LossCurve.of_budgets(ends[:-1]), ends[-1]))

    assert np.mean([abs(each.value / planted - 1) <= 0.05 for each in found]) >= 0.99
    assert 0.92 <= np.mean([each.interval[0] <= planted <= each.interval[1] for each in found]) <= 0.98


def test_a_multiplier_needs_a_curve_that_passes_the_loss():
    curve = LossCurve.of_runs(COMPUTE, losses_at(COMPUTE)[None])
    end = End(2e16, float(losses_at(2e16)), 0.0, 1)

    assert multiplier(end, curve) == Multiplier(cast(float, pytest.approx(1.0)), None)  # a single run has no interval
    assert "does not reach" in str(multiplier(End(1e16, 1.5, 0.01, 3), curve))
    assert "before the curve's first point" in str(multiplier(End(1e16, 9.0, 0.01, 3), curve))
    assert "single point" in str(multiplier(end, LossCurve.of_runs(COMPUTE[:1], losses_at(COMPUTE)[None, :1])))
    flat = LossCurve.of_runs(COMPUTE, np.full((3, len(COMPUTE)), 2.0))
    assert "does not fall" in str(multiplier(End(1e16, 2.0, 0.01, 3), flat))


def test_a_group_that_overfits_has_passed_its_final_loss_before_its_end():
    rising = losses_at(COMPUTE) + 0.5 * np.clip(COMPUTE / 1e16 - 1, 0, None) ** 2
    curve = LossCurve.of_runs(COMPUTE, np.stack([rising, rising + 0.001, rising - 0.001]))
    end = End(COMPUTE[-1], float(rising[-1]), 0.001, 3)

    assert multiplier_of_curves(end, curve, end, curve).value == pytest.approx(1.0)
    assert cross(curve, end.loss).amount < COMPUTE[-1] / 2
