"""Documents out of files: parquet, JSON lines and text, plain or compressed, from any place in them.

Files are cut into units that can be read on their own: a parquet row group, 8 MiB of lines or text, a whole compressed
file. A place is (file, unit, row); reading a unit from a row on gives the same documents as reading it from its start.
"""

import codecs
import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from common.errors import UserError
from common.os_errors import refusal
from common.regular_file import open_regular
from data_prep.corpora.fields import (
    WHOLE_RECORD,
    MissingFieldError,
    column_of,
    column_path,
    record_columns,
    record_of,
    text_of,
)
from data_prep.corpora.file_kinds import DAMAGE, STREAM_BYTES, Kind, kind_of, open_bytes
from data_prep.tokenization.tokenizer import SAFE_BORDER, Tokenizer

BLOCK_BYTES = 8 << 20  # of lines or text in a unit
TEXT_PER_COMPRESSED_BYTE = 4  # about
BATCH_ROWS = 64  # parquet rows decoded at once, fewer where they are long:
BATCH_BYTES = 1 << 20
WHOLE_BYTES = 256 << 20  # of a line, or of text without a place to cut it: a small file may unpack to any length
_UNCUT = f"{WHOLE_BYTES >> 20} MiB without a place to cut it for this tokenizer: split it, if it is text"
KEY_BYTES = 4 * 200  # enough for the 200 characters that decide a document's split


Cut = Callable[[str, int], int | None]  # as Tokenizer.cut


class Fragment(NamedTuple):
    """A document, or a stretch of a long text file. `key` is the document's start, whatever the fragment.

    `begins`, `ends`: it holds the document's start, or its end. `absent`: why there is no text, as Absent has it.
    """

    row: int
    text: str
    begins: bool
    key: str
    ends: bool = True
    absent: str = ""


class Absent(NamedTuple):
    """A row without text, and how: `null`, `missing` (its field), `empty`."""

    row: int
    how: str


class Unreadable(NamedTuple):
    """A row that can't be read, and why. `rest`: nor can any row of the unit after it."""

    row: int
    error: Exception
    rest: bool = False


@dataclass(frozen=True)
class Unit:
    """What can be read independently. `rows` is None where only reading shows it; `bytes` is the text's approximate
    size.
    """

    rows: int | None
    bytes: int


def units(path: Path, field: str) -> list[Unit]:
    """The units of a file. Raises UserError for a file that can't be read, or a column that is missing or holds no
    text.
    """
    kind = kind_of(path.name)
    try:
        if kind.content == "parquet":
            return _row_groups(path, field)
        size = path.stat().st_size
    except (OSError, pa.ArrowException) as error:  # pyarrow's own OSErrors have no number
        refused = isinstance(error, OSError) and error.errno is not None
        raise UserError(refusal("read", error, path) if refused else f"{path} can't be read: {error}") from None
    if kind.compression:
        return [Unit(None, size * TEXT_PER_COMPRESSED_BYTE)]
    return [Unit(None, min(BLOCK_BYTES, size - start)) for start in range(0, size, BLOCK_BYTES)]


def _row_groups(path: Path, field: str) -> list[Unit]:
    with pq.ParquetFile(path) as file:
        try:
            column_path(file.schema_arrow, field)
        except ValueError as error:
            raise UserError(f"{path} has {error}") from None
        metadata = file.metadata
        found = []
        for index in range(metadata.num_row_groups):
            group = metadata.row_group(index)
            found.append(Unit(group.num_rows, _text_bytes(group, field)))
        return found


def _text_bytes(group: pq.RowGroupMetaData, field: str) -> int:
    columns = [group.column(number) for number in range(group.num_columns)]
    wanted = [column for column in columns if field in (WHOLE_RECORD, column.path_in_schema)]
    return sum(column.total_uncompressed_size for column in wanted)


class UnitReader:
    """Reads units. Keeps the last parquet row group open, so that continuing in it costs no second decoding.

    `tokenizer`: whose ids a long text's fragments must have, joined as whole; by default GPT-2's, bytes or characters.
    """

    def __init__(self, tokenizer: Tokenizer | None = None) -> None:
        self._cut: Cut = _safe_border if tokenizer is None else tokenizer.cut
        self._file: pq.ParquetFile | None = None
        self._open: tuple[str, int] | None = None  # path and row group
        self._batches: Iterator[Any] = iter(())
        self._next_row = 0
        self._rest: list[Any] = []
        self._column: tuple[str, ...] = ()

    def read(self, path: str, unit: int, field: str, start: int = 0, stop: int | None = None) -> Iterator[Fragment]:
        """Fragments of rows start … stop - 1 of a unit; rows without text are skipped, but counted.

        Raises what a row that can't be read raises.
        """
        for found in self.read_all(path, unit, field, start, stop):
            if isinstance(found, Unreadable):
                raise found.error
            if isinstance(found, Fragment):
                yield found

    def read_all(
        self, path: str, unit: int, field: str, start: int = 0, stop: int | None = None, *, tell_absent: bool = False
    ) -> Iterator[Fragment | Unreadable | Absent]:
        """As `read`, with an `Unreadable` in place of a row that can't be read.

        With `tell_absent` also an `Absent` for every record without text, among them those that lack the field, which
        else can't be read.

        Where the rest of a unit can't be read, any rows of it yield one, always at the first unreadable row.
        """
        kind = kind_of(path)
        if kind.content == "parquet":
            assert stop is not None
            found: Iterator[Fragment | Unreadable] = self._parquet(path, unit, field, start, stop)
        elif kind.content == "text":
            packed = bool(kind.compression)
            found = _compressed_text(path, kind, self._cut) if packed else _text_block(path, unit, self._cut)
        else:
            found = _json_lines(path, unit, field, kind, tell_absent)
        for fragment in found:
            if stop is not None and fragment.row >= stop:
                return
            if isinstance(fragment, Unreadable):
                if fragment.rest or fragment.row >= start:
                    yield fragment
            elif fragment.row >= start and fragment.text:
                yield fragment
            elif fragment.row >= start and fragment.absent and tell_absent:
                yield Absent(fragment.row, fragment.absent)

    def _parquet(self, path: str, group: int, field: str, start: int, stop: int) -> Iterator[Fragment | Unreadable]:
        if self._open != (path, group) or self._next_row > start:
            self._open_group(path, group, field)
        while self._next_row < stop:
            if not self._rest:
                try:
                    batch = next(self._batches)
                except DAMAGE as error:
                    self._batches = itertools.repeat(Unreadable(self._next_row, _damage(error), rest=True))
                    continue
                if isinstance(batch, Unreadable):
                    yield batch
                    return
                batch = column_of(batch, self._column)
                if self._next_row + len(batch) <= start:  # another worker's rows: decoded, never made into text
                    self._next_row += len(batch)
                    continue
                self._rest = _texts(batch)[::-1]
            row, text = self._next_row, self._rest.pop()
            self._next_row += 1
            if row >= start:
                if isinstance(text, UnicodeDecodeError):
                    yield Unreadable(row, text)
                else:
                    absent = "" if text else "null" if text is None else "empty"
                    yield Fragment(row, text or "", True, text or "", absent=absent)

    def _open_group(self, path: str, group: int, field: str) -> None:
        if self._file is None or self._open is None or self._open[0] != path:
            self.close()
            # page by page, not in whole column chunks; checked by their checksums, where the file has such
            self._file = pq.ParquetFile(
                path, buffer_size=STREAM_BYTES, pre_buffer=False, page_checksum_verification=True
            )
            self._column = column_path(self._file.schema_arrow, field)
        metadata = self._file.metadata.row_group(group)
        rows = max(1, min(BATCH_ROWS, metadata.num_rows * BATCH_BYTES // max(1, _text_bytes(metadata, field))))
        columns = record_columns(self._file.schema_arrow) if field == WHOLE_RECORD else [field]
        self._batches = self._file.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False)
        self._open, self._next_row, self._rest = (path, group), 0, []

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file, self._open = None, None


def _texts(column: pa.Array) -> list[str | UnicodeDecodeError | None]:
    """A column's texts, with an error in the place of one that is not UTF-8."""
    try:
        found: list[str | UnicodeDecodeError | None] = column.to_pylist()
    except UnicodeDecodeError:
        found = []
        for value in column:
            try:
                found.append(value.as_py())
            except UnicodeDecodeError as error:
                found.append(error)
    return found


def _damage(error: Exception) -> Exception:
    """The error, where it means damaged data; raises it where the disk could not be read."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error
    return error


def _json_lines(
    path: str, unit: int, field: str, kind: Kind, missing_as_absent: bool = False
) -> Iterator[Fragment | Unreadable]:
    """Lines that start in the unit's block, or all lines of a compressed file."""
    with contextlib.closing(open_bytes(path, kind)) as file:
        place, end = unit * BLOCK_BYTES, (unit + 1) * BLOCK_BYTES
        if kind.compression:
            place, end = 0, -1
        elif place:
            file.seek(place - 1)
            place += _line(file)[1] - 1
        for row in itertools.count():
            if 0 <= end <= place:
                return
            try:
                line, size = _line(file)
            except DAMAGE as error:
                yield Unreadable(row, _damage(error), rest=True)
                return
            if not line:
                return
            place += size
            try:
                if size > len(line):
                    raise ValueError(f"{size:,} bytes, more than the {WHOLE_BYTES:,} that a document can have")
                if not line.strip():
                    continue
                text = text_of(record_of(line), field)
            except (ValueError, RecursionError) as error:
                if missing_as_absent and isinstance(error, MissingFieldError):
                    yield Fragment(row, "", True, "", absent="missing")
                else:
                    yield Unreadable(row, error)
            else:
                absent = "" if text else "null" if text is None else "empty"
                yield Fragment(row, text or "", True, text or "", absent=absent)


def _line(file: BinaryIO) -> tuple[bytes, int]:
    """The next line (only the start of one that is too long), and how many bytes it has in the file."""
    line = file.readline(WHOLE_BYTES)
    size, rest = len(line), line
    while len(rest) == WHOLE_BYTES and not rest.endswith(b"\n"):
        rest = file.readline(WHOLE_BYTES)
        size += len(rest)
    return line, size


def lines_before(path: Path | str, unit: int, known: tuple[int, int] = (0, 0)) -> int:
    """Lines that start before a unit of an uncompressed file; `known`: an earlier unit and its number of them."""
    first, count = known
    with open_regular(path) as file:
        place, end = max(0, first * BLOCK_BYTES - 1), max(0, unit * BLOCK_BYTES - 1)
        file.seek(place)
        while place < end and (block := file.read(min(1 << 20, end - place))):
            count += block.count(b"\n")
            place += len(block)
    return count + (first == 0 < unit)  # no newline precedes the file's first line


def _compressed_text(path: str, kind: Kind, cut: Cut) -> Iterator[Fragment | Unreadable]:
    """A compressed text file in stretches, each a row, for bounded memory; the first one starts the document."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")("replace")
    with contextlib.closing(open_bytes(path, kind)) as file:
        row, text, searched, key = 0, "", BLOCK_BYTES, ""
        broken: Exception | None = None
        block = b"first"
        while block:
            try:
                block = file.read(max(BLOCK_BYTES, KEY_BYTES))
            except DAMAGE as error:
                block, broken = b"", _damage(error)
            key = key or block[:KEY_BYTES].decode("utf-8-sig", "replace")
            text += decoder.decode(block, final=not block)
            while len(text) > searched:
                border = cut(text, searched)
                if border is None:
                    searched = len(text)
                    if searched > WHOLE_BYTES:
                        block, text, broken = b"", "", ValueError(_UNCUT)
                else:
                    yield Fragment(row, text[:border], row == 0, key, ends=False)
                    row, text, searched = row + 1, text[border:], BLOCK_BYTES
    if text:
        yield Fragment(row, text, row == 0, key)
    if broken is not None:
        yield Unreadable(row + bool(text), broken, rest=True)


def _text_block(path: str, unit: int, cut: Cut) -> Iterator[Fragment | Unreadable]:
    """A text file is one document; a unit is its text from the first safe border in a block to the next block's."""
    with open_regular(path) as file:
        try:
            start, stop = _border(file, unit * BLOCK_BYTES, cut), _border(file, (unit + 1) * BLOCK_BYTES, cut)
        except ValueError as error:
            yield Unreadable(0, error, rest=True)
            return
        file.seek(0)
        key = file.read(KEY_BYTES).decode("utf-8-sig", "replace")
        file.seek(start)
        text = file.read(stop - start).decode("utf-8-sig" if start == 0 else "utf-8", "replace")
        ends = stop == file.seek(0, os.SEEK_END)  # where later blocks hold nothing, this is the last one
    yield Fragment(0, text, unit == 0, key, ends)


def _safe_border(text: str, start: int) -> int | None:
    found = SAFE_BORDER.search(text, start)
    return found.start() if found else None


def _border(file: BinaryIO, offset: int, cut: Cut) -> int:
    """The first byte at or after `offset` before which a text may be cut without changing its token ids.

    Raises ValueError where there is none in so much text that reading further would take all memory.
    """
    if offset == 0:
        return 0
    size = file.seek(0, os.SEEK_END)
    window = 1 << 16
    while offset < size:
        file.seek(offset)
        data = file.read(window)
        rest = next((n for n, byte in enumerate(data[:3]) if byte & 0xC0 != 0x80), len(data[:3]))
        data, offset = data[rest:], offset + rest  # without the rest of a character that starts before
        text = data.decode("utf-8", "surrogateescape")
        if found := cut(text, 0):
            return offset + len(text[:found].encode("utf-8", "surrogateescape"))
        if offset + len(data) >= size:
            break
        if (window := window * 2) > WHOLE_BYTES:
            raise ValueError(_UNCUT)
    return size
