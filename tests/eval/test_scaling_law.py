"""A law of loss against compute is found again, its intervals cover, and too few points give none."""

import json

import numpy as np
import pytest

from eval.comparison.scaling_law import Ladder, Law, climb, fit_law

TRUE = Law(floor=1.7, scale=2.5 * 1e15**0.35, exponent=0.35)
COMPUTE = np.geomspace(1e15, 2e17, 8)
LOSSES = np.array([TRUE.at(each) for each in COMPUTE])
FURTHER = 2e18
TRIALS = 200


def test_a_law_is_found_again_and_the_order_of_points_changes_nothing():
    points = list(
        zip(COMPUTE.tolist(), (LOSSES * [1.001, 0.999, 1, 1.002, 0.998, 1, 1.001, 0.999]).tolist(), strict=True)
    )
    exact = fit_law(COMPUTE, LOSSES)
    found, again = climb(points), climb(points[::-1])

    assert exact.law.exponent == pytest.approx(0.35, abs=1e-6)
    assert exact.law.floor == pytest.approx(1.7, abs=1e-6)
    assert exact.predict(FURTHER).loss == pytest.approx(TRUE.at(FURTHER), rel=1e-6)
    assert isinstance(found, Ladder)
    assert isinstance(again, Ladder)
    assert json.dumps(found.as_json()) == json.dumps(again.as_json())
    assert abs(found.error) < 0.005  # the largest point, by a law of the others
    assert found.held_out.interval[0] < points[-1][1] < found.held_out.interval[1]
    assert found.fitted.exponents[0] < 0.35 < found.fitted.exponents[1]
    assert found.held_out.loss == fit_law(COMPUTE[:-1], np.array(points)[:-1, 1]).predict(COMPUTE[-1]).loss


def test_intervals_cover_the_law_and_the_loss_of_a_run_beyond_it():
    generator = np.random.default_rng(3)
    within = np.zeros(3)
    for noise in generator.normal(0, 0.003, size=(TRIALS, 9)):
        fitted = fit_law(COMPUTE, LOSSES * np.exp(noise[:8]))
        beyond = TRUE.at(FURTHER) * np.exp(noise[8])
        ranges = (fitted.exponents, fitted.floors, fitted.predict(FURTHER).interval)
        within += [low <= value <= high for (low, high), value in zip(ranges, (0.35, 1.7, beyond), strict=True)]

    assert np.all((within / TRIALS >= 0.91) & (within / TRIALS <= 0.985)), within / TRIALS


def test_a_law_without_a_floor_has_one_of_zero_in_its_interval():
    losses = 6 * (COMPUTE / 1e15) ** -0.1

    fitted = fit_law(COMPUTE, losses * [1.001, 0.999, 1, 1.002, 0.998, 1, 1.001, 0.999])

    assert fitted.floors[0] == 0
    assert fitted.exponents[0] < 0.1005
    assert fitted.law.at(1e17) == pytest.approx(6 * 100**-0.1, rel=0.005)


def test_too_few_points_of_falling_loss_are_refused():
    points = list(zip(COMPUTE.tolist(), LOSSES.tolist(), strict=True))

    assert climb(points[:5]) == "5 points of falling loss: a law needs 6 sizes or budgets or more"
    other_shape = [(each * 1.0001, loss + 0.1) for each, loss in points[1:]]
    assert climb([*points[:5], *other_shape[:4]]) == (
        "5 points of falling loss (not counting 4 above a loss of no more compute): "
        "a law needs 6 sizes or budgets or more"
    )
    found = climb([*points, *other_shape])
    assert isinstance(found, Ladder)
    assert found.beside == other_shape
    assert found.fitted.law == fit_law(COMPUTE, LOSSES).law
