"""What a worker process does: read a stretch of a file, choose its documents' side, turn them into tokens.

Tokens leave as raw arrays (2 bytes each), never as lists; text never crosses a process border.
"""

import os
import queue
import signal
import threading
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from common.errors import UserError
from common.json_file import Count
from data_prep.corpora.document_encoders import LeftOut, document_encoder
from data_prep.corpora.file_kinds import DAMAGE
from data_prep.corpora.readers import Absent, UnitReader, Unreadable
from data_prep.tokenization.loading import load_tokenizer
from data_prep.tokenization.tokenizer import Ids, Tokenizer

PART_TOKENS = 1 << 17  # what a worker sends at once, about
OUTBOX_PARTS = 24  # encoded and not yet taken by the parent: about a second of work
ENCODING_ERRORS = (*DAMAGE, RuntimeError, MemoryError, UserError)  # what damaged input raises


class Place(NamedTuple):
    """A token's place in the source: `skip` tokens into a row of a unit of a file."""

    file: Count
    unit: Count
    row: Count
    skip: Count = 0


@dataclass(frozen=True)
class Selection:
    """Which documents to take. One in `one_in`, by hash, of the first `files` files is chosen for validation.

    Once the validation split has all its tokens, chosen documents after the row `last` are for training like the rest,
    but for those whose key one of the validation documents has.
    """

    side: Literal["train", "val"]
    one_in: int = 0
    files: int = 0
    last: Place | None = None

    def takes(self, place: Place, key: int, held_out: Collection[int] = ()) -> bool:
        """Whether the document at a place is one of them. `held_out` has the validation documents' keys."""
        if not self.one_in or place.file >= self.files or (self.last is not None and place > self.last):
            chosen = False
        else:
            chosen = key % self.one_in == 0
        return chosen if self.side == "val" else not chosen and key not in held_out


@dataclass(frozen=True)
class Work:
    """One task: rows start … stop - 1 (None: to the end) of a unit. `input_bytes`: how far the source is read then.

    `skip_bad`: how many unreadable rows are skipped; one more ends the work, and with 0 it is an error. `tell_absent`:
    records without text are told, and those without the field are among them. `conversations`: documents are records
    of conversations, of at most `longest` tokens; those that can't be used are told like records without text. `pairs`:
    they are of preferences.
    """

    file: int
    path: str
    name: str
    unit: int
    start: int
    stop: int | None
    field: str
    selection: Selection
    input_bytes: int
    skip_bad: int = 0
    tell_absent: bool = False
    conversations: bool = False
    longest: int | None = None
    pairs: bool = False


class Skip(NamedTuple):
    """An unreadable row that was skipped, and why. `rest`: with all rows of its unit after it."""

    row: int
    why: str
    rest: bool


class Failure(NamedTuple):
    """What ended a work: the row it was at, and why."""

    row: int
    why: str


class Part(NamedTuple):
    """Tokens of some documents: `rows` (n,) and `counts` (n,), how many tokens each has; rows that were skipped; of
    validation documents their `keys` (n,) uint64; rows without text, where they are to be told.
    """

    work: Work
    rows: Ids
    counts: Ids
    tokens: Ids
    skipped: tuple[Skip, ...] = ()
    keys: Ids = np.zeros(0, dtype=np.uint64)
    absent: tuple[Absent, ...] = ()

    def keys_between(self, start: int, stop: int) -> list[int]:
        """The keys of the documents that the tokens start … stop - 1 belong to; none without `keys`."""
        ends = np.cumsum(self.counts)
        first, last = np.searchsorted(ends, [start, stop - 1], side="right")
        found: list[int] = self.keys[first : last + 1].tolist()
        return found

    def place(self, offset: int) -> Place:
        """Where in the source the token at `offset` comes from; just past the last row for the offset past the last."""
        ends = np.cumsum(self.counts)
        index = int(np.searchsorted(ends, offset, side="right"))
        if index == len(ends):
            return Place(self.work.file, self.work.unit, int(self.rows[-1]) + 1)
        start = int(ends[index] - self.counts[index])
        return Place(self.work.file, self.work.unit, int(self.rows[index]), offset - start)


def encode(
    work: Work, tokenizer: Tokenizer, reader: UnitReader, progress: Any, slot: int, held_out: Collection[int] = ()
) -> Iterator[Part]:
    """The work's tokens in parts, every document framed as the tokenizer's model expects it.

    `progress[slot]` is the row being encoded; `held_out` as of `Selection.takes`.
    """
    encoder = document_encoder(tokenizer, conversations=work.conversations, longest=work.longest, pairs=work.pairs)
    nothing = np.zeros(0, dtype=encoder.dtype)
    keys: list[int] = []
    absent: list[Absent] = []
    rows: list[int] = []
    counts: list[int] = []
    pieces: list[Ids] = []
    skipped: list[Skip] = []
    size = count = 0
    progress[slot] = work.start
    for fragment in reader.read_all(
        work.path, work.unit, work.field, work.start, work.stop, tell_absent=work.tell_absent
    ):
        progress[slot] = fragment.row
        if isinstance(fragment, Absent):
            absent.append(fragment)
            continue
        if isinstance(fragment, Unreadable):
            if work.skip_bad == 0:
                if size:  # what comes before it may be all that is wanted
                    yield _part(work, rows, counts, pieces, skipped, keys, absent)
                raise ValueError(
                    f"{error_text(fragment.error)} (--skip-bad N skips up to N of them)"
                ) from fragment.error
            skipped.append(Skip(fragment.row, str(fragment.error), fragment.rest))
            count += 1
            if count > work.skip_bad:  # the parent reports it, as it knows them all
                break
            continue
        # a text file's later blocks go where its first one went
        begun = Place(work.file, work.unit, fragment.row) if fragment.begins else Place(work.file, 0, 0)
        try:
            key = encoder.key(fragment)
            taken = work.selection.takes(begun, key, held_out)
            encoded = encoder.encode(fragment) if taken or (work.conversations and work.tell_absent) else None
        except LeftOut as why:
            absent.append(Absent(fragment.row, str(why)))
            encoded = None
        progress[slot] = fragment.row + 1  # which may be what can't be read
        if encoded is None:
            continue
        absent += [Absent(fragment.row, told) for told in encoded.told]
        if not taken:
            continue
        pieces.append(encoded.ids)
        rows.append(fragment.row)
        keys.append(key)
        counts.append(len(encoded.ids))
        size += counts[-1]
        if size >= PART_TOKENS:
            yield _part(work, rows, counts, pieces, skipped, keys, absent)
            rows, counts, pieces, skipped, keys, absent, size = [], [], [], [], [], [], 0
    if size or skipped or absent:
        yield _part(work, rows, counts, [*pieces, nothing], skipped, keys, absent)


def _part(
    work: Work,
    rows: list[int],
    counts: list[int],
    pieces: list[Ids],
    skipped: list[Skip],
    keys: list[int],
    absent: list[Absent],
) -> Part:
    numbers = np.array([rows, counts], dtype=np.int64)
    kept = np.array(keys if work.selection.side == "val" else [], dtype=np.uint64)
    return Part(work, numbers[0], numbers[1], np.concatenate(pieces), tuple(skipped), kept, tuple(absent))


def error_text(error: BaseException) -> str:
    """An error in words, with its type where it is not about the text."""
    return str(error) if isinstance(error, UserError | ValueError) else f"{type(error).__name__}: {error}"


def serve(
    connection: Connection,
    to_close: Connection | None,
    spec: dict[str, Any],
    progress: Any,
    slot: int,
    held_out: Collection[int],
) -> None:
    """Answer every Work received with its parts and None at its end, or with a `Failure`.

    Leaves when the other end of the connection is gone, that is, when the parent is. Under fork `to_close` is the
    parent's end, inherited.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    if to_close is not None:
        to_close.close()
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    pa.set_memory_pool(pa.system_memory_pool())  # arrow's own keeps 8 MiB more of a row group's pages
    outbox: queue.Queue[Part | Failure | None] = queue.Queue(OUTBOX_PARTS)
    threading.Thread(target=_send_all, args=(connection, outbox), daemon=True).start()
    tokenizer = load_tokenizer(spec)
    reader = UnitReader(tokenizer)
    while True:
        try:
            work: Work = connection.recv()
        except (EOFError, OSError):
            return
        try:
            for part in encode(work, tokenizer, reader, progress, slot, held_out):
                outbox.put(part)
        except ENCODING_ERRORS as error:
            outbox.put(Failure(progress[slot], error_text(error)))
        else:
            outbox.put(None)
        pa.default_memory_pool().release_unused()


def _send_all(connection: Connection, outbox: "queue.Queue[Part | Failure | None]") -> None:
    """Send what is in the outbox, so that encoding continues while the parent waits for the disk."""
    try:
        while True:
            message = outbox.get()
            if isinstance(message, Part):
                connection.send((message.rows, message.counts, message.skipped, message.keys, message.absent))
                connection.send_bytes(message.tokens.data.cast("B") if len(message.tokens) else b"")
            else:
                connection.send(message)
    except OSError:  # the parent is gone
        os._exit(0)
