"""What an evaluation's figure was measured on is recorded with it: figures compare only where that is the same."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from common.curves import VALIDATION, Curve

NOT_CAUSAL = "not causal: it sees what it predicts, so its losses mean nothing"


def measured_alike(curve: Curve, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two records' figures compare. What one of both does not record (an older one) counts as the same."""
    for names in curve.measured_on:
        known = [name for name in names if _is_told(one.get(name)) and _is_told(other.get(name))]
        if known and one[known[0]] != other[known[0]]:
            return False
    return True


def _is_told(value: Any) -> bool:
    """Anything else that stands there is damage, which may be too deep to be compared."""
    return isinstance(value, int | float | str)


def like_the_newest(curve: Curve, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of the records, in their order, whose figure was measured as the last one's was."""
    return [record for record in records if measured_alike(curve, record, records[-1])]


def validation_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint's val_loss was measured on. Older manifests leave it to their configuration and data."""
    names = [name for alternatives in VALIDATION.measured_on for name in alternatives]
    found = {name: manifest.get(name) for name in names}
    config = manifest.get("config") or {}
    length = config.get("model", {}).get("block_size")
    tokens = config.get("eval", {}).get("tokens")
    if length and tokens:
        found["val_tokens_wanted"] = max(1, tokens // length) * length
    asked = {"val_block_size": length, "val_document_mask": config.get("data", {}).get("document_mask")}
    return found | {name: value for name, value in asked.items() if found[name] is None}


def describe_validation(record: Mapping[str, Any]) -> str:
    """What a validation loss was measured on, as people read it; empty where it is not recorded."""
    parts = []
    if record.get("val_tokens") is not None:
        parts.append(f"{record['val_tokens']:,} tokens")
    elif record.get("val_tokens_wanted") is not None:
        parts.append(f"up to {record['val_tokens_wanted']:,} tokens")
    if record.get("val_sha256") is not None:
        parts.append(f"SHA-256 {record['val_sha256']}")
    if record.get("val_block_size") is not None:
        parts.append(f"sequences of {record['val_block_size']:,}")
    if record.get("val_document_mask"):
        parts.append("attention inside documents")
    return ", ".join(parts)


def causality(validations: Iterable[Mapping[str, Any]]) -> bool | None:
    """Whether a run is causal, by what its validations have recorded; None where none has checked it.

    A run that was not causal once is none: what it has learned since may rest on it.
    """
    found = [record["causal"] for record in validations if isinstance(record.get("causal"), bool)]
    return all(found) if found else None
