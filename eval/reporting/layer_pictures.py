"""What the layers do, against steps: a row a part of the model or a block, its colour the figure's value."""

from collections.abc import Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize

from common.layer_figures import KIND, by_name
from common.metrics_table import Values
from eval.reporting import drawing
from eval.reporting.drawing import STEPS, Picture, draw, short
from eval.reporting.run_data import RunData

TITLES = {
    "gradient_norm": "Gradient norm",
    "update_ratio": "Norm of the update over that of the weights",
    "weight_norm": "Weight norm",
    "activation_rms": "RMS of the residual stream after each block",
    "activation_max": "Largest activation after each block",
    "attention_logit": "Largest attention logit",
    "dead_units": "Fraction of the MLP's hidden units that are dead",
}
LOGARITHMIC = {"gradient_norm", "update_ratio", "weight_norm", "activation_rms", "activation_max"}
MOST_LABELS = 26  # rows that have their names


def layer_pictures(runs: Sequence[RunData]) -> dict[str, Picture]:
    """By file name; none of a run that has recorded no layer statistics."""
    pictures = {}
    for number, run in enumerate(runs):
        for figure, title in TITLES.items():
            steps, names, values = layer_values(run, figure)
            if not np.isfinite(values).any():
                continue
            name = f"layers-{figure}.png" if len(runs) == 1 else f"layers-{number}-{figure}.png"
            title += f" ({short(run.name)})" if len(runs) > 1 else ""
            paint = partial(_paint, steps=steps, names=names, values=values, logarithmic=figure in LOGARITHMIC)
            pictures[name] = draw(paint, title)
    return pictures


def layer_values(run: RunData, figure: str) -> tuple[Values, list[str], Values]:
    """Steps (n,), names of the rows, and the figure (rows, n); NaN where a record lacks it."""
    found = [(event["step"], by_name(event).get(figure, {})) for event in run.table.events if event.get("kind") == KIND]
    names = list(dict.fromkeys(name for _, values in found for name in values))
    values = np.array([[row.get(name, np.nan) for _, row in found] for name in names], dtype=np.float64)
    return np.array([step for step, _ in found], dtype=np.float64), names, values.reshape(len(names), len(found))


def _paint(axes: Axes, steps: Values, names: list[str], values: Values, logarithmic: bool) -> None:
    drawing.set_x(axes, STEPS)
    chosen = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), drawing.BUCKETS)).astype(int))
    steps, values = steps[chosen], values[:, chosen]
    width = float(np.median(np.diff(steps))) if len(steps) > 1 else 1.0
    edges = np.append(steps, steps[-1] + width)
    norm: Normalize | None = None
    if logarithmic:
        values = np.where(values > 0, values, np.nan)
        if np.isfinite(values).any():
            norm = LogNorm()
    image = axes.pcolormesh(edges, np.arange(len(names) + 1), values, norm=norm, cmap="viridis", rasterized=True)
    drawing.add_colorbar(axes, image)
    every = -(-len(names) // MOST_LABELS)
    axes.set_yticks(np.arange(0, len(names), every) + 0.5, [short(name, 16) for name in names[::every]], fontsize=7)
    axes.grid(visible=False)
