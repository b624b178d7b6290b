"""Whole documents in sequences of a model's length: which pieces of the stream make up each sequence.

A document that fits is never cut; a longer one is cut into full sequences and a rest. Rests and short documents are put
together by best fit, longest first (Ding et al. 2024, arXiv:2404.10830), on the histogram of their lengths, so that the
cost grows with the number of different lengths, not with the square of the number of documents.

A piece of L tokens gives L targets, each the token that truly follows: for a whole document the last of them is its end
of text. What is left of a sequence is padding, whose targets count for nothing.

Of conversations, whose starts and targets are marked beside the tokens, those that are longer than a sequence are left
out and counted: what is left of an answer would teach to stop in the middle.

A plan is a folder of three arrays and a `plan.json`, made once for a token set and a length, and memory-mapped.
"""

import bisect
import contextlib
import hashlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.format import open_memmap

from common.errors import UserError
from common.json_file import Count, Positive, Sha256, read_json_for_user
from common.progress import progress_bar
from common.publish import fsync_file, publish_folder, sha256_file, write_json_whole
from data_prep.token_sets.manifest import COUNTED, STARTS, document_start
from data_prep.token_sets.sequences import Rows, Tokens

FORMAT_VERSION = 1
BLOCK_TOKENS = 1 << 24  # read at a time
BLOCK_DOCUMENTS = 1 << 22  # packed at a time: 200 MB of memory, whatever the size of the set
LEFT_SECONDS = 86_400.0  # after which an unfinished plan is nobody's
ARRAYS = ("starts", "lengths", "rows")
IGNORE = -100  # a target that counts for nothing (model.chunk_kernel.IGNORE_INDEX)

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Framing:
    """How documents are marked in a stream: the id before each, and whether another one ends it."""

    begin: int
    ends_with_another: bool  # a document's last token is then only a target


BY_MARKS = Framing(STARTS, ends_with_another=True)  # of a stream of marks: a conversation's last token is only a target


@dataclass(frozen=True)
class PackingFacts:
    """`plan.json`. targets + padding = sequences · block_size."""

    format_version: int
    data_identity: str
    block_size: Positive
    sequences: Count
    pieces: Count
    targets: Count
    padding: Count
    cut_documents: Count
    sha256: Sha256
    left_out: Count = 0


class PackedSequences:
    """The sequences of a plan, read from its stream."""

    def __init__(
        self,
        stream: Tokens,
        plan: tuple[Ints, Ints, Ints],
        facts: PackingFacts,
        *,
        masked: bool = True,
        marks: Tokens | None = None,
    ) -> None:
        """Args:
        plan: the pieces' starts and lengths, (p,) each, and the number of pieces before each sequence, (s + 1,).
        masked: `rows` tells documents apart.
        marks: of the stream's tokens, where not all are learned from.
        """
        self._stream, self._masked, self._marks, self.facts = stream, masked, marks, facts
        self._starts, self._lengths, self._rows = plan
        self.count: int = facts.sequences
        self.block_size: int = facts.block_size

    @classmethod
    def read(
        cls, stream: Tokens, folder: Path, *, masked: bool = True, marks: Tokens | None = None
    ) -> "PackedSequences":
        """Those of a plan in a folder. Raises UserError for a folder without a readable one."""
        facts = read_json_for_user(folder / "plan.json", PackingFacts, "delete the folder: it is made again")
        try:
            starts, lengths, rows = (
                np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ARRAYS
            )
        except (OSError, ValueError, EOFError) as error:  # truncated, or gone
            raise UserError(f"{folder} can't be read ({error}): delete the folder: it is made again") from None
        return cls(stream, (starts, lengths, rows), facts, masked=masked, marks=marks)

    @property
    def has_marks(self) -> bool:
        """Whether they are of conversations, whose targets don't all count."""
        return self._marks is not None

    @property
    def padding_share(self) -> float:
        return self.facts.padding / max(1, self.count * self.block_size)

    def target_count(self, numbers: Ints) -> int:
        """Targets of the sequences (n,) that count."""
        if self._marks is None:
            return sum(int(self._lengths[self._rows[n] : self._rows[n + 1]].sum()) for n in numbers)
        return sum(int(np.count_nonzero(self._counted(piece))) for n in numbers for piece in self._pieces(n))

    def _pieces(self, number: int) -> range:
        return range(self._rows[number], self._rows[number + 1])

    def _counted(self, piece: int) -> npt.NDArray[np.bool_]:
        """Which of a piece's targets count, (length,)."""
        assert self._marks is not None
        start, length = int(self._starts[piece]), int(self._lengths[piece])
        return self._marks.read(start + 1, start + length + 1) == COUNTED

    def rows(self, numbers: Ints) -> Rows:
        """Sequences (n,) with the number of its document in its row for each token; padding has the last number."""
        shape = len(numbers), self.block_size
        inputs, documents = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        targets = np.full(shape, IGNORE, dtype=np.int64)
        for row, number in enumerate(numbers):
            place = 0
            for index, piece in enumerate(self._pieces(number)):
                start, length = int(self._starts[piece]), int(self._lengths[piece])
                tokens = self._stream.read(start, start + length + 1)
                part = slice(place, place + length)
                inputs[row, part], targets[row, part], documents[row, part] = tokens[:-1], tokens[1:], index
                if self._marks is not None:
                    targets[row, part][~self._counted(piece)] = IGNORE
                place += length
            documents[row, place:] = self._rows[number + 1] - self._rows[number]
        return Rows(inputs, targets, documents if self._masked else None)


def plan_in_memory(stream: Tokens, marks: Tokens, block_size: int) -> PackedSequences:
    """A small split's conversations in sequences, those that are longer left out."""
    blocks = list(_documents(marks, BY_MARKS))
    starts, lengths = (np.concatenate([block[n] for block in blocks] or [np.zeros(0, np.int64)]) for n in (0, 1))
    fits = lengths <= block_size
    packed = pack(starts[fits], lengths[fits], block_size)
    targets, sequences = int(lengths[fits].sum()), len(packed.ends)
    counts = (len(packed.starts), targets, sequences * block_size - targets, 0)
    facts = PackingFacts(FORMAT_VERSION, "", block_size, sequences, *counts, "", int((~fits).sum()))
    rows = np.concatenate([np.zeros(1, dtype=np.int64), packed.ends])
    return PackedSequences(stream, (packed.starts, packed.lengths, rows), facts, marks=marks)


def make_plan(
    stream: Tokens, framing: Framing, block_size: int, folder: Path, *, data_identity: str, whole: bool = False
) -> PackingFacts:
    """Make the plan's folder, whole or not at all. It is the same for the same stream, framing and length.

    Args:
        stream: of tokens; with `BY_MARKS` of marks.
        whole: leave out documents that are longer than a sequence.

    Raises OSError where it can't be written. One that is there already, or comes up meanwhile, stays.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{folder.name}.*"):  # by a kill
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > LEFT_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        facts = _write_plan(stream, framing, block_size, temporary, data_identity, whole)
        temporary.chmod(0o755)
        with contextlib.suppress(FileExistsError):
            publish_folder(temporary, folder)
        return facts
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_plan(
    stream: Tokens, framing: Framing, block_size: int, folder: Path, data_identity: str, whole: bool
) -> PackingFacts:
    sequences = pieces = targets = cut = left_out = 0
    parts = {name: open(folder / f"{name}.part", "wb") for name in ARRAYS}  # noqa: SIM115
    with contextlib.ExitStack() as stack:
        for file in parts.values():
            stack.enter_context(file)
        np.zeros(1, dtype=np.int64).tofile(parts["rows"])
        for starts, lengths in _documents(stream, framing):
            if whole:
                fits = lengths <= block_size
                starts, lengths, left_out = starts[fits], lengths[fits], left_out + int((~fits).sum())
            packed = pack(starts, lengths, block_size)
            packed.starts.tofile(parts["starts"])
            packed.lengths.astype(np.int32).tofile(parts["lengths"])
            (packed.ends + pieces).tofile(parts["rows"])
            sequences, pieces = sequences + len(packed.ends), pieces + len(packed.starts)
            targets, cut = targets + int(lengths.sum()), cut + int((lengths > block_size).sum())
    if not pieces and left_out:
        raise UserError(
            f"all {left_out:,} conversations of the training split are longer than model.block_size {block_size}: "
            "use a longer one, or shorter conversations"
        )
    if not pieces:
        raise UserError("the training split has no document to pack: prepare more text")
    digest = hashlib.sha256()
    for name, dtype, size in (("starts", "<i8", pieces), ("lengths", "<i4", pieces), ("rows", "<i8", sequences + 1)):
        path, part = folder / f"{name}.npy", folder / f"{name}.part"
        array = open_memmap(path, mode="w+", dtype=np.dtype(dtype), shape=(size,))
        for start in range(0, size, BLOCK_TOKENS):
            array[start : start + BLOCK_TOKENS] = np.fromfile(
                part, dtype=dtype, count=BLOCK_TOKENS, offset=start * np.dtype(dtype).itemsize
            )
        array.flush()
        del array
        part.unlink()
        fsync_file(path)
        digest.update(sha256_file(path).encode())
    padding = sequences * block_size - targets
    facts = PackingFacts(
        FORMAT_VERSION,
        data_identity,
        block_size,
        sequences,
        pieces,
        targets,
        padding,
        cut,
        digest.hexdigest(),
        left_out,
    )
    write_json_whole(folder / "plan.json", asdict(facts))
    return facts


def _documents(stream: Tokens, framing: Framing) -> Iterator[tuple[Ints, Ints]]:
    """Starts and lengths in inputs of the stream's documents, (n,) each, in blocks of about as many.

    The stream's last token is an input only if a document follows, which says what its target is: it never does.
    """
    held: list[Ints] = []
    count = 0

    def ended(starts: Ints, stop: int) -> tuple[Ints, Ints]:
        lengths = np.diff(starts, append=stop) - framing.ends_with_another
        return starts[lengths > 0], lengths[lengths > 0]

    with progress_bar(len(stream), "token", "packing documents", scale=True) as bar:
        for start in range(0, len(stream), BLOCK_TOKENS):
            tokens = stream.read(start, min(start + BLOCK_TOKENS, len(stream)))
            found = np.flatnonzero(tokens == framing.begin).astype(np.int64) + start  # (m,)
            if start == 0 and (not len(found) or found[0] != 0):
                found = np.concatenate([np.zeros(1, dtype=np.int64), found])
            held.append(found)
            count += len(found)
            bar.update(len(tokens))
            if count > BLOCK_DOCUMENTS:
                whole = np.concatenate(held)
                yield ended(whole[:-1], int(whole[-1]))
                held, count = [whole[-1:]], 1
        if held:
            starts, lengths = ended(np.concatenate(held), len(stream))
            if len(starts) and not framing.ends_with_another and int(starts[-1] + lengths[-1]) == len(stream):
                lengths[-1] -= 1  # nothing follows its last token
            yield starts[lengths > 0], lengths[lengths > 0]


@dataclass(frozen=True)
class Packed:
    """Sequences of pieces: `starts` and `lengths` (p,), sequence after sequence; `ends` (s,) the pieces up to each."""

    starts: Ints
    lengths: Ints
    ends: Ints


def pack(starts: Ints, lengths: Ints, block_size: int) -> Packed:
    """Put documents (n,) with at least one token each into as few sequences as best fit finds, first the full ones.

    The same documents give the same sequences; equally long ones keep their order.
    """
    full = lengths // block_size  # (n,): whole sequences that a document fills
    first = np.cumsum(full) - full
    within = np.arange(int(full.sum()), dtype=np.int64) - np.repeat(first, full)
    full_starts = np.repeat(starts, full) + within * block_size
    rest = lengths - full * block_size
    order = np.argsort(-rest, kind="stable")[: int((rest > 0).sum())]  # longest first
    bins = _best_fit(np.bincount(rest[order], minlength=block_size), block_size)  # (r,) by that order
    by_bin = np.argsort(bins, kind="stable")  # within a sequence the longest first
    chosen = order[by_bin]
    counts = np.bincount(bins) if len(bins) else np.zeros(0, dtype=np.int64)
    ends = np.arange(1, len(full_starts) + 1, dtype=np.int64)
    return Packed(
        np.concatenate([full_starts, starts[chosen] + full[chosen] * block_size]),
        np.concatenate([np.full(len(full_starts), block_size, dtype=np.int64), rest[chosen]]),
        np.concatenate([ends, len(full_starts) + np.cumsum(counts)]),
    )


def _best_fit(histogram: Ints, block_size: int) -> Ints:
    """By best fit, longest first: the sequence of each piece, (r,), for pieces in falling order of length.

    Sequences with equal room are kept as runs of neighbours, so that equally long pieces are placed many at a time.

    Args:
        histogram: (block_size,) how many pieces have each length from 0 (none) to block_size - 1.
    """
    room: dict[int, list[tuple[int, int]]] = {}  # free tokens: runs of sequences, (first, count)
    sizes: list[int] = []  # the keys of `room`, rising
    placed: list[Ints] = []
    opened = 0

    def put(free: int, first: int, count: int) -> None:
        if free == 0:
            return
        if free not in room:
            room[free] = []
            bisect.insort(sizes, free)
        room[free].append((first, count))

    for length in range(block_size - 1, 0, -1):
        left = int(histogram[length])
        while left:
            place = bisect.bisect_left(sizes, length)
            if place == len(sizes):
                fitting = block_size // length
                count = -(-left // fitting)
                first, free = opened, block_size
                opened += count
            else:
                free = sizes[place]
                first, count = room[free].pop()
                if not room[free]:
                    del room[free], sizes[place]
            take = min(left, count)
            placed.append(np.arange(first, first + take, dtype=np.int64))
            put(free - length, first, take)
            if count > take:
                put(free, first + take, count - take)
            left -= take
    return np.concatenate(placed) if placed else np.zeros(0, dtype=np.int64)


def framing_of(tokenizer_spec: dict[str, Any]) -> Framing | None:
    """How a set's documents are marked, by its tokenizer's spec; None where they are not."""
    end = tokenizer_spec.get("end_of_text_id")
    start = document_start(tokenizer_spec)
    return None if start is None else Framing(start, ends_with_another=start != end)
