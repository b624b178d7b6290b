"""A curve in characters: braille dots where the terminal can show them, else stars."""

import math
from collections.abc import Callable

import numpy as np

from common.metrics_table import Values

# bit of a braille pattern by (row, column) of its 4 x 2 dots
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
EMPTY = 0x2800
LABEL_WIDTH = 8
FALL_FRACTION = 0.05  # of the curve, at its start, that may be above the plot


def bucket_means(values: Values, buckets: int) -> Values:
    """Means over at most `buckets` runs of neighbours of (nearly) equal length; NaN values count for nothing.

    Args:
        values: (n,)

    Returns:
        (min(n, buckets),), NaN where a run has no finite value.
    """
    count = min(len(values), buckets)
    if count == 0:
        return np.empty(0)
    first = np.arange(count) * len(values) // count
    there = np.isfinite(values)
    sums = np.add.reduceat(np.where(there, values, 0.0), first)
    counts = np.add.reduceat(there.astype(np.int64), first)
    return np.divide(sums, counts, out=np.full(count, np.nan), where=counts > 0)


def plot(
    values: Values, width: int, height: int, *, braille: bool, label: Callable[[float], str] = "{:.4g}".format
) -> list[str]:
    """`height` lines of at most `width` characters: a curve with its scale at the left; empty where there is no room.

    Args:
        values: (n,) in equal distances. braille: use braille dots. label: how the scale is written.
    """
    columns = width - LABEL_WIDTH - 1
    if columns < 4 or height < 2 or not np.isfinite(values).any():
        return []
    buckets = columns * (2 if braille else 1)
    means = bucket_means(values, buckets)
    means = means[np.arange(buckets) * len(means) // buckets]  # a young run's few steps take up the whole width
    shown = means[int(len(means) * FALL_FRACTION) :]
    shown = shown if np.isfinite(shown).any() else means
    low, high = float(np.nanmin(shown)), float(np.nanmax(shown))
    if high - low <= 1e-6 * abs(high):  # all the same but for rounding
        low, high = low - 0.01 * abs(low) - 1e-9, high + 0.01 * abs(high) + 1e-9
    dot_rows = height * 4 if braille else height
    body = _braille if braille else _stars
    lines = body(_rows_of(means, low, high, dot_rows), columns, height)
    texts = [""] * height
    texts[0], texts[-1] = label(high), label(low)
    bar = "│" if braille else "|"
    return [f"{text[:LABEL_WIDTH]:>{LABEL_WIDTH}}{bar}{line}" for text, line in zip(texts, lines, strict=True)]


def axis(ends: tuple[float, float], width: int, *, braille: bool) -> list[str]:
    """The line below a plot of this width: its first step, the middle, the last. ends: the first step and the last."""
    columns = width - LABEL_WIDTH - 1
    if columns < 12:
        return []
    first, last = (f"{value:,.0f}" for value in ends)
    line, tick = list(("─" if braille else "-") * columns), "┴" if braille else "+"
    middle = f"{sum(ends) / 2:,.0f}"
    texts = [(0, first), ((columns - len(middle)) // 2, middle), (columns - len(last), last)]
    if columns < len(first) + len(middle) + len(last) + 8:
        texts = [texts[0], texts[-1]] if columns > len(first) + len(last) + 2 else [texts[-1]]
    for start, text in texts:
        line[max(0, start) : start + len(text)] = text
    corner = tick if texts[0][0] else ("└" if braille else "+")
    return [f"{'step':>{LABEL_WIDTH}}{corner}{''.join(line)}"]


def _rows_of(means: Values, low: float, high: float, rows: int) -> list[int | None]:
    """The row of each value, 0 at the top; values beyond the scale at its ends, None for NaN."""
    scaled = np.clip((high - means) / (high - low), 0.0, 1.0) * (rows - 1)
    return [None if math.isnan(row) else round(row) for row in scaled.tolist()]


def _braille(rows: list[int | None], columns: int, height: int) -> list[str]:
    cells = np.full((height, columns), EMPTY, dtype=np.int64)
    before: int | None = None
    for x, row in enumerate(rows):
        if row is not None:
            start = row if before is None else before
            step = 1 if row >= start else -1
            for y in range(start + step, row + step, step) if start != row else (row,):  # a line without holes
                cells[y // 4, x // 2] |= DOTS[y % 4][x % 2]
        before = row
    return ["".join(map(chr, line)).rstrip(chr(EMPTY)) for line in cells.tolist()]


def _stars(rows: list[int | None], columns: int, height: int) -> list[str]:
    cells = [[" "] * columns for _ in range(height)]
    for x, row in enumerate(rows):
        if row is not None:
            cells[row][x] = "*"
    return ["".join(line).rstrip() for line in cells]
