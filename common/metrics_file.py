"""`metrics.jsonl`, the record of a run: one writer, one reader.

Lines are only ever appended. A process that died in the middle of a line leaves it torn: the next writer closes it with
a newline, the reader passes over it. A run that resumed from step 900 after reaching 1,000 has two lines for steps 901 to
1,000: the later ones hold, and the reader drops the earlier.
"""

import json
import math
import os
from pathlib import Path
from typing import Any


class MetricsFile:
    """The writing side. Every line is one `write` of a file opened for appending."""

    def __init__(self, path: Path) -> None:
        torn = path.exists() and path.stat().st_size > 0 and not _ends_with_newline(path)
        self._file = open(path, "ab", buffering=0)
        if torn:
            self._file.write(b"\n")

    def append(self, record: dict[str, Any]) -> None:
        """Append one record. NaN and infinities, which JSON does not know, become null."""
        line = json.dumps({key: _finite(value) for key, value in record.items()}, allow_nan=False)
        self._file.write(line.encode() + b"\n")

    def close(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _ends_with_newline(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Every whole JSON object of a file of lines, in order; torn and foreign lines are passed over."""
    if not path.exists():
        return []
    records = []
    with open(path, "rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                records.append(record)
    return records


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records that hold, by step: lines that a resume superseded are dropped.

    A line whose step is not beyond its predecessor's of the same kind tells that the run went back: everything recorded
    before it for that step or later is void. Training and validation records share a step and are kept apart by their
    keys.
    """
    kept: list[dict[str, Any]] = []
    for record in read_json_lines(path):
        step = record.get("step")
        if not isinstance(step, int):
            continue
        kind = record_kind(record)
        while kept and (kept[-1]["step"] > step or (kept[-1]["step"] == step and record_kind(kept[-1]) == kind)):
            kept.pop()
        kept.append(record)
    return kept


def record_kind(record: dict[str, Any]) -> str:
    """`train`, `validation` or another kind that the record names by itself."""
    return str(record.get("kind", "validation" if "val_loss" in record else "train"))
