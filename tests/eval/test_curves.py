"""Thinning out and smoothing, against their definitions."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from eval.reporting.curves import thin_out

numbers = st.floats(-1e6, 1e6) | st.just(float("nan"))


@given(st.lists(st.tuples(st.floats(0, 100), numbers), max_size=300), st.integers(1, 20))
def test_thinning_keeps_every_buckets_extremes_and_few_points(points: list[tuple[float, float]], buckets: int) -> None:
    x = np.array(sorted(point[0] for point in points))
    y = np.array([point[1] for point in points])

    kept_x, kept_y = thin_out(x, y, buckets)

    there = np.isfinite(y)
    x, y = x[there], y[there]
    assert len(kept_x) == len(kept_y) <= max(2 * buckets, 0)
    assert (np.diff(kept_x) >= 0).all()
    pairs = set(zip(x.tolist(), y.tolist(), strict=True))
    assert set(zip(kept_x.tolist(), kept_y.tolist(), strict=True)) <= pairs, "no point is made up"
    if len(x) and x[-1] > x[0]:
        for bucket in range(buckets):
            inside = np.minimum((x - x[0]) / (x[-1] - x[0]) * buckets, buckets - 1).astype(int) == bucket
            kept_inside = np.minimum((kept_x - x[0]) / (x[-1] - x[0]) * buckets, buckets - 1).astype(int) == bucket
            if inside.any():
                assert kept_y[kept_inside].min() == y[inside].min()
                assert kept_y[kept_inside].max() == y[inside].max()
    elif len(x):
        assert (kept_y.min(), kept_y.max()) == (y.min(), y.max())


def test_one_spike_in_a_million_points_stays() -> None:
    y = np.zeros(1_000_000)
    y[123_456] = 9.0
    x, thinned = thin_out(np.arange(1e6), y, 600)
    assert len(x) <= 1200
    assert x[thinned == 9.0].tolist() == [123_456]
