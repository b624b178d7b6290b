"""What an evaluation's curve ends in."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from common.curves import VALIDATION, Curve, format_figure
from common.measured import like_the_newest


@dataclass(frozen=True)
class Outcome:
    """The newest figure of one curve, and the best of those that were measured on the same."""

    label: str
    value: float
    error: float | None
    step: int
    best: float
    best_step: int

    def __str__(self) -> str:
        return format_figure(self.value) + ("" if self.error is None else f" ± {format_figure(self.error)}")

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def outcome(curve: Curve, records: Sequence[dict[str, Any]]) -> Outcome | None:
    """Of the records that hold the figure, in their order; None where none is a number."""
    alike = like_the_newest(curve, records)
    found = [(value, record) for record in alike if (value := curve.value(record)) is not None]
    if not found:
        return None
    (value, last), better = found[-1], max if curve.higher_is_better else min
    best, best_at = better(found, key=lambda pair: pair[0])
    return Outcome(curve.label, value, curve.error_of(last), last["step"], best, best_at["step"])


def outcomes(curves: Iterable[Curve], records: Sequence[dict[str, Any]]) -> dict[str, Outcome]:
    """By figure, of all curves but validation's that come to one in a run's records."""
    others = [curve for curve in curves if curve is not VALIDATION]
    found = {curve.figure: outcome(curve, [r for r in records if curve.figure in r]) for curve in others}
    return {figure: end for figure, end in found.items() if end is not None}
