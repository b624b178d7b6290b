"""What a run's start planned, beside what came of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.metric_fields import NUMBER

# By key of the start's record: what it is, and in which unit
PLANNED = {
    "planned_memory_gib": ("memory of a rank", "GiB"),
    "planned_tokens_per_second": ("speed in steps", "tokens/s"),
    "planned_hours": ("all of the run", "hours"),
}


@dataclass(frozen=True)
class Beside:
    """A figure as it was planned and as it came; real: None where it is not known, or not yet."""

    what: str
    unit: str
    planned: float
    real: float | None

    def __str__(self) -> str:
        text = f"{self.what}: {self.planned:,.4g} {self.unit} planned"
        if self.real is None:
            return text
        miss = f" ({self.planned / self.real - 1:+.0%})" if self.real else ""
        return f"{text}, {self.real:,.4g} in reality{miss}"


def planned_in(start: Mapping[str, Any]) -> dict[str, float]:
    """What the record of a start holds of a plan."""
    return {key: float(start[key]) for key in PLANNED if NUMBER.has(start.get(key))}


def planned_beside(planned: Mapping[str, float], real: Mapping[str, float | None]) -> list[Beside]:
    """Args: planned: from `planned_in`. real: figures by the key that the plan has them under."""
    return [Beside(*PLANNED[key], value, real.get(key)) for key, value in planned.items()]
