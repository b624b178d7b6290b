"""The types of a run's records: counts, numbers, texts. A value of another type is read as null, as NaN and inf are.

Figures of evaluations other than validation are not among them: `common.curves.Curve` reads them from a record.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MOST_COUNT = (1 << 63) - 1
LARGEST = 1e50  # no float32 reaches it; plots and sums of such numbers stay finite
VALIDATED, TRAINED = "val_loss_by_source", "train_loss_by_source"
SOURCE = re.compile("[A-Za-z0-9][A-Za-z0-9_.-]{0,31}")  # the name of a mix's source
MOST_SOURCES = 64
LAST_TIME = 1e11  # seconds since the epoch: the year 5138


@dataclass(frozen=True)
class Field:
    """The types of a value, and its bounds where it is a number."""

    types: frozenset[type]
    low: float | None = None
    high: float | None = None

    def has(self, value: Any) -> bool:
        """Whether a value is one of these. A boolean is not a number, NaN lies within no bounds."""
        return type(value) in self.types and (self.low is None or self.high is None or self.low <= value <= self.high)


TIME = Field(frozenset({int, float}), 0, LAST_TIME)
_COUNT = Field(frozenset({int}), 0, MOST_COUNT)
NUMBER = Field(frozenset({int, float}), -LARGEST, LARGEST)
_TEXT, _FLAG = Field(frozenset({str})), Field(frozenset({bool}))

FIELDS: dict[str, Field] = {
    **dict.fromkeys(("time", "launched"), TIME),
    **dict.fromkeys(("step", "tokens", "world_size"), _COUNT),
    **dict.fromkeys(("skips", "rollback", "position", "from_step", "to_step", "first_step"), _COUNT),
    **dict.fromkeys(("val_tokens", "val_tokens_wanted", "val_block_size", "val_bytes"), _COUNT),
    **dict.fromkeys(("loss", "z_loss", "lr", "grad_norm", "tokens_per_second", "mfu", "memory_gib", "flops"), NUMBER),
    **dict.fromkeys(("step_seconds", "data_wait_seconds", "val_seconds"), NUMBER),
    **dict.fromkeys(("save_seconds", "save_blocked_seconds", "hang_seconds", "val_loss", "val_bits_per_byte"), NUMBER),
    **dict.fromkeys(("val_loss_masked",), NUMBER),
    **dict.fromkeys(("planned_memory_gib", "planned_tokens_per_second", "planned_hours"), NUMBER),
    **dict.fromkeys(("target_tokens", "answer_tokens"), _COUNT),
    **dict.fromkeys(("val_sha256", "val_text_sha256", "data_identity", "weights", "prompt", "text"), _TEXT),
    **dict.fromkeys(("val_document_mask", "causal"), _FLAG),
}


def is_step(value: Any) -> bool:
    """Whether this is a number of steps done: what every record has to have."""
    return type(value) is int and 0 <= value <= MOST_COUNT


def fits(key: str, value: Any) -> bool:
    """Whether a value has the type of its key; under a key that is not known here every value has."""
    field = FIELDS.get(key)
    return field is None or field.has(value)


def mended(record: dict[str, Any]) -> dict[str, Any] | None:
    """The record, with null in the place of every value that is not what its key stands for.

    None where it is no record of a run: it has no step, or its kind is not a text.
    """
    if not is_step(record.get("step")) or not isinstance(record.get("kind", ""), str):
        return None
    wrong = [key for key, value in record.items() if value is not None and not fits(key, value)]
    record = record | dict.fromkeys(wrong) if wrong else record
    return record | by_source(record, VALIDATED) if VALIDATED in record else record


def by_source(record: Mapping[str, Any], key: str) -> dict[str, float]:
    """A record's figures of the sources of a mix, as `key.name` each: at most `MOST_SOURCES` that are numbers."""
    found = record.get(key)
    figures = list(found.items())[:MOST_SOURCES] if isinstance(found, dict) else []
    return {f"{key}.{name}": figure for name, figure in figures if SOURCE.fullmatch(name) and NUMBER.has(figure)}
