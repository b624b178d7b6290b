"""Documents out of files: parquet, JSON lines (plain, .gz, .zst) and plain text, from any place in them.

Files are cut into units that can be read on their own: a parquet row group, 8 MiB of lines or text, a whole compressed
file. A place is (file, unit, row); reading a unit from a row on gives the same documents as reading it from its start.
"""

import codecs
import contextlib
import gzip
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from common.errors import UserError
from common.publish import sha256_file
from data_prep.tokenization import SAFE_BORDER, Tokenizer

BLOCK_BYTES = 8 << 20  # of lines or text in a unit
TEXT_PER_COMPRESSED_BYTE = 4  # about
BATCH_ROWS = 64  # parquet rows decoded at once, fewer where they are long:
BATCH_BYTES = 1 << 20
STREAM_BYTES = 1 << 20  # read-ahead of a parquet column: pages, not whole column chunks
UTF8_CHECK_BYTES = 1 << 20
KEY_BYTES = 4 * 200  # enough for the 200 characters that decide a document's side
SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".md")


Cut = Callable[[str, int], int | None]  # as Tokenizer.cut


class Fragment(NamedTuple):
    """A document, or a stretch of a long text file. `key` is how the document begins, whatever the fragment."""

    row: int
    text: str
    begins: bool
    key: str


@dataclass(frozen=True)
class Unit:
    """What can be read on its own. `rows` is None where only reading tells; `bytes` is the text's size, about."""

    rows: int | None
    bytes: int


def kind_of(name: str) -> str:
    """The suffix of SUFFIXES that a name has. Raises UserError for another file."""
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        if name.lower().endswith(suffix):
            return suffix
    raise UserError(f"{name}: only {', '.join(SUFFIXES)} can be read")


def is_utf8(path: Path) -> bool:
    """Whether a file begins as UTF-8 does, as far as its first megabyte tells."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with open(path, "rb") as file:
            decoder.decode(file.read(UTF8_CHECK_BYTES))
    except UnicodeDecodeError:
        return False
    return True


def units(path: Path, field: str) -> list[Unit]:
    """The units of a file. Raises UserError for a file that can't be read, or a column that isn't there or no text."""
    kind = kind_of(path.name)
    try:
        if kind == ".parquet":
            return _row_groups(path, field)
        size = path.stat().st_size
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"can't read {path}: {error}") from None
    if kind in (".jsonl.gz", ".jsonl.zst"):
        return [Unit(None, size * TEXT_PER_COMPRESSED_BYTE)]
    return [Unit(None, min(BLOCK_BYTES, size - start)) for start in range(0, size, BLOCK_BYTES)]


def _row_groups(path: Path, field: str) -> list[Unit]:
    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if field not in names:
            raise UserError(f"{path} has no column {field!r}: choose one of {', '.join(names)} with --field")
        if not _is_text(kind := file.schema_arrow.field(field).type):
            raise UserError(f"{path} has no text in its column {field!r} but {kind}: choose another with --field")
        metadata = file.metadata
        found = []
        for index in range(metadata.num_row_groups):
            group = metadata.row_group(index)
            found.append(Unit(group.num_rows, _text_bytes(group, field)))
        return found


def _text_bytes(group: pq.RowGroupMetaData, field: str) -> int:
    columns = [group.column(number) for number in range(group.num_columns)]
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == field)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    of_text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    return any(is_it(kind) for is_it in of_text)


def fingerprint(path: Path) -> dict[str, str]:
    """A hash that changes with the file: of all its bytes, or of a parquet file's footer, which lists every chunk."""
    if kind_of(path.name) != ".parquet":
        return {"sha256": sha256_file(path)}
    try:
        with open(path, "rb") as file:
            file.seek(-8, os.SEEK_END)
            length = int.from_bytes(file.read(4), "little")
            if file.read(4) != b"PAR1":  # a download that broke off: to be known now, not when its turn comes
                raise UserError(f"{path} is no whole parquet file: fetch it again, or take it away")
            file.seek(-8 - length, os.SEEK_END)
            return {"footer_sha256": hashlib.sha256(file.read(length)).hexdigest()}
    except OSError as error:
        raise UserError(f"{path} is no parquet file ({error.strerror})") from None


class UnitReader:
    """Reads units. Keeps the last parquet row group open, so that going on in it costs no second decoding.

    `tokenizer`: whose ids a long text's fragments must have, joined as whole; by default GPT-2's, bytes or characters.
    """

    def __init__(self, tokenizer: Tokenizer | None = None) -> None:
        self._cut: Cut = _safe_border if tokenizer is None else tokenizer.cut
        self._file: pq.ParquetFile | None = None
        self._open: tuple[str, int] | None = None  # path and row group
        self._batches: Iterator[Any] = iter(())
        self._next_row = 0
        self._rest: list[Any] = []

    def read(self, path: str, unit: int, field: str, start: int = 0, stop: int | None = None) -> Iterator[Fragment]:
        """Fragments of rows start … stop - 1 of a unit; rows without text are passed over, but counted."""
        kind = kind_of(path)
        if kind == ".parquet":
            assert stop is not None
            found = self._parquet(path, unit, field, start, stop)
        elif kind in (".txt", ".md"):
            found = _text_block(path, unit, self._cut)
        else:
            found = _json_lines(path, unit, field, kind)
        for fragment in found:
            if stop is not None and fragment.row >= stop:
                return
            if fragment.row >= start and fragment.text:
                yield fragment

    def _parquet(self, path: str, group: int, field: str, start: int, stop: int) -> Iterator[Fragment]:
        if self._open != (path, group) or self._next_row > start:
            self._open_group(path, group, field)
        while self._next_row < stop:
            if not self._rest:
                batch = next(self._batches).column(0)
                if self._next_row + len(batch) <= start:  # another worker's rows: decoded, never made into text
                    self._next_row += len(batch)
                    continue
                self._rest = batch.to_pylist()[::-1]
            row, text = self._next_row, self._rest.pop()
            self._next_row += 1
            if row >= start:
                yield Fragment(row, text or "", True, text or "")

    def _open_group(self, path: str, group: int, field: str) -> None:
        if self._file is None or self._open is None or self._open[0] != path:
            self.close()
            self._file = pq.ParquetFile(path, buffer_size=STREAM_BYTES, pre_buffer=False)
        metadata = self._file.metadata.row_group(group)
        rows = max(1, min(BATCH_ROWS, metadata.num_rows * BATCH_BYTES // max(1, _text_bytes(metadata, field))))
        self._batches = self._file.iter_batches(rows, row_groups=[group], columns=[field], use_threads=False)
        self._open, self._next_row, self._rest = (path, group), 0, []

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file, self._open = None, None


def _json_lines(path: str, unit: int, field: str, kind: str) -> Iterator[Fragment]:
    """Lines that begin in the unit's block, or all lines of a compressed file. Raises ValueError for a bad line."""
    with contextlib.closing(_open_lines(path, kind)) as file:
        place, end = unit * BLOCK_BYTES, (unit + 1) * BLOCK_BYTES
        if kind != ".jsonl":
            place, end = 0, -1
        elif place:
            file.seek(place - 1)
            place += len(file.readline()) - 1
        for row, line in enumerate(file):
            if 0 <= end <= place:
                return
            place += len(line)
            text = _field_of(line, field) if line.strip() else ""
            yield Fragment(row, text, True, text)


def _open_lines(path: str, kind: str) -> Any:
    if kind == ".jsonl.gz":
        return gzip.open(path, "rb")
    if kind == ".jsonl.zst":
        return io.BufferedReader(pa.input_stream(path, compression="zstd"), STREAM_BYTES)
    return open(path, "rb")


def _field_of(line: bytes, field: str) -> str:
    record = json.loads(line)
    if not isinstance(record, dict) or field not in record:
        keys = ", ".join(record) if isinstance(record, dict) else "no object"
        raise ValueError(f"no field {field!r} (there is: {keys}); choose one with --field")
    value = record[field]
    if value is not None and not isinstance(value, str):
        raise ValueError(f"field {field!r} holds no text but {type(value).__name__}")
    return value or ""


def _text_block(path: str, unit: int, cut: Cut) -> Iterator[Fragment]:
    """A text file is one document; a unit is its text from the first safe border in a block to the next block's."""
    with open(path, "rb") as file:
        start, stop = _border(file, unit * BLOCK_BYTES, cut), _border(file, (unit + 1) * BLOCK_BYTES, cut)
        file.seek(0)
        key = file.read(KEY_BYTES).decode("utf-8-sig", "replace")
        file.seek(start)
        text = file.read(stop - start).decode("utf-8-sig" if start == 0 else "utf-8", "replace")
    yield Fragment(0, text, unit == 0, key)


def _safe_border(text: str, start: int) -> int | None:
    found = SAFE_BORDER.search(text, start)
    return found.start() if found else None


def _border(file: BinaryIO, offset: int, cut: Cut) -> int:
    """The first byte at or after `offset` before which a text may be cut without changing its token ids."""
    if offset == 0:
        return 0
    size = file.seek(0, os.SEEK_END)
    window = 1 << 16
    while offset < size:
        file.seek(offset)
        data = file.read(window)
        while data and data[0] & 0xC0 == 0x80:  # the rest of a character that begins before
            data, offset = data[1:], offset + 1
        text = data.decode("utf-8", "surrogateescape")
        if found := cut(text, 0):
            return offset + len(text[:found].encode("utf-8", "surrogateescape"))
        if offset + len(data) >= size:
            break
        window *= 2
    return size
