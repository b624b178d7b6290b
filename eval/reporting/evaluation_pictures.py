"""A picture of each curve that evaluations other than validation gave, with published models beside HellaSwag's."""

from collections.abc import Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes

from common.curves import VALIDATION, Curve
from eval.reporting import drawing
from eval.reporting.drawing import GREY, TOKENS, Picture, draw, short, style_of
from eval.reporting.published_score import PICTURE, PUBLISHED, examples_of, is_official
from eval.reporting.references import CHANCE, lines_for
from eval.reporting.run_data import RunData


def evaluation_pictures(runs: Sequence[RunData]) -> dict[str, Picture]:
    """By file name, in the order in which the runs describe their curves."""
    pictures = {}
    for curve in curves_of(runs):
        if curve is PUBLISHED:
            pictures[PICTURE] = published_picture(runs)
        else:
            pictures[f"evaluation-{curve.figure.replace('_', '-')}.png"] = _picture(curve, runs)
    return pictures


def curves_of(runs: Sequence[RunData]) -> list[Curve]:
    """All but validation's and its sources' that any of the runs has records of, as the last one describes them."""
    known = {curve.figure: curve for run in runs for curve in run.table.curves if curve.kind != VALIDATION.kind}
    return [c for c in known.values() if any(run.table.of_kind(c.figure) for run in runs)]


def _picture(curve: Curve, runs: Sequence[RunData]) -> Picture:
    better = " (higher is better)" if curve.higher_is_better else ""
    return draw(partial(_panel, curve=curve, runs=runs), f"{short(curve.label)}{better}")


def _panel(axes: Axes, curve: Curve, runs: Sequence[RunData]) -> None:
    """The figure against tokens, with its standard error, a curve a run."""
    for index, run in enumerate(runs):
        tokens, values = run.event_column(curve.figure, "tokens"), run.event_column(curve.figure, curve.figure)
        color = style_of(index)["color"]
        if len(tokens):
            axes.plot(tokens, values, "o-", markersize=3.5, linewidth=1.4, label=short(run.name), color=color)
            if curve.error is not None:
                error = run.event_column(curve.figure, curve.error)
                axes.fill_between(tokens, values - error, values + error, color=color, alpha=0.15, linewidth=0)
    drawing.set_x(axes, TOKENS)
    axes.set_ylabel(curve.figure)


def published_picture(runs: Sequence[RunData]) -> Picture:
    """HellaSwag's, with what GPT-2 and GPT-3 of the nearest size reach."""
    official = all(is_official(event) for run in runs for event in run.table.comparable(PUBLISHED.figure))
    references = lines_for(max(run.parameters or 0 for run in runs) or None) if official else []

    def paint(axes: Axes) -> None:
        _panel(axes, PUBLISHED, runs)
        for reference, dashes in zip(references, ("--", "-."), strict=False):
            axes.axhline(reference.hellaswag or np.nan, color=GREY, linestyle=dashes, linewidth=1.2,
                         label=f"{reference.model}: {reference.hellaswag:.4g}")  # fmt: skip
        axes.axhline(CHANCE, color=GREY, linestyle=":", linewidth=1.2, label=f"chance: {CHANCE:g}")
        axes.set_ylabel("acc_norm")

    form = "" if official else ", text form"
    return draw(paint, f"{PUBLISHED.label}{form} ({examples_of(runs)} examples)")
