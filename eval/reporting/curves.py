"""Curves for people: smoothed, and thinned out to what a picture can show."""

import numpy as np

from common.metrics_table import Values


def smooth(values: Values, radius: int) -> Values:
    """The mean over `radius` values to each side: it does not lag. NaN values count for nothing.

    At the start, where loss falls fast, it reaches no further ahead than back.
    """
    there = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(there, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(there)])
    index = np.arange(len(values))
    reach = np.minimum(radius, index)
    low, high = index - reach, np.minimum(index + reach + 1, len(values))
    count = counts[high] - counts[low]
    return np.divide(sums[high] - sums[low], count, out=np.full(len(values), np.nan), where=count > 0)


def thin_out(x: Values, y: Values, buckets: int) -> tuple[Values, Values]:
    """At most two points for each of `buckets` equal parts of the x axis: the lowest and the highest, in their order.

    Drawn as a line they cover what all points would: no spike is lost. (The min-max decimation of oscilloscopes.)
    Points that are not finite are dropped.

    Args:
        x: (n,) not falling. y: (n,)
    """
    there = np.isfinite(x) & np.isfinite(y)
    x, y = x[there], y[there]
    if len(x) <= 2 * buckets:
        return x, y
    width = x[-1] - x[0]
    bucket = np.minimum((x - x[0]) / width * buckets, buckets - 1).astype(np.int64) if width > 0 else np.zeros(len(x))
    first = np.flatnonzero(np.diff(bucket, prepend=-1))  # where each bucket starts
    order = np.lexsort((y, bucket))  # by bucket, in each by y
    lowest, highest = order[first], order[np.append(first[1:], len(x)) - 1]
    chosen = np.unique(np.concatenate([lowest, highest]))
    return x[chosen], y[chosen]
