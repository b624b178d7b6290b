"""The curves of the live view: what a run learns, and its tokens per second."""

from collections.abc import Callable

import numpy as np

from common.metrics_table import MetricsTable, Values
from common.progress import format_count
from eval.reporting.curves import smooth
from eval.reporting.look import Look
from eval.reporting.terminal_plot import axis, plot


def curves_of(table: MetricsTable, width: int, height: int, look: Look) -> list[str]:
    """Loss, and tokens per second beside it where the terminal is wide, below it where it is high.

    Of a run that samples answers their reward instead of the loss, which says little there.
    """
    if height < 3 or width < 24:
        return []
    rewards = _rewards(table)
    learned = "reward" if len(rewards) else "loss"
    loss, rate = rewards if len(rewards) else table.column("loss"), table.column("tokens_per_second")
    loss, rate = (smooth(values, len(values) // 100) for values in (loss, rate))
    steps = table.column("step")
    ends = (float(steps[0]), float(steps[-1]))

    def drawn(title: str, values: Values, width: int, height: int, label: Callable[[float], str]) -> list[str]:
        """A title, the curve, and the axis of steps below it where there is room for both."""
        below = axis(ends, width, braille=look.unicode) if height >= 6 else []
        curve = plot(values, width, height - 1 - len(below), braille=look.unicode, label=label)
        return [title[:width], *curve, *below] if curve else []

    if width >= 100:
        left = width * 3 // 5
        first = drawn(learned, loss, left - 2, height, "{:.4g}".format)
        second = drawn("tokens/s", rate, width - left, height, format_count)
        pairs = zip(first or [""] * height, second or [""] * height, strict=False)
        return [_colored(f"{a:{left}}{b}".rstrip(), look) for a, b in pairs]
    parts = [(learned, loss, "{:.4g}".format)] + ([("tokens/s", rate, format_count)] if height >= 14 else [])
    lines: list[str] = []
    for title, values, label in parts:
        share = height // len(parts)
        lines += drawn(title, values, width, share, label)
    return [_colored(line, look) for line in lines]


def _rewards(table: MetricsTable) -> Values:
    """Of sampled answers, step by step; empty for a run that samples none."""
    curve = table.curves.get("reward")
    found = [] if curve is None else [curve.value(event) for event in table.of_kind("reward")]
    return np.array([value for value in found if value is not None], dtype=np.float64)


def _colored(line: str, look: Look) -> str:
    return look.paint(line, "36")
