"""What the records of kind `layers` in metrics.jsonl hold: figures by part of the model, and by block."""

from collections.abc import Mapping
from typing import Any

from common.metric_fields import NUMBER

KIND = "layers"
NORMS = ("gradient_norm", "weight_norm", "update_norm")  # L2, one for each of the record's `parts`
ACTIVATIONS = ("activation_rms", "activation_max", "attention_logit", "dead_units")  # one for each block
MOST_PARTS = 4_096


def by_name(record: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """By figure, and there by part or block: the finite ones of a record of this kind, which may be damaged.

    `update_ratio`, an update's norm over its weights', is worked out here.
    """
    parts = record.get("parts")
    if not isinstance(parts, list) or not all(isinstance(part, str) and part.isprintable() for part in parts):
        return {}
    found = {figure: _numbers(parts, record.get(figure)) for figure in NORMS}
    updates, weights = found["update_norm"], found["weight_norm"]
    found["update_ratio"] = {part: updates[part] / weights[part] for part in updates if weights.get(part, 0.0) > 0}
    for figure in ACTIVATIONS:
        values = record.get(figure)
        blocks = [f"h.{block}" for block in range(len(values))] if isinstance(values, list) else []
        found[figure] = _numbers(blocks, values)
    return {figure: values for figure, values in found.items() if values}


def flattened(record: Mapping[str, Any]) -> dict[str, float]:
    """The same in one level, for mirrors: layers/gradient_norm/h.3.attn."""
    return {
        f"{KIND}/{figure}/{name}": value for figure, values in by_name(record).items() for name, value in values.items()
    }


def _numbers(names: list[str], values: object) -> dict[str, float]:
    if not isinstance(values, list) or len(values) != len(names) or len(names) > MOST_PARTS:
        return {}
    return {name: value for name, value in zip(names, values, strict=True) if NUMBER.has(value)}
