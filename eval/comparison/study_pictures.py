"""The pictures of a study: differences against the noise floor, curves with bands, sweeps, the ladder."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from common.metrics_table import Values
from eval.comparison.measured_runs import curve_points
from eval.comparison.scaling_law import AHEAD, Ladder
from eval.comparison.study_report import Cell, StudyReport
from eval.comparison.tuning import Tuned
from eval.comparison.verdicts import LARGEST_P, Verdict
from eval.reporting import drawing
from eval.reporting.drawing import FLOPS, TOKENS, AxisKind, Picture, draw, picture_of, short, style_of

BETTER, WORSE, UNDECIDED = drawing.COLORS[2], drawing.COLORS[1], drawing.GREY
ROW_INCHES, MARGIN_INCHES = 0.34, 1.5
WIDE = (5.6, 4.2)
SHOWN_FROM = 0.25  # of the whole run: from there on the differences of curves set the picture's scale
EXTRAPOLATED = 60  # points
NARROW_CHARACTERS = 46  # of a line of a panel beside names


def study_pictures(report: StudyReport) -> dict[str, Picture]:
    """By file name, in the order of the page; a cell's are numbered by its place."""
    pictures = {}
    for place, cell in enumerate(report.cells):
        if (found := difference_picture(report, cell)) is not None:
            pictures[f"differences-{place}.png"] = found
        for kind, picture in _curves(report, cell).items():
            pictures[f"curves-{place}-{kind}.png"] = picture
        for option, picture in _sweeps(report, cell).items():
            pictures[f"sweep-{place}-{option}.png"] = picture
    ladders = {name: found for name, found in report.ladders.items() if isinstance(found, Ladder)}
    if ladders:
        pictures["ladder.png"] = draw(
            lambda axes: _paint_ladder(axes, ladders, report), "Final loss against compute", size=WIDE
        )
    return pictures


def difference_picture(report: StudyReport, cell: Cell) -> Picture | None:
    """Differences from the baseline with their intervals, beside them the multipliers; None where there are none."""
    entries = cell.comparison.entries if cell.comparison else {}
    names = [name for name in report.names if name in entries and entries[name].difference is not None]
    if not names:
        return None
    rows = sorted(names, key=lambda name: (entries[name].difference, name))
    multiplied = any(entries[name].multipliers.compute is not None for name in rows)

    def drawn(width: float, *, stacked: bool) -> Figure:
        """Both panels, the second below the first or beside it."""
        height = MARGIN_INCHES + ROW_INCHES * len(rows)
        count = 1 + multiplied
        figure = Figure(figsize=(width, height * (count if stacked else 1)), layout="constrained")
        grid: dict[str, Any] = {"nrows": count} if stacked else {"ncols": count, "width_ratios": [3, 2][:count]}
        panels = figure.subplots(**grid, sharey=True, squeeze=False).ravel()
        _paint_differences(panels[0], report, cell, rows, entries)
        if multiplied:
            _paint_multipliers(panels[1], report.study.baseline, rows, entries)
        for panel in panels:
            panel.margins(x=0.06)
            panel.set_yticks(range(len(rows)), [short(name, 20 if stacked else 30) for name in rows])
            if stacked:
                panel.set_xlabel(textwrap.fill(panel.get_xlabel(), NARROW_CHARACTERS))
                panel.set_title(textwrap.fill(panel.get_title("left"), NARROW_CHARACTERS))
        panels[0].set_ylim(len(rows) - 0.5, -0.5)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=1 if stacked else 2)
        return figure

    return picture_of(
        lambda: drawn(drawing.SIZE_INCHES[0], stacked=True),
        lambda: drawn(drawing.WIDE_INCHES, stacked=False),
        "Differences from the baseline",
        file=lambda: drawn(9.6 if multiplied else 6.6, stacked=False),
    )


def _paint_differences(
    axes: Axes, report: StudyReport, cell: Cell, rows: Sequence[str], entries: Mapping[str, Verdict]
) -> None:
    assert cell.comparison is not None
    noise = cell.comparison.noise_floor
    if noise is not None:
        axes.axvspan(
            -noise,
            noise,
            color=drawing.GREY,
            alpha=0.2,
            linewidth=0,
            label="noise floor: ± 1 deviation of a run over seeds",
        )
    axes.axvline(0, color="black", linewidth=1)
    for row, name in enumerate(rows):
        entry = entries[name]
        color = _color(entry, higher_is_better=report.metric.higher_is_better)
        _paint_interval(axes, row, entry.difference, entry.difference_interval, color)
    better = "higher" if report.metric.higher_is_better else "lower"
    axes.plot([], [], "o-", color=drawing.GREY, label="difference and 95 % interval; hollow: no verdict, one seed")
    axes.set_xlabel(
        f"{report.metric.name} less {short(report.study.baseline, 20)}'s, {report.unit} ({better} is better)"
    )
    axes.set_title(short(", ".join(filter(None, ["Difference from the baseline", cell.label])), 70))
    axes.xaxis.set_major_locator(MaxNLocator(6))


def _paint_multipliers(axes: Axes, baseline: str, rows: Sequence[str], entries: Mapping[str, Verdict]) -> None:
    axes.axvline(1, color="black", linewidth=1)
    for row, name in enumerate(rows):
        found = entries[name].multipliers.compute
        if found is not None:
            _paint_interval(axes, row, found.value, found.interval, drawing.COLORS[0])
    axes.set_xlabel(f"{short(baseline, 20)}'s compute over the variant's")
    axes.set_title("Compute multiplier")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _paint_interval(
    axes: Axes, row: int, value: float | None, interval: tuple[float, float] | None, color: str
) -> None:
    assert value is not None
    if interval is not None:
        axes.plot(interval, [row, row], color=color, linewidth=2.2, solid_capstyle="butt")
    axes.plot([value], [row], "o", color=color, markersize=6, markerfacecolor="white" if interval is None else color)


def _color(entry: Verdict, *, higher_is_better: bool) -> str:
    if entry.p_value is None or entry.difference is None or entry.p_value >= LARGEST_P:
        return UNDECIDED
    return BETTER if (entry.difference > 0) == higher_is_better else WORSE


def _curves(report: StudyReport, cell: Cell) -> dict[str, Picture]:
    """Losses, and losses less the baseline's, against tokens; losses against compute."""
    if not report.metric.is_loss:
        return {}
    found = {}
    for kind, axis in (("tokens", TOKENS), ("flops", FLOPS)):
        bands = _bands(report, cell, axis)
        if bands:
            paint = _painter(report, bands, axis, "loss")
            found[f"loss-{kind}"] = draw(paint, "Validation loss, mean and range over seeds", size=WIDE)
    baseline = report.study.baseline
    bands = _less_baseline(_bands(report, cell, TOKENS), baseline)
    if len(bands) > 1:
        paint = _painter(report, bands, TOKENS, f"loss less {short(baseline, 20)}'s")
        title = f"Loss less {short(baseline, 20)}'s mean, mean and range over seeds"
        found["difference"] = draw(paint, title, size=WIDE)
    return found


def _bands(report: StudyReport, cell: Cell, axis: AxisKind) -> dict[str, tuple[Values, Values]]:
    """Of each variant: amounts (P,) and losses (N, P) of the runs that may be ranked."""
    found = {}
    for name in report.names:
        runs = [run for run in cell.runs[name] if not run.why_unfit(report.metric)]
        points = curve_points(runs, report.metric.figure, axis.key) if runs else None
        if points is not None:
            found[name] = points
    return found


def _less_baseline(bands: Mapping[str, tuple[Values, Values]], baseline: str) -> dict[str, tuple[Values, Values]]:
    """At the amounts that both have, from the part of the run on that is shown."""
    if baseline not in bands:
        return {}
    at, losses = bands[baseline]
    means = dict(zip(at.tolist(), losses.mean(axis=0).tolist(), strict=True))
    found = {}
    for name, (amounts, own) in bands.items():
        both = np.array([amount in means and amount >= SHOWN_FROM * at[-1] for amount in amounts.tolist()])
        if both.sum() > 1:
            less = np.array([means[amount] for amount in amounts[both].tolist()])
            found[name] = (amounts[both], own[:, both] - less)
    return found


def _painter(report: StudyReport, bands: Mapping[str, tuple[Values, Values]], axis: AxisKind, label: str) -> Any:
    def paint(axes: Axes) -> None:
        absolute = label == "loss"
        for name, (amounts, losses) in bands.items():
            style = style_of(report.names.index(name)) | {"linewidth": 1.6}
            axes.plot(amounts, losses.mean(axis=0), label=short(name), **style)
            if len(losses) > 1:
                axes.fill_between(
                    amounts, losses.min(axis=0), losses.max(axis=0), color=style["color"], alpha=0.15, linewidth=0
                )
        drawing.set_x(axes, axis)
        if absolute:
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(MaxNLocator(6))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylabel(f"{label}, {report.unit}")

    return paint


def _sweeps(report: StudyReport, cell: Cell) -> dict[str, Picture]:
    """By option: the best mean of each value, of all variants that sweep it."""
    options = sorted({option for tuned in cell.tuned.values() for each in tuned.tried for option in each.choices})
    found = {}
    for option in options:
        lines = {
            name: line for name in report.names if len(line := _best_by_value(report, cell.tuned[name], option)) > 1
        }
        if lines:
            found[option] = draw(
                _sweep_painter(report, option, lines), f"Sweep of {option}; filled: compared at", size=WIDE
            )
    return found


def _best_by_value(report: StudyReport, tuned: Tuned, option: str) -> list[tuple[float, float, bool]]:
    """(value, the best mean, whether the variant is compared at it) of each number."""
    sign = -1 if report.metric.higher_is_better else 1
    best: dict[float, float] = {}
    for each in tuned.tried:
        value = each.choices.get(option)
        if each.mean is not None and isinstance(value, int | float):
            best[value] = min(best.get(value, each.mean), each.mean, key=lambda mean: sign * mean)
    return [(value, mean, tuned.chosen.get(option) == value) for value, mean in sorted(best.items())]


def _sweep_painter(report: StudyReport, option: str, lines: Mapping[str, list[tuple[float, float, bool]]]) -> Any:
    def paint(axes: Axes) -> None:
        for name, line in lines.items():
            style = style_of(report.names.index(name)) | {"linewidth": 1.4}
            axes.plot([value for value, _, _ in line], [mean for _, mean, _ in line], label=short(name), **style)
            for value, mean, chosen in line:
                axes.plot(
                    [value], [mean], "o", color=style["color"], markerfacecolor=style["color"] if chosen else "white"
                )
        if all(value > 0 for line in lines.values() for value, _, _ in line):
            axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        values = sorted({value for line in lines.values() for value, _, _ in line})
        axes.set_xticks(values, [f"{value:g}" for value in values], fontsize=8)
        axes.set_xlabel(option)
        axes.set_ylabel(f"{report.metric.name}, {report.unit}")

    return paint


def _paint_ladder(axes: Axes, ladders: Mapping[str, Ladder], report: StudyReport) -> None:
    for name, ladder in ladders.items():
        fitted, style = ladder.fitted, style_of(report.names.index(name)) | {"linewidth": 1.6}
        color, largest = style["color"], float(fitted.compute[-1])
        axes.plot(fitted.compute, fitted.losses, "o", color=color, label=short(name))
        inside = np.geomspace(float(fitted.compute[0]), largest, EXTRAPOLATED)
        beyond = np.geomspace(largest, largest * AHEAD[-1], EXTRAPOLATED // 4)
        axes.plot(inside, [fitted.law.at(each) for each in inside], color=color, linewidth=1.4)
        axes.plot(beyond, [fitted.law.at(each) for each in beyond], color=color, linewidth=1.4, linestyle=":")
        ranges = np.array([fitted.predict(float(each)).interval for each in beyond]).T
        axes.fill_between(beyond, ranges[0], ranges[1], color=color, alpha=0.12, linewidth=0)
        if ladder.beside:
            axes.plot(*np.array(ladder.beside).T, "x", color=color)
        held_out = ladder.held_out
        axes.plot([held_out.compute], [held_out.loss], "D", color=color, markerfacecolor="white")
    axes.plot([], [], ":", color=drawing.GREY, label="extrapolated, 95 % interval of a further point")
    axes.plot([], [], "D", color=drawing.GREY, markerfacecolor="white", label="largest, predicted by the others")
    axes.set_xscale("log")
    axes.set_xlabel("training FLOPs")
    axes.set_ylabel(f"final loss, {report.unit}")
