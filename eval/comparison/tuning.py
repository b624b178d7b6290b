"""Options that a study sweeps for each variant: at which value each one is compared, and at whose rate all ran.

A value's mean is over the seeds that all values of the variant have, so that a seed that only one of them has trained
decides nothing; without such a seed over whatever has ended.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.publish import canonical_json
from eval.comparison.measured_runs import MeasuredRun, Metric
from eval.comparison.study_data import StudyRun

RATE = "optim.lr"  # the option whose choice decides most comparisons
RATES = (RATE, "optim.muon_lr")
Choices = dict[str, Any]


@dataclass(frozen=True)
class Tried:
    """One combination of values. `mean`: of the seeds by which it is judged; None where none has ended."""

    choices: Choices
    mean: float | None
    seeds: int  # that have ended


@dataclass(frozen=True)
class Tuned:
    """A variant at one size and budget.

    Attributes:
        chosen: what it is compared at; so far the best, where trials are missing. Empty where nothing is swept.
        at_edge: options whose chosen value is the smallest or largest that has been tried.
    """

    tried: list[Tried]
    chosen: Choices
    at_edge: list[str]
    sentence: str

    def as_json(self) -> dict[str, Any]:
        tried = [{"choices": each.choices, "mean": each.mean, "seeds": each.seeds} for each in self.tried]
        return {"chosen": self.chosen, "at_edge": self.at_edge, "tried": tried, "sentence": self.sentence}


UNTUNED = Tuned([], {}, [], "")


def tune(runs: Sequence[StudyRun], place: StudyRun, swept: Mapping[str, Sequence[Any]], metric: Metric) -> Tuned:
    """At which values of the swept options a variant is compared.

    Args:
        runs: of the study. place: any run of the variant's at the size and budget.
    """
    own = [run for run in runs if (run.variant, run.size) == (place.variant, place.size)]
    trials = [run for run in own if run.trial]
    trials = [run for run in trials if run.budget == place.budget] or trials
    groups: dict[str, list[StudyRun]] = {}
    for run in trials:
        groups.setdefault(canonical_json(run.choices), []).append(run)
    ended = {key: _ended(group, metric) for key, group in groups.items()}
    known = [set(values) for values in ended.values() if values]
    common = set.intersection(*known) if known else set()
    tried = []
    for key in sorted(groups, key=lambda key: _order(groups[key][0].choices)):
        values = [value for seed, value in sorted(ended[key].items()) if not common or seed in common]
        tried.append(Tried(groups[key][0].choices, float(np.mean(values)) if values else None, len(ended[key])))
    sign = -1.0 if metric.higher_is_better else 1.0
    ranked = [(sign * each.mean, number) for number, each in enumerate(tried) if each.mean is not None]
    chosen = next((run.choices for run in own if run.budget == place.budget and not run.trial and run.choices), {})
    chosen = chosen or (tried[min(ranked)[1]].choices if ranked else {})
    several = [option for option in sorted(swept) if len(swept[option]) > 1]
    at_edge = [option for option in several if option in chosen and _is_edge(option, chosen, tried)]
    return Tuned(tried, chosen, at_edge, _sentence(place.variant, tried, chosen, several, at_edge))


def usable(runs: Sequence[StudyRun]) -> list[MeasuredRun]:
    """Those that a comparison may look at, which ranks or names them itself."""
    return [run.run for run in runs if run.run is not None and not run.why]


def _ended(runs: Sequence[StudyRun], metric: Metric) -> dict[str, float]:
    """By seed, the figure of each run that may be ranked."""
    found = {}
    for run in runs:
        for measured in usable([run]):
            value = measured.value(metric)
            if value is not None and not measured.why_unfit(metric):
                found[canonical_json(run.seed)] = value
    return found


def _order(choices: Choices) -> list[Any]:
    """Numbers by size, before texts by alphabet."""
    return [
        (0, float(value), "") if _is_number(value) else (1, 0.0, canonical_json(value))
        for _, value in sorted(choices.items())
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_edge(option: str, chosen: Choices, tried: Sequence[Tried]) -> bool:
    """Only values of the same other options, of which runs have ended, are beside it."""
    others = canonical_json({**chosen, option: None})
    values = [
        each.choices[option]
        for each in tried
        if each.mean is not None and canonical_json({**each.choices, option: None}) == others
    ]
    return bool(values) and all(map(_is_number, values)) and chosen[option] in (min(values), max(values))


def _sentence(
    variant: str, tried: Sequence[Tried], chosen: Choices, swept: Sequence[str], at_edge: Sequence[str]
) -> str:
    if not swept:
        return ""
    ended = sum(each.mean is not None for each in tried)
    if not chosen or not ended:
        return f"{variant}: no value of {', '.join(swept)} has a finished run yet."
    parts = []
    for option in swept:
        known = sorted(
            (each.choices[option] for each in tried if option in each.choices), key=lambda v: _order({"": v})
        )
        where = "inside its sweep" if all(map(_is_number, known)) else "the best of its sweep"
        if option in at_edge:
            where = "at the edge of its sweep, so that a better value may lie outside"
        listed = ", ".join(dict.fromkeys(map(_shown, sorted(known, key=lambda value: _order({option: value})))))
        parts.append(f"{option} {_shown(chosen.get(option))}, {where} ({listed})")
    rest = f"; {ended} of {len(tried)} values have a finished run" if ended < len(tried) else ""
    return f"{variant} is compared at {' and '.join(parts)}{rest}."


def _shown(value: Any) -> str:
    return f"{value:g}" if _is_number(value) else str(value)


def first_line(
    tunes: Mapping[str, Mapping[str, Sequence[Any]]], rates: Mapping[str, Mapping[str, str]], edges: Sequence[str]
) -> str:
    """At whose learning rate all ran: the first line of a report.

    Args:
        tunes: of each variant, its swept options. rates: by variant and size and budget, the learning rates as text.
        edges: variants whose best learning rate is at the edge of its sweep.
    """
    swept = sorted(name for name, options in tunes.items() if any(len(options.get(rate, ())) > 1 for rate in RATES))
    by_rate: dict[str, list[str]] = {}
    for name, found in sorted(rates.items()):
        if name not in swept and found:
            by_rate.setdefault(_each_place(found), []).append(name)
    if not swept and not by_rate:
        return "No run to compare has ended: at which learning rate they run is not known yet."
    warning = "a variant may be better or worse only because its rate suits it better or worse"
    if not swept and len(by_rate) == 1:
        rate = next(iter(by_rate))
        return f"All variants ran at the same learning rate, {rate}, which was tuned for none of them: {warning}."
    told = "; ".join(f"{', '.join(names)} at {each}" for each, names in sorted(by_rate.items()))
    if not swept:
        return f"No learning rate has been tuned ({told}): {warning}."
    names = ", ".join(sorted(set(edges)))
    edge = f" That of {names} is best at the edge of its sweep: a better one may lie outside." if edges else ""
    if by_rate:
        some = f"The learning rate was swept for {', '.join(swept)} only; {told}"
        return f"{some}, which favours those that were swept.{edge}"
    return f"The learning rate was swept for every variant, and each is compared at its own best.{edge}"


def _each_place(rates: Mapping[str, str]) -> str:
    """One rate where it is the same everywhere, else that of each size and budget."""
    if len(set(rates.values())) == 1:
        return next(iter(rates.values()))
    return ", ".join(f"{rate} ({place})" for place, rate in rates.items())
