"""A drawn figure as SVG inside a page: its colours are the page's, its curves and bars show values under the pointer.

Colours of `PAGE_SHADES` and `SERIES_SHADES` become the page's own (templates/page.css), so one picture serves light and
dark pages. Numbers have one decimal, and maps of colours stay PNGs inside the picture: one takes 10 to 90 kB, however
long the run.
"""

import io
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from eval.reporting.html_parts import fill

PAGE_SHADES = {"#000000": "ink", "#666666": "soft", "#b0b0b0": "line", "#ffffff": "card"}
SERIES_SHADES = {
    "#0072b2": "blue",
    "#d55e00": "vermilion",
    "#009e73": "green",
    "#cc79a7": "purple",
    "#e69f00": "orange",
    "#56b4e9": "sky",
}
UNITS_AN_INCH = 72
DOTS_AN_INCH = 72  # of maps of colours
POINTS, FEWEST_POINTS = 240, 8  # that show their values: of a picture, of a curve
OPTIONS: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "longhaul"}  # the same picture is the same bytes


def to_svg(figure: Figure, label: str, *, spread: bool = False) -> Markup:
    """The figure as an element of a page. It is changed: for a PNG draw it before.

    Args:
        label: what it shows, for those who can't see it. spread: it takes the place of the one before on a wide page.
    """
    for patch in (figure.patch, *(axes.patch for axes in figure.axes)):
        patch.set_visible(False)
    figure.set_dpi(UNITS_AN_INCH)  # in which points are placed below
    file = io.StringIO()
    with rc_context(OPTIONS):
        figure.savefig(file, format="svg", dpi=DOTS_AN_INCH, metadata={"Date": None})
    width, height = figure.get_size_inches() * UNITS_AN_INCH
    bars = [bar for axes in figure.axes for bar in _bars(axes, height)]
    return fill(
        "figure.html",
        spread=spread,
        label=label.replace(r"\$", "$"),
        size=f"0 0 {width:.1f} {height:.1f}",
        drawing=_shaded(_compact(file.getvalue()), PAGE_SHADES if bars else PAGE_SHADES | SERIES_SHADES),
        points=[point for axes in figure.axes for point in _points(axes, height)],
        bars=bars,
    )


def _compact(svg: str) -> Markup:
    """What matplotlib has drawn, without prolog, root, metadata, ids, font names and digits that nobody sees."""
    content = svg[svg.index(">", svg.index("<svg")) + 1 : svg.rindex("</svg>")]
    content = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", content, flags=re.DOTALL)
    content = re.sub(r'<g id="[^"]*"', "<g", content).replace("xlink:href", "href")
    content = re.sub(r"font: (?:[a-z]+ )*(?:\d+ )?([\d.]+px) [^;\"]*", r"font-size: \1", content)
    content = re.sub(r'(?<=[ \n])(?:d|x|y|width|height)="[^"]*"', lambda found: _rounded(found[0], 1), content)
    content = re.sub(r'(?<=[ \n])transform="[^"]*"', lambda found: _rounded(found[0], 2), content)
    return Markup(re.sub(r"\n\s*", "\n", content).strip())  # of matplotlib, which has escaped all texts


def _rounded(attribute: str, digits: int) -> str:
    return re.sub(r"\d+\.\d+", lambda found: f"{float(found[0]):.{digits}f}".rstrip("0").rstrip("."), attribute)


def _shaded(content: Markup, shades: dict[str, str]) -> Markup:
    """With the page's colours. A text's white and black stay: they are on a bar, which keeps its own."""

    def shade(found: re.Match[str]) -> str:
        known = {} if found[1] == "<text" else shades
        style = re.sub(
            r"(?<=: )#[0-9a-f]{6}",
            lambda color: f"var(--{known[color[0]]})" if color[0] in known else color[0],
            found[3],
        )
        return f'{found[1]}{found[2]}style="{style}"'

    return Markup(re.sub(r'(<\w+)([^<>]*)style="([^"]*)"', shade, content))


def _points(axes: Axes, height: float) -> Iterator[tuple[str, str, str]]:
    """(x, y, what it says) of points on the curves."""
    lines = [line for line in axes.get_lines() if line.get_transform() == axes.transData and line.get_alpha() is None]
    for line in lines:
        x, y = (np.asarray(values, dtype=np.float64) for values in (line.get_xdata(), line.get_ydata()))
        places = axes.transData.transform(np.column_stack([x, y])) if len(x) else np.empty((0, 2))
        low, high = axes.bbox.padded(1).get_points()
        inside = np.flatnonzero(((places >= low) & (places <= high)).all(axis=1))  # NaN is not
        count = min(len(inside), max(FEWEST_POINTS, POINTS // len(lines)))
        for index in inside[np.unique(np.linspace(0, max(0, len(inside) - 1), count).astype(int))]:
            said = f"{_name(line, axes)}: {y[index]:.4g} at {_amount(x[index])} {axes.get_xlabel()}"
            yield f"{places[index, 0]:.1f}", f"{height - places[index, 1]:.1f}", said


def _name(line: Line2D, axes: Axes) -> str:
    """What a legend calls it, or else the axis."""
    label = str(line.get_label())
    return (axes.get_ylabel() if label.startswith("_") else label).replace(r"\$", "$")


def _amount(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e12 else f"{value:.4g}"


def _bars(axes: Axes, height: float) -> Iterator[tuple[str, str, str, str, str]]:
    """(x, y, width, height, what it says) of each horizontal bar."""
    for container in axes.containers:
        if isinstance(container, BarContainer):
            for bar in container:
                assert isinstance(bar, Rectangle)
                box = bar.get_window_extent()
                if box.width > 0:
                    said = f"{container.get_label()}: {bar.get_width():.1f} {axes.get_xlabel()}".replace(r"\$", "$")
                    numbers = (box.x0, height - box.y1, box.width, box.height)
                    x, y, wide, high = (f"{number:.1f}" for number in numbers)
                    yield x, y, wide, high, said
