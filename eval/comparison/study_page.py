"""A study's page: one HTML file that needs nothing else. It has no date: the same results are the same bytes."""

import base64
from collections.abc import Callable, Mapping
from pathlib import Path

from eval.comparison.scaling_law import AHEAD
from eval.comparison.study_report import Cell, StudyReport
from eval.comparison.study_tables import (
    COSTS,
    RESULTS,
    costs,
    differing,
    ladder_rows,
    noise_floor,
    results,
    sentences,
)
from eval.reporting.html_parts import table, text

STYLE = Path(__file__).resolve().parents[1] / "reporting" / "page.css"


def study_page(report: StudyReport, pictures: Mapping[str, bytes]) -> str:
    """pictures: PNGs by file name, as `study_pictures` names them."""
    parts = [
        ("Noise floor", "noise", _each_cell(report, _noise)),
        ("Variants", "variants", _each_cell(report, lambda _, cell, place: _variants(report, cell, place, pictures))),
        ("Curves", "curves", _each_cell(report, lambda _, __, place: _show(pictures, f"curves-{place}-"), note=CURVES)),
        ("Memory and speed", "costs", _each_cell(report, _costs, note=SPEED)),
        ("Tuned options", "tuning", _each_cell(report, lambda _, cell, place: _tuning(report, cell, place, pictures))),
        ("Ladder", "ladder", _ladder(report, pictures)),
        ("What differs in the configurations", "configuration", _each_cell(report, _configurations)),
        ("Runs that are not ranked", "absent", _absent(report)),
        ("How to read this", "method", "".join(f'<p class="soft">{text(note)}</p>' for note in NOTES)),
    ]
    links = "".join(f'<a href="#{key}">{text(heading)}</a> ' for heading, key, body in parts if body)
    body = "".join(f'<h2 id="{key}">{text(heading)}</h2>\n{body}\n' for heading, key, body in parts if body)
    ranked = len(report.study.runs) - len(report.absent)
    style = STYLE.read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{text(report.study.name)}: study</title>\n'
        f"<style>\n{style}</style></head>\n<body>\n<p><b>{text(report.rates)}</b></p>\n"
        f"<h1>{text(report.study.name)}</h1>\n<p>{text(report.study.question)}</p>\n"
        f'<p class="soft">{ranked:,} of {len(report.study.runs):,} runs have ended and are ranked. '
        f"{text(_chosen(report))}</p>\n<nav>{links}</nav>\n{body}</body></html>\n"
    )


CURVES = (
    "Lines are means over seeds, bands reach from the lowest to the highest seed. Inside one schedule a curve is "
    "biased: where the learning rate is still high, the loss is higher than that of a shorter run that has ended."
)
SPEED = (
    "The largest peak of memory of any run, and the mean of the runs' median tokens per second. They compare only "
    "between runs of one machine that had no other work. At another size both may turn out otherwise."
)


def _chosen(report: StudyReport) -> str:
    better = "higher" if report.metric.higher_is_better else "lower"
    return (
        f"Chosen before: {report.metric.name} ({report.metric.figure}), in {report.unit}, {better} is better; baseline "
        f"{report.study.baseline}."
    )


def _each_cell(report: StudyReport, body: Callable[[StudyReport, Cell, int], str], *, note: str = "") -> str:
    """What `body` makes of each size and budget, below its name where there are several."""
    found = ""
    for place, cell in enumerate(report.cells):
        if part := body(report, cell, place):
            found += (f"<h3>{text(cell.label)}</h3>" if len(report.cells) > 1 else "") + part
    return found + (f'<p class="soft">{text(note)}</p>' if found and note else "")


def _noise(report: StudyReport, cell: Cell, place: int) -> str:
    return f"<p>{text(noise_floor(report, cell))}</p>"


def _variants(report: StudyReport, cell: Cell, place: int, pictures: Mapping[str, bytes]) -> str:
    if cell.comparison is None:
        return f"<p>No comparison: {text(cell.refused)}.</p>"
    listed = "".join(f"<li>{text(sentence)}</li>" for sentence in sentences(report, cell))
    numbers = range(1, len(RESULTS))
    found = _show(pictures, f"differences-{place}.", "across") + f"<ul>{listed}</ul>\n"
    found += table(RESULTS, results(report, cell), numbers=numbers)
    measured = "; ".join(cell.comparison.data["measured_on"])
    return found + (f'<p class="soft">Measured on {text(measured)}.</p>' if measured else "")


def _costs(report: StudyReport, cell: Cell, place: int) -> str:
    rows = costs(report, cell)
    return table(COSTS, rows, numbers=range(1, len(COSTS))) if rows else ""


def _tuning(report: StudyReport, cell: Cell, place: int, pictures: Mapping[str, bytes]) -> str:
    told = [tuned.sentence for name in report.names if (tuned := cell.tuned[name]).sentence]
    if not told:
        return ""
    rows = [
        [
            name,
            ", ".join(f"{option} {value}" for option, value in sorted(each.choices.items())),
            "–" if each.mean is None else f"{each.mean:.4f}",
            str(each.seeds),
            "compared" if each.choices == cell.tuned[name].chosen else "",
        ]
        for name in report.names
        for each in cell.tuned[name].tried
        if each.choices
    ]
    listed = "".join(f"<li>{text(sentence)}</li>" for sentence in told)
    headings = ("variant", "values", f"mean, {report.unit}", "finished seeds", "")
    return f"<ul>{listed}</ul>{_show(pictures, f'sweep-{place}-')}{table(headings, rows, numbers=(2, 3))}"


def _ladder(report: StudyReport, pictures: Mapping[str, bytes]) -> str:
    refused: dict[str, list[str]] = {}
    for name, found in report.ladders.items():
        if isinstance(found, str):
            refused.setdefault(found, []).append(name)
    told = "".join(f"<p>No law of {text(', '.join(names))}: {text(why)}.</p>" for why, names in refused.items())
    rows = ladder_rows(report)
    if not rows:
        return told
    headings = ["variant", "points", "exponent", "floor", "scatter", "largest point, held out"]
    headings += [f"extrapolated, {times:g} times the compute" for times in AHEAD]
    return _show(pictures, "ladder") + table(headings, rows) + told + f'<p class="soft">{text(LADDER)}</p>'


LADDER = (
    "Fitted: loss = floor + scale · compute^-exponent, by the least sum of squared differences of logarithms, to means "
    "over seeds. Intervals are of 95 %; those of losses are for one further point. Whatever lies beyond the largest "
    "point is extrapolated: the interval assumes that the same law holds there, which no point shows, and the floor of "
    "so small runs is that of their data, vocabulary and range of sizes, not of language."
)


def _configurations(report: StudyReport, cell: Cell, place: int) -> str:
    rows = differing(report, cell)
    return table(("variant", "option", "its value", "the baseline's"), rows) if rows else ""


def _absent(report: StudyReport) -> str:
    rows = [[entry["run"], entry["why"]] for entry in report.absent]
    return table(("run", "why"), rows) if rows else "<p>None: all runs have ended and can be ranked.</p>"


NOTES = (
    "Better and worse are said only of a difference that a test of all variants together finds at 5 %. Undecided "
    "doesn't mean equal: the interval says which differences are still possible.",
    "The compute multiplier is how many times the variant's compute the baseline needs for the same loss. From budgets "
    "it is of final losses; from a curve it is of the middle of a schedule, and biased.",
    "Runs that are not causal, have not ended or have no finite loss are in no ranking.",
    "What holds at this size, on this data and for these budgets may not hold at others.",
)


def _show(pictures: Mapping[str, bytes], prefix: str, kind: str = "pictures") -> str:
    images = [
        f'<img alt="{text(name.removesuffix(".png"))}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
        for name, data in pictures.items()
        if name.startswith(prefix)
    ]
    return f'<div class="{kind}">{"".join(images)}</div>\n' if images else ""
