"""Several sources in one order: each has its share at any position, and continues where it was."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.batches.mixture import PARTS, Level, Mixture, levels_of, shares_of, tijdeman

WEIGHTS = st.lists(st.floats(0, 100), min_size=1, max_size=6).filter(lambda weights: sum(weights) > 0)


@settings(max_examples=100)
@given(WEIGHTS)
def test_shares_are_the_weights_to_within_a_part(weights: list[float]) -> None:
    shares = shares_of(weights)
    assert sum(shares) == PARTS
    for share, weight in zip(shares, weights, strict=True):
        exact = weight / sum(weights) * PARTS
        assert (share > 0) == (weight > 0)
        assert abs(share - exact) < 1 + len(weights) or share == 1


@pytest.mark.parametrize("weights", [[0.0], [-1.0, 2.0], [float("nan")], [float("inf"), 1.0]])
def test_weights_that_share_nothing_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights must not be negative"):
        shares_of(weights)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 200), min_size=1, max_size=7).filter(any))
def test_every_prefix_has_each_share_to_within_one(shares: list[int]) -> None:
    order = tijdeman(shares)
    period = sum(shares)
    assert len(order) == period
    counts = (order[:, None] == np.arange(len(shares))).cumsum(axis=0)
    exact = np.arange(1, period + 1)[:, None] * np.array(shares) / period
    assert np.abs(counts - exact).max() < 1
    assert counts[-1].tolist() == shares


STAGES = st.lists(st.tuples(st.integers(1, 400), WEIGHTS, st.integers(0, 300)), min_size=1, max_size=4)


@settings(max_examples=20, deadline=None)
@given(stages=STAGES, cuts=st.lists(st.integers(0, 900), max_size=5))
def test_any_pieces_give_what_the_whole_gives(stages: list[tuple[int, list[float], int]], cuts: list[int]) -> None:
    names = ["a", "b", "c", "d", "e", "f"]
    starts = itertools.accumulate([0, *(length + ramp for length, _, ramp in stages[:-1])])
    planned = [
        (start, dict(zip(names, weights, strict=False)), ramp)
        for start, (_, weights, ramp) in zip(starts, stages, strict=True)
    ]
    mixture = Mixture(levels_of(planned, names))
    sources, indices = mixture.at(0, 1_000)
    for source in range(len(names)):  # each source's own sequences in their order, none left out or twice
        assert indices[sources == source].tolist() == list(range(int((sources == source).sum())))
    borders = sorted({0, 1_000, *cuts})
    for first, stop in itertools.pairwise(borders):
        piece = mixture.at(first, stop - first)
        assert np.array_equal(piece[0], sources[first:stop])
        assert np.array_equal(piece[1], indices[first:stop])
        assert mixture.consumed(first).tolist() == [int((sources[:first] == s).sum()) for s in range(len(names))]
    # within a level no source is ever more than one off its share
    for level, following in itertools.zip_longest(mixture.levels, mixture.levels[1:]):
        part = sources[level.start : 1_000 if following is None else following.start]
        counts = (part[:, None] == np.arange(len(names))).cumsum(axis=0)
        exact = np.arange(1, len(part) + 1)[:, None] * np.array(level.shares) / PARTS
        assert not len(part) or np.abs(counts - exact).max() < 1


def test_the_billionth_position_is_found_at_once() -> None:
    mixture = Mixture([Level(0, shares_of([0.8, 0.2])), Level(10**9, shares_of([0.5, 0.5]))], first=[7, 0])
    sources, indices = mixture.at(10**9 - 2, 4)
    assert mixture.consumed(10**9 + 2).sum() == 10**9 + 2 + 7
    assert all(0.79e9 < index < 0.81e9 for index in indices[sources == 0])


def test_a_ramp_is_a_staircase_between_two_stages() -> None:
    levels = levels_of([(0, {"a": 1.0}, 0), (1_000, {"b": 1.0}, 2_000)], ["a", "b"])
    assert (levels[0].start, levels[1].start, levels[-1].start) == (0, 1_000, 3_000)
    assert levels[0].shares == (PARTS, 0)
    assert levels[-1].shares == (0, PARTS)
    assert len(levels) == 2 + 256
    rising = [level.shares[1] for level in levels]
    assert rising == sorted(rising)
