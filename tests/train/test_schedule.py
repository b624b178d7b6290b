"""Learning-rate schedules against their definitions."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.optimization.schedule import in_steps, plan_course
from train.settings.sections import ScheduleConfig


def test_cosine_against_the_textbook() -> None:
    config = ScheduleConfig("cosine", warmup=10, final_lr_fraction=0.1)
    for step in range(1, 101):
        if step <= 10:
            expected = 6e-4 * step / 10
        else:
            expected = 6e-5 + 0.5 * (6e-4 - 6e-5) * (1 + math.cos(math.pi * (step - 10) / 90))
        assert plan_course(config, 6e-4, 100).rate(step) == pytest.approx(expected, rel=1e-12)


def test_warmup_stable_decay() -> None:
    config = ScheduleConfig("wsd", warmup=0.1, decay=0.2, final_lr_fraction=0.0)
    rates = [plan_course(config, 1.0, 100).rate(step) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert rates[10:80] == [1.0] * 70
    assert rates[80:] == pytest.approx([1 - step / 20 for step in range(1, 21)])


def test_the_stable_part_is_the_same_for_a_longer_run() -> None:
    """What lets a finished stable phase be extended."""
    config = ScheduleConfig("wsd", warmup=5, decay=10)
    assert [plan_course(config, 1.0, 50).rate(step) for step in range(1, 41)] == [
        plan_course(config, 1.0, 500).rate(step) for step in range(1, 41)
    ]


@given(st.sampled_from(["cosine", "wsd", "constant"]), st.integers(0, 50), st.floats(0, 1), st.integers(1, 200))
def test_rates_stay_between_nothing_and_the_peak(kind: str, warmup: int, final: float, max_steps: int) -> None:
    config = ScheduleConfig(kind, warmup=warmup, decay=0.3, final_lr_fraction=final)  # type: ignore[arg-type]
    rates = [plan_course(config, 1.0, max_steps).rate(step) for step in range(1, max_steps + 1)]
    assert all(0 <= rate <= 1 + 1e-12 for rate in rates)
    if kind != "constant" and max_steps > warmup + 1:
        assert rates[-1] == pytest.approx(final, abs=1e-9)


@pytest.mark.parametrize(("kind", "middle"), [("constant", 1.0), ("linear", 0.25 + 0.75 * 0.5), ("cosine", 0.625)])
def test_weight_decay_falls_by_a_schedule_of_its_own(kind: str, middle: float) -> None:
    config = ScheduleConfig("wsd", 10, weight_decay=kind, final_weight_decay_fraction=0.25)  # type: ignore[arg-type]
    course = plan_course(config, 1e-3, 100)
    last = 1.0 if kind == "constant" else 0.25
    assert [course.decay_factor(step) for step in (50, 100)] == pytest.approx([middle, last])
    assert kind == "constant" or 0.98 < course.decay_factor(1) < 1


def test_independent_weight_decay_is_the_same_in_every_step_that_learns() -> None:
    config = ScheduleConfig("cosine", 10, final_lr_fraction=0.0, independent_weight_decay=True)
    course = plan_course(config, 1e-3, 100)
    assert [course.rate(step) * course.decay_factor(step) for step in range(1, 100)] == pytest.approx([1e-3] * 99)
    assert (course.rate(100), course.decay_factor(100)) == (0.0, 0.0)


def test_lengths_are_steps_or_fractions() -> None:
    assert in_steps(700, 10_000) == 700
    assert in_steps(0.07, 10_000) == 700
    assert in_steps(1, 10_000) == 1
    with pytest.raises(ValueError, match=r"schedule.warmup is 1.5"):
        ScheduleConfig(warmup=1.5)
