"""Losses by source of a mix, against tokens: a picture a run, a colour a source."""

from collections.abc import Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes

from common.metric_fields import VALIDATED
from common.metrics_table import Values
from eval.reporting import drawing
from eval.reporting.curves import smooth
from eval.reporting.drawing import TOKENS, Picture, draw, short, style_of
from eval.reporting.figures import CUT_FRACTION, cut_top
from eval.reporting.run_data import RunData


def source_pictures(runs: Sequence[RunData]) -> dict[str, Picture]:
    """By file name; none of a run without a mix."""
    pictures = {}
    for number, run in enumerate(runs):
        if not sources_of(run):
            continue
        name = "sources.png" if len(runs) == 1 else f"sources-{number}.png"
        title = "Loss by source" + (f" ({short(run.name)})" if len(runs) > 1 else "")
        pictures[name] = draw(partial(_panel, run=run), title)
    return pictures


def sources_of(run: RunData) -> list[str]:
    """The names of the sources that the run has recorded any loss of."""
    prefix = f"{VALIDATED}."
    validated = [curve.figure.removeprefix(prefix) for curve in run.table.curves if curve.figure.startswith(prefix)]
    return list(dict.fromkeys([*validated, *run.table.losses_by_source()]))


def _panel(axes: Axes, run: RunData) -> None:
    """Training losses as lines, those of validation as points on dotted ones."""
    trained, x = run.table.losses_by_source(), run.table.column("tokens")
    lows, tops, first = [np.nan], [np.nan], 0.0
    for index, name in enumerate(sources_of(run)):
        color = style_of(index)["color"]
        shown: list[Values] = []
        if name in trained:
            shown.append(smooth(trained[name], max(1, len(x) // 60)))
            axes.plot(*drawing.thinned(x, shown[0], TOKENS), color=color, linewidth=1.4, label=name)
        figure = f"{VALIDATED}.{name}"
        tokens, losses = run.event_column(figure, "tokens"), run.event_column(figure, figure)
        if len(tokens):
            label = None if shown else name
            axes.plot(tokens, losses, "o:", color=color, markersize=3.5, linewidth=1.2, label=label)
            shown.append(losses)
        for values in shown:
            later = values[int(len(values) * CUT_FRACTION) :]
            lows.append(np.nanmin(values) if np.isfinite(values).any() else np.nan)
            tops.append(np.nanmax(later) if np.isfinite(later).any() else np.nan)
            first = max(first, float(np.nanmax(values)) if np.isfinite(values).any() else 0.0)
    drawing.set_x(axes, TOKENS)
    axes.set_ylabel("loss (nats per token)")
    if np.isfinite(lows).any() and np.isfinite(tops).any():
        cut_top(axes, float(np.nanmin(lows)), float(np.nanmax(tops)), first)
