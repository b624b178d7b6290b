"""Whether two runs' folders hold the same run, read as files alone: two versions of the project may have written them.

Times, and what follows from times, differ between any two runs. Lines that a resume superseded are held to the same
standard as the ones that hold: they are of the same steps.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# and all whose name ends in "seconds"
TIMED = frozenset({"time", "launched", "tokens_per_second", "mfu", "memory_gib"})
COUNTED = ("step", "tokens", "sequences", "scaler")  # of checkpoint.json, what a resume needs beside the tensors

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


def first_difference(old: Path, new: Path, *, resumed: bool = False) -> str | None:
    """The first thing in which two runs' folders differ, in words; None where they hold the same run.

    Args:
        resumed: the runs were killed and resumed, at whatever step that hit each: starts and saves are not compared.
    """
    kinds = (None,) if resumed else (None, *sorted(_kinds(old) | _kinds(new)))
    for kind in kinds:
        records = [_records(folder / "metrics.jsonl", kind) for folder in (old, new)]
        if (found := _differing_line(*records)) is not None:
            return f"metrics.jsonl, {kind or 'steps'}: {found}"
    samples = [_records(folder / "samples.jsonl", None) for folder in (old, new)]
    if (found := _differing_line(*samples)) is not None:
        return f"samples.jsonl: {found}"
    return _differing_checkpoint(old / "checkpoints", new / "checkpoints")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every whole JSON object of a file of lines; none of a file that is not there. A kill may have torn a line."""
    found = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            found.append(record)
    return found


def _kinds(run: Path) -> set[str]:
    """But for the ranks' times, of which there is a line more whenever one was slow."""
    return {record["kind"] for record in read_lines(run / "metrics.jsonl") if "kind" in record} - {"ranks"}


def _records(path: Path, kind: str | None) -> list[dict[str, Any]]:
    """The records of a kind (None: steps and validations) without times, each once, by step, then as they stand.

    A save's record is written when the background is done: its place among the others is a matter of time.
    """
    found: dict[str, dict[str, Any]] = {}
    for record in read_lines(path):
        if record.get("kind") == kind:
            kept = {key: value for key, value in record.items() if key not in TIMED and not key.endswith("seconds")}
            found.setdefault(json.dumps(kept, sort_keys=True), kept)
    return sorted(found.values(), key=lambda record: int(record.get("step", 0)))


def _differing_line(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> str | None:
    for one, other in zip(old, new, strict=False):
        if one != other:
            if one.get("step") != other.get("step"):
                return f"step {one.get('step')} in the old one, {other.get('step')} in the new one"
            keys = [key for key in [*one, *other] if one.get(key, _ABSENT) != other.get(key, _ABSENT)]
            values = (_shown(record.get(keys[0], _ABSENT)) for record in (one, other))
            return f"step {one.get('step')}, {keys[0]}: {' -> '.join(values)}"
    if len(old) != len(new):
        return f"{len(old)} records -> {len(new)}"
    return None


_ABSENT = object()


def _shown(value: Any) -> str:
    text = "absent" if value is _ABSENT else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _differing_checkpoint(old: Path, new: Path) -> str | None:
    names = [sorted(path.name for path in folder.glob("*") if path.is_dir()) for folder in (old, new)]
    if names[0] != names[1]:
        return f"checkpoints: {', '.join(names[0]) or 'none'} -> {', '.join(names[1]) or 'none'}"
    for name in names[0]:
        manifests = [json.loads((folder / name / "checkpoint.json").read_bytes()) for folder in (old, new)]
        for key in COUNTED:
            values = [_shown(manifest.get(key, _ABSENT)) for manifest in manifests]
            if values[0] != values[1]:
                return f"{name}/checkpoint.json, {key}: {' -> '.join(values)}"
        tensors = [read_tensors(folder / name) for folder in (old, new)]
        if found := [tensor for tensor in sorted(tensors[0].keys() | tensors[1].keys()) if _differs(tensor, *tensors)]:
            return f"{name}: {len(found)} of {len(tensors[0])} tensors, first {found[0]}"
    return None


def _differs(name: str, old: Tensors, new: Tensors) -> bool:
    return old.get(name) != new.get(name)


def read_tensors(checkpoint: Path) -> Tensors:
    """Every tensor of a checkpoint, whatever files they are in: dtype, shape and bytes, by kind of file and name."""
    found: Tensors = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        for name, tensor in _tensors_of(path.read_bytes()):
            found[f"{path.name.split('-')[0]}:{name}"] = tensor
    return found


def _tensors_of(content: bytes) -> Iterator[tuple[str, tuple[str, tuple[int, ...], bytes]]]:
    """A safetensors file: the header's length (8 bytes), the header (JSON), the data that its offsets count in."""
    (length,) = struct.unpack("<Q", content[:8])
    data = content[8 + length :]
    for name, entry in json.loads(content[8 : 8 + length]).items():
        if name != "__metadata__":
            start, stop = entry["data_offsets"]
            yield name, (entry["dtype"], tuple(entry["shape"]), data[start:stop])
