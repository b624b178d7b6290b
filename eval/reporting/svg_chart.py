"""The loss as one figure inside the page: SVG that shows values under the pointer, axes to switch between, and a legend
whose runs can be clicked away. Without JavaScript: inputs that style.css's rules look at.
"""

import math
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from common.metrics_table import Values
from eval.reporting import drawing
from eval.reporting.curves import smooth, thin_out
from eval.reporting.drawing import COLORS, FLOPS, LOSS_AXES, AxisKind, plain
from eval.reporting.html_parts import fill, text
from eval.reporting.inline_svg import PAGE_SHADES, SERIES_SHADES
from eval.reporting.run_data import RunData

WIDTH, HEIGHT = 900, 440
LEFT, RIGHT, TOP, BOTTOM = 62, 34, 38, 50  # around the plot
POINTS = 80  # of a curve that show their values
CURVE_BUCKETS = 300
CUT_FRACTION = 0.03  # of a run, at its start, whose loss may be above the picture


def loss_chart(runs: Sequence[RunData]) -> Markup:
    """A figure with the loss of all runs against each axis that they have figures for."""
    axes = [axis for axis in LOSS_AXES if axis is not FLOPS or any(run.flops_per_token for run in runs)]
    drawn = {axis: svg for axis in axes if (svg := _svg(runs, axis))}
    if not drawn:
        return Markup()
    several = [(run.name, _color(number), run.leaks) for number, run in enumerate(runs if len(runs) > 1 else ())]
    return fill(
        "chart.html",
        axes=[(axis.key, axis.label, Markup(svg)) for axis, svg in drawn.items()],
        runs=several,
        legend=((_color(0), "training, smoothed"), (_color(1), "validation")),
    )


def _color(number: int) -> str:
    color = COLORS[number % len(COLORS)].lower()
    return f"var(--{(PAGE_SHADES | SERIES_SHADES)[color]})"


def _svg(runs: Sequence[RunData], axis: AxisKind) -> str:
    """One picture; "" where no run has a finite point."""
    curves = [_curves(run, axis) for run in runs]
    whole = [curve for pair in curves for curve in pair if len(curve[0])]
    if not whole:
        return ""
    xs, scale_y = np.concatenate([x for x, _ in whole]), _loss_range(curves)
    low_x, high_x = float(xs.min()), float(xs.max())
    high_x = high_x if high_x > low_x else low_x + 1.0
    frame = (low_x, high_x, *scale_y)
    parts = [_grid(frame, axis)]
    for number, ((x, y), (val_x, val_y)) in enumerate(curves):
        color = _color(number)
        own = [_line(x, y, frame, color, axis, 2.2 if len(runs) == 1 else 1.8)]
        own.append(_dots(x, y, frame, color, axis, runs[number].name, "training", radius=5, seen=False))
        color = _color(1) if len(runs) == 1 else color
        own += [_line(val_x, val_y, frame, color, axis, 1.4)] if len(runs) == 1 else []
        own.append(_dots(val_x, val_y, frame, color, axis, runs[number].name, "validation", radius=4, seen=True))
        parts.append(f'<g class="run-{number}">{"".join(own)}</g>')
    label = f"Loss against {axis.label}"
    return (
        f'<svg class="of-{axis.key}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(label)}">'
        f"{_plot_area(axis)}{''.join(parts)}"
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 8}" text-anchor="middle">'
        f"{text(axis.label)}</text></svg>"
    )


Curve = tuple[Values, Values]


def _curves(run: RunData, axis: AxisKind) -> tuple[Curve, Curve]:
    """Smoothed training loss and validation loss: x (as it is drawn: logarithms of FLOPs) and y, finite and thinned."""
    loss = run.table.column("loss")
    x, val_x = drawing.train_position(run, axis), drawing.event_position(run, axis, "val_loss")
    pairs = []
    for where, values in (
        (x, smooth(loss, max(1, len(loss) // 60))),
        (val_x, run.event_column("val_loss", "val_loss")),
    ):
        if where is None:
            pairs.append((np.empty(0), np.empty(0)))
            continue
        if axis.logarithmic:
            where, values = np.log10(where[where > 0]), values[where > 0]
        pairs.append(thin_out(where, values, CURVE_BUCKETS))
    return pairs[0], pairs[1]


def _loss_range(curves: Sequence[tuple[Curve, Curve]]) -> tuple[float, float]:
    """From the lowest loss to the highest after the first steep fall."""
    later = [y[math.ceil(len(y) * CUT_FRACTION) if len(y) > 1 else 0 :] for pair in curves for _, y in pair]
    everything = np.concatenate([y for pair in curves for _, y in pair])
    low, high = float(everything.min()), float(np.concatenate(later).max())
    margin = 0.04 * (high - low) or 0.05
    return low - margin, high + margin


def _place(x: Values, y: Values, frame: tuple[float, float, float, float]) -> Curve:
    """Where points are in the picture, or above it."""
    low_x, high_x, low_y, high_y = frame
    across = LEFT + (x - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT)
    down = TOP + (high_y - y) / (high_y - low_y) * (HEIGHT - TOP - BOTTOM)
    return across, down


def _plot_area(axis: AxisKind) -> str:
    """What cuts lines off that come from above: along the top edge they would show losses that no step had."""
    size = f'y="{TOP}" width="{WIDTH}" height="{HEIGHT - TOP}"'
    return f'<clipPath id="plot-{axis.key}"><rect {size}/></clipPath>'


def _line(
    x: Values, y: Values, frame: tuple[float, float, float, float], color: str, axis: AxisKind, width: float
) -> str:
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(*_place(x, y, frame), strict=True))
    look = f'fill="none" style="stroke: {color}" stroke-width="{width}" clip-path="url(#plot-{axis.key})"'
    return f'<polyline points="{points}" {look}/>' if points else ""


def _dots(
    x: Values, y: Values, frame: tuple[float, float, float, float], color: str, axis: AxisKind, name: str, what: str,
    *, radius: int, seen: bool,
) -> str:  # fmt: skip
    """Points that show their values under the pointer; unseen ones appear there. None lies above the picture."""
    x, y = x[y <= frame[3]], y[y <= frame[3]]
    chosen = np.unique(np.linspace(0, len(x) - 1, min(len(x), POINTS)).astype(int)) if len(x) else np.empty(0, int)
    dots = []
    for value, loss, a, b in zip(x[chosen], y[chosen], *_place(x[chosen], y[chosen], frame), strict=True):
        at = 10**value if axis.logarithmic else value
        title = text(f"{name}: {what} loss {loss:.4f} at {_amount(float(at), axis)} {axis.label}")
        dots.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="{radius}"><title>{title}</title></circle>')
    return f'<g class="{"seen" if seen else "unseen"}" style="fill: {color}">{"".join(dots)}</g>' if dots else ""


def _amount(value: float, axis: AxisKind) -> str:
    return f"{value:.3g}" if axis.logarithmic or axis is drawing.HOURS else f"{value:,.0f}"


def _grid(frame: tuple[float, float, float, float], axis: AxisKind) -> str:
    low_x, high_x, low_y, high_y = frame
    parts = []
    for value in _ticks(low_y, high_y, 6):
        y = float(_place(np.array([low_x]), np.array([value]), frame)[1][0])
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 5:.1f}" text-anchor="end">{value:g}</text>')
    for value in _ticks(low_x, high_x, 6):
        x = float(_place(np.array([value]), np.array([low_y]), frame)[0][0])
        label = f"{10**value:.2g}".replace("e+", "e") if axis.logarithmic else plain(value)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{label}</text>')
    parts.append('<text x="8" y="24">nats per token</text>')
    return f'<g class="grid">{"".join(parts)}</g>'


def _ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` round numbers between two."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step)
    return [round(number * step, 12) for number in range(first, math.floor(high / step) + 1)]
