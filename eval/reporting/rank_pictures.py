"""How long each rank computes in a step, beside the others: a slow one stands out."""

from collections.abc import Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes

from common.metric_fields import NUMBER
from common.metrics_table import Values
from eval.reporting import drawing
from eval.reporting.drawing import COLORS, GREY, STEPS, Picture, draw, short
from eval.reporting.run_data import RunData

FEW_RANKS = len(COLORS)  # as lines; more as a map of colours
MOST_RANKS = 4_096
SLOW = 1.15  # times the lower median, from which on a rank is named (docs/training.md)


def rank_pictures(runs: Sequence[RunData]) -> dict[str, Picture]:
    """A picture a run that has recorded several ranks' times, by file name."""
    pictures = {}
    for number, run in enumerate(runs):
        steps, times = rank_times(run)
        if times.shape[1] > 1:
            name = "ranks.png" if len(runs) == 1 else f"ranks-{number}.png"
            title = "Ranks: time to compute a step, over the lower median"
            title += f" ({short(run.name)})" if len(runs) > 1 else ""
            pictures[name] = draw(partial(_paint, steps=steps, times=times), title)
    return pictures


def rank_times(run: RunData) -> tuple[Values, Values]:
    """Steps (n,), and each rank's time over the lower median of all, (n, ranks); NaN where a start had fewer ranks."""
    records = [(event["step"], event["compute_seconds"]) for event in run.table.of_kind("compute_seconds")]
    rows = [(step, seconds) for step, seconds in records if _are_times(seconds)]
    times = np.full((len(rows), max((len(seconds) for _, seconds in rows), default=0)), np.nan)
    for row, (_, seconds) in enumerate(rows):
        values = np.array(seconds, dtype=np.float64)
        times[row, : len(values)] = values / max(np.sort(values)[(len(values) - 1) // 2], 1e-9)
    return np.array([step for step, _ in rows], dtype=np.float64), times


def _are_times(seconds: object) -> bool:
    """Whether this is what a trainer writes; a damaged file may hold anything."""
    return (
        isinstance(seconds, list)
        and 0 < len(seconds) <= MOST_RANKS
        and all(NUMBER.has(value) and value >= 0 for value in seconds)
    )


def _paint(axes: Axes, steps: Values, times: Values) -> None:
    drawing.set_x(axes, STEPS)
    if times.shape[1] <= FEW_RANKS:
        for rank, color in zip(range(times.shape[1]), COLORS, strict=False):
            axes.plot(*drawing.thinned(steps, times[:, rank], STEPS), ".-", color=color, label=f"rank {rank}")
        axes.axhline(SLOW, color=GREY, linestyle="--", linewidth=1, label=f"{SLOW:g}")
        axes.set_ylabel("times the lower median")
        return
    chosen = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), drawing.BUCKETS)).astype(int))
    image = axes.pcolormesh(
        np.append(steps[chosen], steps[-1] + 1), np.arange(times.shape[1] + 1), times[chosen].T, vmin=1.0, vmax=1.5,
        cmap="magma_r", rasterized=True,
    )  # fmt: skip
    drawing.add_colorbar(axes, image, "times the lower median")
    axes.set_ylabel("rank")
    axes.grid(visible=False)
