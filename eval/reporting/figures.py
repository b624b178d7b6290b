"""The pictures of a report, of one run or several in the same plots, as PNGs and SVG."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from common.metrics_table import Values
from common.progress import format_duration
from common.time_spent import labels_of, time_spent
from eval.reporting import drawing
from eval.reporting.curves import smooth, thin_out
from eval.reporting.drawing import BUCKETS, FLOPS, GREY, LOSS_AXES, STEPS, AxisKind, Picture, draw, short, style_of
from eval.reporting.run_data import RunData
from eval.reporting.spike_marks import mark_spikes

PART_COLORS = {
    "compute": "#0072B2",
    "data": "#E69F00",
    "save": "#F0E442",
    "starting": "#CC79A7",
    "done_again": "#D55E00",
    "hung": "#661100",
    "other": "#999999",
    "stopped": "#DDDDDD",
}
EVALUATION_COLORS = ("#009E73", "#56B4E9", "#332288", "#AA4499", "#44AA99", "#882255")  # in turn
CUT_FRACTION = 0.03  # of a run, at its start, whose loss may be above the picture


def loss_panel(axes: Axes, runs: Sequence[RunData], axis: AxisKind) -> None:
    """Training loss smoothed, over the raw one where there is but one run, and validation loss."""
    tops, lows, first = [], [], 0.0
    for index, run in enumerate(runs):
        x = drawing.train_position(run, axis)
        if x is None:
            continue
        loss = run.table.column("loss")
        curve = smooth(loss, max(1, len(loss) // 60))
        alone = len(runs) == 1
        look = style_of(index, len(runs))
        if alone:
            axes.plot(*drawing.thinned(x, loss, axis), color=drawing.TRAINING, alpha=0.25, linewidth=0.8)
        leaks = " (not causal)" if run.leaks else ""
        label = "training, smoothed" if alone else f"{short(run.name)}{leaks}"
        axes.plot(*drawing.thinned(x, curve, axis), label=label, **look | {"linewidth": 1.6})
        validated = drawing.event_position(run, axis, "val_loss")
        val_loss = run.event_column("val_loss", "val_loss")
        if validated is not None and len(validated):
            look |= {"color": drawing.VALIDATION} if alone else {"linestyle": ":"}
            marker = "o" if len(validated) <= 60 else ""
            axes.plot(*drawing.thinned(validated, val_loss, axis), marker=marker, markersize=3.5,
                      label=f"validation{leaks}" if alone else None, **look | {"linewidth": 1.3})  # fmt: skip
            if alone and np.isfinite(val_loss[-1]):
                axes.annotate(f"{val_loss[-1]:.3f}", (validated[-1], val_loss[-1]), (0, 7), ha="right", fontsize=9,
                              textcoords="offset points", color=drawing.VALIDATION,
                              bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1})  # fmt: skip
        later = np.concatenate([curve[int(len(curve) * CUT_FRACTION) :], loss[-max(1, len(loss) // 2) :]])
        tops.append(np.nanmax(later) if np.isfinite(later).any() else np.nan)
        everything = np.concatenate([curve, val_loss])
        lowest = np.append(everything, np.nanpercentile(loss, 1) if alone and np.isfinite(loss).any() else np.nan)
        lows.append(np.nanmin(lowest) if np.isfinite(lowest).any() else np.nan)
        first = max(first, float(np.nanmax(everything)) if np.isfinite(everything).any() else 0.0)
    drawing.set_x(axes, axis)
    axes.set_ylabel("loss (nats per token)")
    if not axis.logarithmic:
        cut_top(axes, min(lows, default=np.nan), max(tops, default=np.nan), first)


def cut_top(axes: Axes, low: float, high: float, first: float) -> None:
    """Leave the first steep fall out of the picture where it would flatten all the rest, and note that."""
    if not (np.isfinite(low) and np.isfinite(high)) or first <= high + 0.5 * (high - low):
        return
    margin = 0.05 * (high - low) or 0.05
    axes.set_ylim(low - margin, high + margin)
    axes.text(
        0.99, 0.97, f"starts at {first:.2f}, above the picture", transform=axes.transAxes, ha="right", va="top",
        fontsize=8, color=GREY,
    )  # fmt: skip


def mark_restarts(axes: Axes, runs: Sequence[RunData], axis: AxisKind) -> None:
    """A tick at the foot of the axes wherever a run resumed after a stop."""
    for index, run in enumerate(runs):
        lives = run.table.lives[1:]
        if not lives:
            continue
        steps = np.array([life.step for life in lives], dtype=np.float64)
        times = np.array([life.start for life in lives])
        x = drawing.position(run, axis, steps, run.tokens_at(steps), times)
        if x is None or (axis.logarithmic and not (x > 0).any()):
            continue
        x = x[x > 0] if axis.logarithmic else x
        color = "black" if len(runs) == 1 else style_of(index)["color"]
        label = f"restart ({len(lives)})" if len(runs) == 1 else None
        axes.plot(x, np.zeros(len(x)), "|", color=color, markersize=12, markeredgewidth=1.3, label=label,
                  transform=axes.get_xaxis_transform(), clip_on=False)  # fmt: skip


def loss_pictures(runs: Sequence[RunData]) -> dict[str, Picture]:
    """Loss against each axis that the runs have figures for, by file name."""

    def painter(axis: AxisKind) -> Callable[[Axes], None]:
        def paint(axes: Axes) -> None:
            loss_panel(axes, runs, axis)
            mark_restarts(axes, runs, axis)
            mark_spikes(axes, runs, axis)

        return paint

    told = [axis for axis in LOSS_AXES if axis is not FLOPS or any(run.flops_per_token for run in runs)]
    return {f"loss-{axis.key}.png": draw(painter(axis), f"Loss against {axis.label}", inline=False) for axis in told}


@dataclass(frozen=True)
class Quantity:
    """Something recorded at every step."""

    key: str
    title: str
    label: str
    scale: float = 1.0
    logarithmic: bool = False
    smoothed: bool = True


QUANTITIES = (
    Quantity("lr", "Learning rate", "learning rate", smoothed=False),
    Quantity("grad_norm", "Gradient norm, before clipping", "norm", logarithmic=True),
    Quantity("tokens_per_second", "Throughput", "tokens per second"),
    Quantity("mfu", "Model FLOPs utilisation (PaLM's convention)", "MFU (%)", scale=100.0),
    Quantity("memory_gib", "Peak memory of a process", "GiB", smoothed=False),
)


def quantity_pictures(runs: Sequence[RunData]) -> dict[str, Picture]:
    """Each quantity that any of the runs recorded, against steps."""
    pictures = {}
    for quantity in QUANTITIES:
        columns = [run.table.column(quantity.key) * quantity.scale for run in runs]
        if any(np.isfinite(column).any() for column in columns):
            paint = partial(quantity_panel, runs=runs, quantity=quantity, columns=columns)
            pictures[f"step-{quantity.key.replace('_', '-')}.png"] = draw(paint, quantity.title)
    return pictures


def quantity_panel(axes: Axes, runs: Sequence[RunData], quantity: Quantity, columns: list[Values]) -> None:
    for index, (run, values) in enumerate(zip(runs, columns, strict=True)):
        steps = run.table.column("step")
        look = style_of(index, len(runs))
        label = short(run.name) if len(runs) > 1 else None
        if quantity.smoothed:
            if len(runs) == 1:
                axes.plot(*thin_out(steps, values, BUCKETS), alpha=0.3, **look | {"linewidth": 0.8})
            values = smooth(values, max(1, len(values) // 60))
        axes.plot(*thin_out(steps, values, BUCKETS), label=label, **look)
    drawing.set_x(axes, STEPS)
    axes.set_ylabel(quantity.label)
    if quantity.key == "grad_norm":
        for clip in {run.grad_clip for run in runs if run.grad_clip is not None}:
            axes.axhline(clip, color=GREY, linestyle="--", linewidth=1, label=f"clipped to {clip:g}")
    if quantity.logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 300 else (1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: drawing.plain(value)))


def time_picture(runs: Sequence[RunData]) -> Picture:
    """Where each run's time went, a bar a run."""
    spent = [time_spent(run.table) for run in runs]

    def paint(axes: Axes) -> None:
        left, rows, evaluation_colors = np.zeros(len(runs)), range(len(runs)), cycle(EVALUATION_COLORS)
        for part, label in labels_of(spent).items():
            color = PART_COLORS.get(part) or next(evaluation_colors)
            parts = [(entry.parts.get(part, 0.0), entry.total) for entry in spent]
            shares = np.array([100 * seconds / total if total else 0.0 for seconds, total in parts])
            if shares.max() < 0.05:
                continue
            bars = axes.barh(rows, shares, 0.6, left, color=color, label=short(label), edgecolor="white", linewidth=0.5)
            texts = [f"{share:.0f} %" if share >= 7 else "" for share in shares]
            axes.bar_label(bars, texts, label_type="center", fontsize=9, color=drawing.ink_on(color))
            left += shares
        axes.set_yticks(rows, [short(run.name, 24) for run in runs])
        axes.set_xlim(0, 100)
        axes.set_axisbelow(True)
        axes.set_xlabel("% of the time from the first start to the last record")
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)

    total = format_duration(spent[0].total) if len(runs) == 1 else f"{len(runs)} runs"
    return draw(paint, f"Where the time went ({total})", size=(drawing.SIZE_INCHES[0], 2.3 + 0.3 * len(runs)))
