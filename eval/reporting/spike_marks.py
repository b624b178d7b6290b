"""What of a loss curve was a spike: steps that were skipped, and what was rolled back."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from eval.reporting import drawing
from eval.reporting.drawing import AxisKind, style_of
from eval.reporting.run_data import RunData

ROLLED_BACK, SKIPPED = "#D55E00", "#CC79A7"


def mark_spikes(axes: Axes, runs: Sequence[RunData], axis: AxisKind) -> None:
    """Draw what each run was rolled back over, and a mark at the top of the axes for each step that it skipped."""
    for index, run in enumerate(runs):
        only = len(runs) == 1
        for number, lost in enumerate(run.table.rollbacks):
            x = drawing.position(run, axis, lost.steps, lost.tokens, lost.times)
            if x is None or not len(x):
                continue
            label = f"rolled back ({len(run.table.rollbacks)})" if only and number == 0 else None
            color = ROLLED_BACK if only else style_of(index)["color"]
            axes.plot(*drawing.thinned(x, lost.losses, axis), color=color, linestyle="--", linewidth=1.2, alpha=0.8,
                      label=label)  # fmt: skip
        steps = np.array(skipped_steps(run), dtype=np.float64)
        known = run.table.column("step")
        places = np.searchsorted(known, steps)
        places = places[(places < len(known)) & (steps <= known[-1:].max(initial=0))]
        if not len(places):
            continue
        columns = (run.table.column(key)[places] for key in ("step", "tokens", "time"))
        x = drawing.position(run, axis, *columns)
        if x is None or (axis.logarithmic and not (x > 0).any()):
            continue
        x = x[x > 0] if axis.logarithmic else x
        axes.plot(x, np.ones(len(x)), "v", color=SKIPPED if only else style_of(index)["color"], markersize=6,
                  label=f"skipped ({len(x)})" if only else None, transform=axes.get_xaxis_transform(),
                  clip_on=False)  # fmt: skip


def skipped_steps(run: RunData) -> list[int]:
    """Steps that hold and were skipped as spikes."""
    return [
        event["step"] for event in run.table.events if event.get("kind") == "spike" and event.get("skipped") is True
    ]
