"""The order of windows: a permutation, everywhere at once, without memory, and no constant stride."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.batches.shuffle import Permutation, numbers_at, windows_at


@given(st.integers(1, 3000), st.integers(0, 2**31), st.integers(0, 1000))
def test_every_window_comes_exactly_once_in_an_epoch(size: int, seed: int, epoch: int) -> None:
    order = Permutation(size, seed, epoch)(np.arange(size))
    assert np.array_equal(np.sort(order), np.arange(size))


@given(st.integers(1, 500), st.integers(0, 100), st.integers(0, 2000), st.integers(1, 1500))
def test_jumping_there_gives_what_walking_there_gives(size: int, seed: int, first: int, count: int) -> None:
    walked = windows_at(0, first + count, size, seed)
    assert np.array_equal(windows_at(first, count, size, seed), walked[first:])


@given(
    st.lists(st.tuples(st.integers(1, 3_000), st.integers(0, 10**7)), min_size=1, max_size=20), st.integers(0, 2**62)
)
def test_several_sources_at_once_are_each_by_itself(places: list[tuple[int, int]], seed: int) -> None:
    counts, positions = np.array(places, dtype=np.int64).T
    alone = [int(windows_at(position, 1, count, seed)[0]) for count, position in places]
    assert numbers_at(positions, counts, seed).tolist() == alone


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    size = 1000
    orders = [windows_at(epoch * size, size, size, seed) for epoch in range(3) for seed in range(3)]
    for index, order in enumerate(orders):
        for other in orders[:index]:
            assert np.mean(order == other) < 0.02  # chance alone: 0.001


@pytest.mark.parametrize("size", [1000, 4096, 100_003])
def test_the_order_has_no_constant_stride_and_spreads_evenly(size: int) -> None:
    order = Permutation(size, seed=1, epoch=0)(np.arange(size))
    strides, counts = np.unique(np.diff(order) % size, return_counts=True)
    assert len(strides) > 0.5 * size  # a constant stride has one; chance has (1 - 1/e) of them
    assert counts.max() < 10
    # the windows of any tenth of an epoch lie evenly over the data: chi-square over ten bins
    for tenth in np.array_split(order, 10):
        observed = np.bincount(tenth * 10 // size, minlength=10)
        assert ((observed - len(tenth) / 10) ** 2 / (len(tenth) / 10)).sum() < 40  # p below 1e-5 for chance


@pytest.mark.parametrize("size", [2**32 + 15, 10**13 // 1024, 2**45 - 1])
def test_more_windows_than_fit_32_bits(size: int) -> None:
    positions = np.concatenate(
        [np.arange(1000), np.arange(size - 1000, size), np.arange(2**32 - 500, 2**32 + 500) % size]
    )
    positions = np.unique(positions)
    windows = Permutation(size, seed=7, epoch=3)(positions)
    assert len(np.unique(windows)) == len(positions)
    assert windows.min() >= 0
    assert windows.max() < size
    assert np.median(windows) == pytest.approx(size / 2, rel=0.15)
    # the billionth epoch is as near as the first
    assert len(windows_at(size * 10**5 + 17, 64, size, seed=7)) == 64


def test_the_order_stays_what_it_was() -> None:
    """Old checkpoints name their place in this order by a number: it must never change."""
    assert windows_at(0, 8, 1000, seed=1337).tolist() == [129, 108, 598, 804, 183, 376, 665, 188]
    assert windows_at(998, 4, 1000, seed=1337).tolist() == [95, 238, 730, 977]  # over an epoch's border
