"""Groups of runs compared: read, checked, tested together, and reported as JSON and as text.

Everything is in the order of names and seeds, so that the order of a command line changes nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from common.errors import UserError
from common.plain_text import one_line
from eval.comparison.differences import Test, compare_groups
from eval.comparison.measured_runs import MeasuredRun, Metric
from eval.comparison.run_groups import (
    OF_A_GROUP,
    Group,
    check_measured_alike,
    check_same_text,
    describe_data,
    differing,
    find_metric,
    make_group,
)
from eval.comparison.verdicts import Setting, Verdict, is_budget, shared_deviation, verdict

BASELINES = ("baseline", "base")  # names that mean it


@dataclass(frozen=True)
class Comparison:
    """The result. `entries`: by name."""

    setting: Setting
    noise_floor: float | None
    data: dict[str, Any]
    missing: list[dict[str, str]]
    entries: dict[str, Verdict]

    def as_json(self) -> dict[str, Any]:
        return {
            "baseline": self.setting.baseline.name,
            "unit": self.setting.unit,
            "noise_floor": self.noise_floor,
            "data": self.data,
            "missing": self.missing,
            "variants": {name: entry.as_json() for name, entry in self.entries.items()},
        }


def compare(
    paths: Mapping[str, Sequence[Path]],
    *,
    baseline: str | None = None,
    metric: str = "final",
    in_pairs: bool = False,
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> Comparison:
    """Compare groups of runs by their folders.

    Args:
        paths: of each group's runs, by name.
        baseline: None takes the group named baseline or base, else the first one in the alphabet.
        metric: `final` or `best` (loss), or the figure of an evaluation.
        in_pairs: compare runs of equal seeds in pairs.
        defaults: what the absence of an option from an older run's configuration means.

    Raises UserError for what can't be read, and where runs or groups do not compare.
    """
    names = sorted(paths)
    if baseline is not None and baseline not in names:
        raise UserError(f"--baseline is {baseline}: use one of {', '.join(names)}")
    baseline = baseline or next((name for name in BASELINES if name in names), names[0])
    runs = {name: [MeasuredRun.load(path).with_defaults(defaults) for path in paths[name]] for name in names}
    chosen = find_metric(metric, [run for each in runs.values() for run in each])
    return compare_runs(runs, baseline, chosen, in_pairs=in_pairs)


def compare_runs(
    runs: Mapping[str, Sequence[MeasuredRun]],
    baseline: str,
    chosen: Metric,
    *,
    in_pairs: bool = False,
    budgets: Mapping[str, Sequence[Sequence[MeasuredRun]]] | None = None,
) -> Comparison:
    """Compare groups of runs that have been read.

    Args:
        runs: of each group, by name; a group may have none yet. baseline: the name of one of them.
        budgets: of some groups, the same configuration's runs at other budgets. They count for multipliers only.

    Raises UserError where runs or groups do not compare.
    """
    names = sorted(runs)
    groups = {name: make_group(name, runs[name], chosen) for name in names}
    ranked = [run for group in groups.values() for run in group.runs]
    same_tokens = check_same_text(ranked) if chosen.is_loss and ranked else True
    if chosen.is_loss and not same_tokens and chosen.figure == "val_loss":
        raise UserError("nats a token do not compare between tokenizers: --metric final compares bits per byte")
    check_measured_alike(ranked, chosen)
    families: dict[str, list[Group]] = {}
    for name, group in groups.items():
        others = [make_group(name, each, chosen) for each in (budgets or {}).get(name, ())]
        families.setdefault(group.family, []).extend([group, *others])
    setting = Setting(chosen, unit_of(chosen), groups[baseline], families, 0)
    tests = _tests(groups, setting, in_pairs)
    setting = Setting(chosen, unit_of(chosen), groups[baseline], families, max(1, len(tests)))
    shared = shared_deviation(list(groups.values()), chosen)
    entries = {name: verdict(groups[name], tests.get(name), setting, shared or (0.0, 0)) for name in names}
    missing = [
        {"variant": name, "run": path, "why": groups[name].left_out[path]}
        for name in names
        for path in sorted(groups[name].left_out)
    ]
    return Comparison(setting, shared and shared[0], _data(groups, setting, in_pairs), missing, entries)


def unit_of(metric: Metric) -> str:
    return {"val_bits_per_byte": "bits per byte", "val_loss": "nats a token"}.get(metric.figure, metric.figure)


def _tests(groups: Mapping[str, Group], setting: Setting, in_pairs: bool) -> dict[str, Test]:
    """Of all variants that have two seeds or more, together."""
    baseline = setting.baseline
    tested = {
        name: group
        for name, group in groups.items()
        if group is not baseline and group.count > 1 and not is_budget(group, setting)
    }
    if in_pairs:
        for name, group in tested.items():
            if group.seeds != baseline.seeds:
                raise UserError(
                    f"--paired: {name} has other seeds than {baseline.name}: leave it out, or train the same seeds"
                )
    if not tested or baseline.count < 2:
        return {}
    values = {name: group.values(setting.metric) for name, group in tested.items()}
    return compare_groups(baseline.values(setting.metric), values, in_pairs=in_pairs)


def _data(groups: Mapping[str, Group], setting: Setting, in_pairs: bool) -> dict[str, Any]:
    ranked = [run for group in groups.values() for run in group.runs]
    metric = setting.metric
    configs = {
        name: {option: value for option, value in group.config.items() if option not in OF_A_GROUP}
        for name, group in groups.items()
        if group.config  # a group may have no run yet
    }

    def each(key: str) -> list[Any]:
        return sorted({run.last[key] for run in ranked if run.last.get(key) is not None})

    return {
        "metric": metric.name,
        "figure": metric.figure,
        "higher_is_better": metric.higher_is_better,
        "paired": in_pairs,
        "measured_on": describe_data(ranked),
        **{key: each(key) for key in ("val_sha256", "val_text_sha256", "val_tokens", "val_bytes")},
        "precision": sorted({run.precision for run in ranked}),
        "causality_unknown": sorted(run.path for run in ranked if not run.knows_causality),
        "differing": differing(configs),
        "runs": {name: [run.path for run in group.runs] for name, group in groups.items()},
    }


def as_text(found: Comparison) -> str:
    """For the terminal: what is compared, a table, a sentence for each variant, what differs, what is left out."""
    setting, data = found.setting, found.data
    better = "higher" if setting.metric.higher_is_better else "lower"
    lines = [
        f"{setting.metric.name}: {setting.metric.figure} in {setting.unit}, {better} is better; baseline "
        f"{setting.baseline.name}{', in pairs of the same seed' if data['paired'] else ''}",
        "noise floor (same configuration, other seeds): "
        + (
            "unknown, each group has one seed"
            if found.noise_floor is None
            else f"{found.noise_floor:.4f} {setting.unit}"
        ),
        *(f"measured on {text}" for text in data["measured_on"]),
        "",
        *_table(found),
        "",
        *(entry.sentence for entry in found.entries.values()),
    ]
    if data["differing"]:
        lines += ["", "What differs between the configurations:"]
        for field, values in data["differing"].items():
            lines.append(f"  {field}: " + ", ".join(f"{value} ({name})" for name, value in values.items()))
    if found.missing:
        lines += ["", "Left out of every ranking:"]
        lines += [f"  {entry['run']} ({entry['variant']}): {entry['why']}" for entry in found.missing]
    notes = list(_notes(found))
    return "\n".join(map(one_line, [*lines, *([""] if notes else []), *notes]))


def _notes(found: Comparison) -> Any:
    data = found.data
    if not data["differing"]:
        yield "Note: the configurations are the same: only code, or chance, can differ."
    if len(data["measured_on"]) > 1:
        yield "Note: the losses were not all measured in the same way (see above)."
    if len(data["precision"]) > 1:
        yield f"Note: mixed precision: {', '.join(data['precision'])}."
    if unknown := data["causality_unknown"]:
        yield f"Note: whether they are causal is not recorded by {', '.join(unknown)}."


def _table(found: Comparison) -> list[str]:
    headings = ("variant", "seeds", "mean", "difference", "p", "compute", "tokens", "hours", "GiB", "tokens/s")
    rows = [headings, *(_cells(name, entry) for name, entry in found.entries.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(headings))]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _cells(name: str, entry: Verdict) -> tuple[str, ...]:
    def around(value: float | None, interval: tuple[float, float] | None) -> str:
        if value is None:
            return "–"
        return f"{value:.4f}" + (f" ± {(interval[1] - interval[0]) / 2:.4f}" if interval else "")

    def plain(value: float | None, digits: str) -> str:
        return "–" if value is None else format(value, digits)

    found = entry.multipliers
    multipliers = [None if each is None else each.value for each in (found.compute, found.tokens, found.hours)]
    return (
        one_line(name),
        str(entry.seeds),
        around(entry.mean, entry.interval),
        around(entry.difference, entry.difference_interval),
        plain(entry.p_value, ".2g"),
        *(plain(value, ".3f") for value in multipliers),
        plain(entry.memory_gib, ".2f"),
        plain(entry.tokens_per_second, ",.0f"),
    )
