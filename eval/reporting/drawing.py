"""What every picture of a report has in common: style, axes, sizes, and PNGs of few bytes.

Colours are Okabe and Ito's, which the colour-blind can tell apart. However many steps a run has, a curve has at most
two points for each of `BUCKETS` parts of its x axis.
"""

import io
import math
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from PIL import Image

from common.metrics_table import Values
from common.progress import format_count
from eval.reporting.curves import thin_out
from eval.reporting.html_parts import fill
from eval.reporting.inline_svg import to_svg
from eval.reporting.run_data import RunData

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
TRAINING, VALIDATION, GREY = COLORS[0], COLORS[1], "#666666"
INKS = ("#111111", "#ffffff")  # of a bar's number, on a dark page as well
TITLE_CHARACTERS = 62  # of a line
BUCKETS = 600  # parts of the x axis; a panel is about as many pixels wide on a screen
SIZE_INCHES, DPI, PALETTE = (5.6, 3.6), 170, 128
WIDE_INCHES = 11.4  # of a picture that has a row of a wide page for itself: twice the width, and the gap between two
HAIR_SPACE = "\u200a"
LEGEND_ROW_INCHES = 0.19
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "axes.xmargin": 0.01,
}


@dataclass(frozen=True)
class AxisKind:
    """What a curve is drawn against."""

    key: str
    label: str
    logarithmic: bool = False


STEPS, TOKENS = AxisKind("steps", "steps"), AxisKind("tokens", "training tokens")
FLOPS, HOURS = AxisKind("flops", "training FLOPs", logarithmic=True), AxisKind("hours", "hours of running")
LOSS_AXES = (STEPS, TOKENS, FLOPS, HOURS)


@dataclass(frozen=True)
class Picture:
    """The same figure as a file of its own and as an element of a page.

    Attributes:
        wide: draws it for a row of its own on a wide page.
    """

    png: bytes
    svg: Markup
    wide: Callable[[], Markup] = Markup


def position(run: RunData, axis: AxisKind, steps: Values, tokens: Values, times: Values) -> Values | None:
    """Records' positions on an axis; None where the run does not record them (FLOPs without its configuration)."""
    if axis is STEPS:
        return steps
    if axis is TOKENS:
        return tokens
    if axis is HOURS:
        return np.maximum.accumulate(run.hours(times))
    return None if run.flops_per_token is None else tokens * run.flops_per_token


def train_position(run: RunData, axis: AxisKind) -> Values | None:
    return position(run, axis, *(run.table.column(key) for key in ("step", "tokens", "time")))


def event_position(run: RunData, axis: AxisKind, key: str) -> Values | None:
    return position(run, axis, *(run.event_column(key, value) for value in ("step", "tokens", "time")))


def draw(
    paint: Callable[[Axes], None], title: str, *, size: tuple[float, float] = SIZE_INCHES, inline: bool = True
) -> Picture:
    """One panel: `paint` draws it, the legend goes below the axes, where it hides nothing."""

    def drawn(size: tuple[float, float]) -> Figure:
        return _panel(paint, title, size)

    return picture_of(lambda: drawn(size), lambda: drawn((WIDE_INCHES, size[1])), title, inline=inline)


def _panel(paint: Callable[[Axes], None], title: str, size: tuple[float, float]) -> Figure:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    paint(axes)
    axes.set_title("\n".join(textwrap.wrap(title, round(TITLE_CHARACTERS * size[0] / SIZE_INCHES[0]))))
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        room = 66 * size[0] / SIZE_INCHES[0]  # in characters, of which a line's sample takes six
        one_row = sum(len(label) + 6 for label in labels) <= room
        columns = len(labels) if one_row else max(1, int(room / (6 + max(map(len, labels)))))
        rows = math.ceil(len(labels) / columns)
        figure.set_size_inches(size[0], size[1] + LEGEND_ROW_INCHES * max(0, rows - 2))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    return figure


def picture_of(
    drawn: Callable[[], Figure],
    wide: Callable[[], Figure],
    label: str,
    *,
    file: Callable[[], Figure] | None = None,
    inline: bool = True,
) -> Picture:
    """All forms of a figure.

    Args:
        drawn: as narrow pages show it. wide: in a row of its own on a wide page. label: what it shows, for those who
            can't see it. file: as its own file shows it, if otherwise than `drawn`. inline: whether pages show it.
    """

    def spread() -> Markup:
        with rc_context(STYLE):
            return to_svg(wide(), label, spread=True)

    with rc_context(STYLE):
        figure = drawn()
        png = to_png(figure if file is None else file())
        return Picture(png, to_svg(figure, label), spread) if inline else Picture(png, Markup())


def show(pictures: Mapping[str, Picture], prefix: str, kind: str = "pictures") -> Markup:
    """Pictures whose file names start with this, two in a row of a wide page; one alone there fills it."""
    shown = [picture for name, picture in pictures.items() if name.startswith(prefix)]
    forms = [picture.svg for picture in shown]
    if kind == "across":
        forms = [form for picture in shown for form in (picture.svg, picture.wide())]
    elif len(shown) % 2:
        forms.append(shown[-1].wide())
    return fill("pictures.html", pictures=forms, kind=kind) if forms else Markup()


def to_png(figure: Figure) -> bytes:
    """The picture with a palette: a third of the bytes, and nobody sees the difference in line drawings."""
    figure.set_dpi(DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba())
    picture = io.BytesIO()
    drawn.convert("RGB").quantize(PALETTE).save(picture, format="png", optimize=True)
    return picture.getvalue()


def style_of(index: int, runs: int = 1) -> dict[str, Any]:
    """Colour, width and, after the colours have run out, line style of a run.

    The first are the widest: where curves overlap, the lower one shows at both sides.
    """
    width = 1.5 + 2.0 * (runs - 1 - index) / max(1, runs - 1)
    dashes = ("-", "--", ":")[index // len(COLORS) % 3]
    return {"color": COLORS[index % len(COLORS)], "linestyle": dashes, "linewidth": width}


def ink_on(color: str) -> str:
    """Which of `INKS` can be read better on a colour, by WCAG 2's contrast (relative luminance)."""

    def luminance(shade: str) -> float:
        channels = np.array(to_rgb(shade))
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return float(linear @ (0.2126, 0.7152, 0.0722))

    def contrast(ink: str) -> float:
        low, high = sorted((luminance(ink), luminance(color)))
        return (high + 0.05) / (low + 0.05)

    return max(INKS, key=contrast)


def short(name: str, length: int = 40) -> str:
    """A name as shown in a picture, its middle left out where it would not fit.

    To matplotlib a $ would start a formula, and a legend has no entry for names that start with an underscore.
    """
    half = (length - 1) // 2
    name = name if len(name) <= length else f"{name[:half]}…{name[-half:]}"
    return (HAIR_SPACE if name.startswith("_") else "") + name.replace("$", r"\$")


def plain(number: float) -> str:
    """A tick's text: 200K, not 200.0K; 1e+17 where counts have no letter any more."""
    if abs(number) >= 1e15:
        return f"{number:.0e}".replace("e+", "e")
    return format_count(round(number, 6)).replace(".0", "") if abs(number) >= 1000 else f"{number:g}"


def add_colorbar(axes: Axes, image: ScalarMappable, label: str = "") -> None:
    solids = axes.figure.colorbar(image, ax=axes, label=label).solids
    if solids is not None:
        solids.set_rasterized(True)


def set_x(axes: Axes, axis: AxisKind) -> None:
    axes.set_xlabel(axis.label)
    if axis.logarithmic:
        axes.set_xscale("log")
    elif axis is not HOURS:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))


def thinned(x: Values, y: Values, axis: AxisKind) -> tuple[Values, Values]:
    """`thin_out` by the axis as it is drawn; a logarithmic one has no place for 0."""
    if not axis.logarithmic:
        return thin_out(x, y, BUCKETS)
    log_x, y = thin_out(np.log10(x[x > 0]), y[x > 0], BUCKETS)
    return 10**log_x, y
