"""A study's page: one HTML file that needs nothing else. It has no date: the same results are the same bytes."""

from collections.abc import Callable, Mapping

from markupsafe import Markup

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
from eval.reporting.drawing import Picture, show
from eval.reporting.html_parts import fill, note, paragraph, table


def study_page(report: StudyReport, pictures: Mapping[str, Picture]) -> str:
    """pictures: by file name, as `study_pictures` names them."""
    parts = [
        ("Noise floor", "noise", _each_cell(report, _noise)),
        ("Variants", "variants", _each_cell(report, lambda _, cell, place: _variants(report, cell, place, pictures))),
        ("Curves", "curves", _each_cell(report, lambda _, __, at: show(pictures, f"curves-{at}-"), remark=CURVES)),
        ("Memory and speed", "costs", _each_cell(report, _costs, remark=SPEED)),
        ("Tuned options", "tuning", _each_cell(report, lambda _, cell, place: _tuning(report, cell, place, pictures))),
        ("Ladder", "ladder", _ladder(report, pictures)),
        ("What differs in the configurations", "configuration", _each_cell(report, _configurations)),
        ("Runs that are not ranked", "absent", _absent(report)),
        ("How to read this", "method", Markup().join(map(note, NOTES))),
    ]
    return fill(
        "study.html",
        study=report.study,
        rates=report.rates,
        ranked=len(report.study.runs) - len(report.absent),
        chosen=_chosen(report),
        sections=[part for part in parts if part[2]],
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


def _each_cell(report: StudyReport, body: Callable[[StudyReport, Cell, int], Markup], *, remark: str = "") -> Markup:
    """What `body` makes of each size and budget, below its name where there are several."""
    found = [(cell.label, part) for place, cell in enumerate(report.cells) if (part := body(report, cell, place))]
    several = len(report.cells) > 1
    return fill("cells.html", bodies=found, several=several, remark=remark) if found else Markup()


def _noise(report: StudyReport, cell: Cell, place: int) -> Markup:
    return paragraph(noise_floor(report, cell))


def _variants(report: StudyReport, cell: Cell, place: int, pictures: Mapping[str, Picture]) -> Markup:
    if cell.comparison is None:
        return paragraph(f"No comparison: {cell.refused}.")
    return fill(
        "variants.html",
        picture=show(pictures, f"differences-{place}.", "across"),
        sentences=sentences(report, cell),
        headings=RESULTS,
        rows=results(report, cell),
        numbers=range(1, len(RESULTS)),
        measured="; ".join(cell.comparison.data["measured_on"]),
    )


def _costs(report: StudyReport, cell: Cell, place: int) -> Markup:
    rows = costs(report, cell)
    return table(COSTS, rows, numbers=range(1, len(COSTS))) if rows else Markup()


def _tuning(report: StudyReport, cell: Cell, place: int, pictures: Mapping[str, Picture]) -> Markup:
    told = [tuned.sentence for name in report.names if (tuned := cell.tuned[name]).sentence]
    if not told:
        return Markup()
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
    return fill(
        "tuning.html",
        picture=show(pictures, f"sweep-{place}-"),
        sentences=told,
        headings=("variant", "values", f"mean, {report.unit}", "finished seeds", ""),
        rows=rows,
        numbers=(2, 3),
    )


def _ladder(report: StudyReport, pictures: Mapping[str, Picture]) -> Markup:
    refused: dict[str, list[str]] = {}
    for name, found in report.ladders.items():
        if isinstance(found, str):
            refused.setdefault(found, []).append(name)
    told = Markup().join(paragraph(f"No law of {', '.join(names)}: {why}.") for why, names in refused.items())
    rows = ladder_rows(report)
    if not rows:
        return told
    headings = ["variant", "points", "exponent", "floor", "scatter", "largest point, held out"]
    headings += [f"extrapolated, {times:g} times the compute" for times in AHEAD]
    return show(pictures, "ladder") + table(headings, rows) + told + note(LADDER)


LADDER = (
    "Fitted: loss = floor + scale · compute^-exponent, by the least sum of squared differences of logarithms, to means "
    "over seeds. Intervals are of 95 %; those of losses are for one further point. Whatever lies beyond the largest "
    "point is extrapolated: the interval assumes that the same law holds there, which no point shows, and the floor of "
    "so small runs is that of their data, vocabulary and range of sizes, not of language."
)


def _configurations(report: StudyReport, cell: Cell, place: int) -> Markup:
    rows = differing(report, cell)
    return table(("variant", "option", "its value", "the baseline's"), rows) if rows else Markup()


def _absent(report: StudyReport) -> Markup:
    rows = [[entry["run"], entry["why"]] for entry in report.absent]
    return table(("run", "why"), rows) if rows else paragraph("None: all runs have ended and can be ranked.")


NOTES = (
    "Better and worse are said only of a difference that a test of all variants together finds at 5 %. Undecided "
    "doesn't mean equal: the interval says which differences are still possible.",
    "The compute multiplier is how many times the variant's compute the baseline needs for the same loss. From budgets "
    "it is of final losses; from a curve it is of the middle of a schedule, and biased.",
    "Runs that are not causal, have not ended or have no finite loss are in no ranking.",
    "What holds at this size, on this data and for these budgets may not hold at others.",
)
