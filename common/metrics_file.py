"""`metrics.jsonl`, the record of a run: one writer, one reader.

Lines are only ever appended. A process that died in the middle of a line leaves it torn: the next writer closes it with
a newline, the reader passes over it. A run that resumed from step 900 after reaching 1,000 has two lines for steps 901
to 1,000: the later ones hold, and the reader drops the earlier.
"""

import errno
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from pydantic_core import from_json

from common.growing_file import LINE_BYTES, MOST_BYTES
from common.metric_fields import mended
from common.publish import finite_or_null
from common.regular_file import append_to_regular, open_regular

LATE_KINDS = ("save", "save_failed", "hang")  # records of something that started some steps before
TAIL_BYTES = 1 << 16  # read from the end of a file


class MetricsFile:
    """The writing side. Every line is one `write` of a file opened for appending."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = append_to_regular(path)
        if not ends_with_newline(path):
            self._file.write(b"\n")

    def append(self, record: dict[str, Any]) -> None:
        """Append one record. NaN and infinities, which JSON does not know, become null.

        Raises OSError where it can't be written whole; nothing may be appended afterwards.
        """
        line = to_line(record)
        if self._file.write(line) != len(line):  # a disk takes what it has room for
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def sync(self) -> None:
        """Wait until all lines are on the disk. Raises OSError where they may not be."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync and close. Raises OSError where the last lines may not have reached the disk."""
        try:
            self.sync()
        finally:
            self._file.close()


def to_line(record: dict[str, Any]) -> bytes:
    """One line of such a file. NaN and infinities, which JSON does not know, become null."""
    return json.dumps(finite_or_null(record), allow_nan=False).encode() + b"\n"


def ends_with_newline(path: Path) -> bool:
    """Whether the next line may start at a file's end. Raises OSError."""
    with open_regular(path) as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def read_json_lines(path: Path | str) -> list[dict[str, Any]]:
    """Every whole JSON object of a file of lines, in order; torn and foreign lines are skipped.

    None of a file that is not there. Raises OSError (NotAFile for a pipe, device or folder) where it can't be read.
    """
    try:
        with open_regular(path, most_bytes=MOST_BYTES) as file:
            return [record for line in _lines(file) if (record := parse_line(line)) is not None]
    except FileNotFoundError:
        return []


def read_records(path: Path | str) -> list[dict[str, Any]]:
    """As `read_json_lines`, of the lines that belong to a step, each value what its key stands for, or null."""
    return [found for record in read_json_lines(path) if (found := mended(record)) is not None]


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The JSON object that a line holds; None for any other line."""
    try:
        record = from_json(line)  # in a third of the time that the standard library takes
    except ValueError:
        record = _parse_otherwise(line)
    return record if isinstance(record, dict) else None


def _parse_otherwise(line: bytes) -> Any:
    """What only the standard library parses: undecodable bytes, a byte order mark. None for the rest."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _lines_from_the_end(path: Path, block_bytes: int) -> Iterator[bytes]:
    """A file's lines, the last one first, but for those longer than `LINE_BYTES`; none of a file that is not there.

    Raises OSError where it can't be read.
    """
    try:
        file = open_regular(path, most_bytes=MOST_BYTES)
    except FileNotFoundError:
        return
    with file:
        position, pieces, length = file.seek(0, os.SEEK_END), [b""], 0  # of a line whose start is not yet read
        while position > 0:
            size = min(block_bytes, position)
            position -= size
            file.seek(position)
            first, *whole = file.read(size).split(b"\n")
            if whole:
                if length <= LINE_BYTES:
                    yield whole.pop() + b"".join(reversed(pieces))
                else:
                    whole.pop()
                yield from reversed(whole)
                pieces, length = [], 0
            length += len(first)
            if length <= LINE_BYTES:
                pieces.append(first)
            else:
                pieces.clear()
        if length <= LINE_BYTES:
            yield b"".join(reversed(pieces))


def last_json_lines(path: Path, byte_count: int = TAIL_BYTES) -> list[dict[str, Any]]:
    """What `read_records` finds in a file's last whole lines; none where it can't be read."""
    try:
        with open_regular(path) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - byte_count))
            lines = file.read(byte_count).split(b"\n")[:-1]
    except OSError:
        return []
    # the first one's start may be before
    records = [record for line in lines if (record := parse_line(line)) is not None]
    return [found for record in records if (found := mended(record)) is not None]


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Every line, but for those longer than `LINE_BYTES`, which don't come into memory."""
    while line := file.readline(LINE_BYTES + 1):
        if len(line) <= LINE_BYTES:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(LINE_BYTES)


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """The valid records, by step: lines that a resume has overwritten are dropped.

    Steps only ever grow, so a record of an earlier step shows that the run went back, and everything after that step
    is void. A step's training record comes first, so it also voids the step's other records; a repeated validation
    replaces its predecessor. A save is recorded when it is published or has failed, some steps after the one it saved:
    it voids nothing and is put where its step is.

    Each value is what its key stands for, or null. Raises OSError where the file can't be read.
    """
    return holding(read_records(path))


def metrics_of_step(path: Path, step: int, block_bytes: int = 1 << 16) -> list[dict[str, Any]]:
    """The records of one step that hold, as `read_metrics` gives them, without reading what comes before that step.

    Raises OSError where the file can't be read.
    """
    records: list[dict[str, Any]] = []
    for line in _lines_from_the_end(path, block_bytes):
        found = parse_line(line)
        record = mended(found) if found is not None else None
        if record is None:
            continue
        records.append(record)
        if record_kind(record) == "train" and record["step"] <= step:
            break  # which voids all before it that is of this step
    return [record for record in holding(records[::-1]) if record["step"] == step]


def holding(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of `read_records` that hold; see `read_metrics`."""
    kept: list[dict[str, Any]] = []
    for record in records:
        step, kind = record["step"], record_kind(record)
        end = len(kept)
        while end > 0 and (kept[end - 1]["step"] > step or (kind == "train" and kept[end - 1]["step"] == step)):
            end -= 1
        if kind not in LATE_KINDS:
            del kept[end:]
        position = end
        while position > 0 and kept[position - 1]["step"] == step:
            position -= 1
            if record_kind(kept[position]) == kind:
                del kept[position]
                end -= 1
        kept.insert(end, record)
    return kept


def record_kind(record: dict[str, Any]) -> str:
    """`train`, `validation`, or the record's own `kind` (`start`, `save`)."""
    return str(record.get("kind", "validation" if "val_loss" in record else "train"))
