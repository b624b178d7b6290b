"""A study's tables: rows of text for its page, and the Markdown that a README can show."""

from collections.abc import Iterator, Sequence
from typing import Any

from common.progress import format_count
from common.publish import canonical_json
from eval.comparison.study_report import Cell, StudyReport
from eval.comparison.verdicts import Verdict

Rows = list[list[str]]
PICTURE = "report.png"
NONE = "–"
RESULTS = ("variant", "seeds", "mean", "less the baseline's", "p", "compute multiplier", "in tokens", "in hours")
COSTS = (
    "variant", "parameters", "tokens", "FLOPs", "FLOPs a token, times the baseline's", "GiB", "tokens/s",
    "tokens/s, times the baseline's",
)  # fmt: skip


def results(report: StudyReport, cell: Cell) -> Rows:
    """Means, differences and multipliers, as in RESULTS."""
    entries = cell.comparison.entries if cell.comparison else {}
    rows = []
    for name in report.names:
        if (entry := entries.get(name)) is not None:
            found = entry.multipliers
            compute = found.compute and around(found.compute.value, found.compute.interval, ".3f", whole=True)
            others = [NONE if each is None else f"{each.value:.3f}" for each in (found.tokens, found.hours)]
            rows.append([
                name, str(entry.seeds), around(entry.mean, entry.interval, ".4f"), _difference(entry),
                NONE if entry.p_value is None else f"{entry.p_value:.2g}", compute or NONE, *others,
            ])  # fmt: skip
    return rows


def costs(report: StudyReport, cell: Cell) -> Rows:
    """What each variant costs, as in COSTS."""
    entries = cell.comparison.entries if cell.comparison else {}
    amounts = {name: _amounts(cell, name) for name in report.names}
    base = report.study.baseline
    rows = []
    for name in report.names:
        if (entry := entries.get(name)) is None or not cell.runs[name]:
            continue
        parameters, tokens, flops = amounts[name]
        per_token, base_per_token = _each(flops, tokens), _each(amounts[base][2], amounts[base][1])
        speed, base_speed = entry.tokens_per_second, entries[base].tokens_per_second
        rows.append([
            name, *(NONE if count is None else format_count(count) for count in (parameters, tokens)),
            NONE if flops is None else f"{flops:.3g}", _ratio(per_token, base_per_token),
            NONE if entry.memory_gib is None else f"{entry.memory_gib:.2f}",
            NONE if speed is None else f"{speed:,.0f}", _ratio(speed, base_speed),
        ])  # fmt: skip
    return rows


def _amounts(cell: Cell, name: str) -> tuple[float | None, float | None, float | None]:
    """Parameters, tokens and FLOPs of a whole run."""
    runs = [run for run in cell.runs[name] if run.last]
    if not runs:
        return None, None, None
    last = max(runs, key=lambda run: (run.last.get("tokens") or 0, run.path))
    return last.parameters, last.last.get("tokens"), last.flops(last.last)


def _each(total: float | None, count: float | None) -> float | None:
    return total / count if total and count else None


def _ratio(one: float | None, other: float | None) -> str:
    return f"{one / other:.3f}" if one and other else NONE


def _difference(entry: Verdict) -> str:
    return around(entry.difference, entry.difference_interval, "+.4f")


def around(value: float | None, interval: tuple[float, float] | None, form: str, *, whole: bool = False) -> str:
    """`whole`: both ends, as of an interval that is longer to one side."""
    if value is None:
        return NONE
    if interval is None:
        return format(value, form)
    if whole:
        return f"{value:{form}} ({interval[0]:{form}} to {interval[1]:{form}})"
    return f"{value:{form}} ± {(interval[1] - interval[0]) / 2:.4f}"


def noise_floor(report: StudyReport, cell: Cell) -> str:
    """How much a run differs from another of the same configuration, in words."""
    found = cell.comparison
    if found is None or found.noise_floor is None:
        return "Noise floor: not known yet: no variant has two finished seeds."
    counts = [entry.seeds for entry in found.entries.values() if entry.seeds > 1]
    base = found.entries[report.study.baseline]
    part = f" ({found.noise_floor / abs(base.mean):.2%} of the baseline's mean)" if base.mean else ""
    floor = f"{found.noise_floor:.4f}"
    text = (
        f"Noise floor: runs of one configuration with other seeds differ by {floor} {report.unit}{part}: "
        f"the standard deviation, pooled over {len(counts)} configurations with {sum(counts)} finished runs."
    )
    halves = sorted(
        (entry.difference_interval[1] - entry.difference_interval[0]) / 2
        for entry in found.entries.values()
        if entry.difference_interval
    )
    return text + (f" With these seeds a difference below {halves[0]:.4f} is undecided." if halves else "")


def differing(report: StudyReport, cell: Cell) -> Rows:
    """Variant, option, its value and the baseline's, of all that is not the same."""
    found = cell.comparison.data["differing"] if cell.comparison else {}
    base = report.study.baseline
    return [
        [name, option, str(values[name]), str(values.get(base, NONE))]
        for name in report.names
        for option, values in found.items()
        if name in values and (base not in values or canonical_json(values[name]) != canonical_json(values[base]))
    ]


def ladder_rows(report: StudyReport) -> Rows:
    """Variant, exponent, floor, scatter, the largest point's prediction, and what is extrapolated."""
    rows = []
    for name, ladder in report.ladders.items():
        if isinstance(ladder, str):
            continue
        law, fitted, held_out = ladder.fitted.law, ladder.fitted, ladder.held_out
        rows.append([
            name, str(len(fitted.losses)), around(law.exponent, fitted.exponents, ".3f", whole=True),
            around(law.floor, fitted.floors, ".3f", whole=True), f"{fitted.scatter:.2%}",
            f"{around(held_out.loss, held_out.interval, '.4f', whole=True)}, measured {fitted.losses[-1]:.4f}, off by "
            f"{ladder.error:+.2%}",
            *(around(each.loss, each.interval, ".3f", whole=True) for each in ladder.extrapolated),
        ])  # fmt: skip
    return rows


def markdown(report: StudyReport, *, picture: bool) -> str:
    """Noise floor, table and sentences of every size and budget, as a README shows them."""
    lines = [report.rates, ""]
    if picture:
        lines += [f"![Differences from the baseline with their intervals]({PICTURE})", ""]
    for cell in report.cells:
        lines += [f"### {cell.label}", ""] if cell.label and len(report.cells) > 1 else []
        lines += list(_cell_lines(report, cell))
    if report.absent:
        lines += [f"Not ranked: {len(report.absent)} of {len(report.study.runs)} runs."]
        lines += [f"- {entry['run']}: {entry['why']}" for entry in report.absent]
    return "\n".join(lines).rstrip() + "\n"


def _cell_lines(report: StudyReport, cell: Cell) -> Iterator[str]:
    if cell.comparison is None:
        yield from (f"No comparison: {cell.refused}.", "")
        return
    yield from (noise_floor(report, cell), "")
    yield from markdown_table(RESULTS, results(report, cell))
    yield ""
    yield from (f"- {sentence}" for sentence in sentences(report, cell))
    yield ""


def sentences(report: StudyReport, cell: Cell) -> list[str]:
    """One of each variant, with what was tuned for it."""
    if cell.comparison is None:
        return []
    both = [(cell.comparison.entries[name].sentence, cell.tuned[name].sentence) for name in report.names]
    return [" ".join(filter(None, each)) for each in both]


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> Iterator[str]:
    def line(cells: Sequence[Any]) -> str:
        return f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |"

    yield line(headings)
    yield f"|{'---|' + '---:|' * (len(headings) - 1)}"
    yield from map(line, rows)
