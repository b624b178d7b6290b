"""A corpus out of many files: validation first, then training, in shards, resuming wherever an earlier run was stopped.

The output is a pure function of the files and the settings. A journal (`journal.py`) records after every shard where in
the source the next one starts; the manifest replaces it when all is done.
"""

import contextlib
import time
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from common.errors import UserError
from common.progress import format_count, progress_bar
from data_prep.corpora.absences import Absences
from data_prep.corpora.encode_pool import open_encoder
from data_prep.corpora.encode_worker import Part, Place, Selection, Work
from data_prep.corpora.journal import Journal, SplitState
from data_prep.corpora.preparation import finish_set
from data_prep.corpora.readers import units
from data_prep.token_sets.manifest import SPLITS, Manifest, marks_of
from data_prep.token_sets.marked_writer import MarkedWriter
from data_prep.token_sets.shard_writer import ShardWriter
from data_prep.tokenization.tokenizer import Tokenizer

WORK_BYTES = 8 << 20  # text in one task: a row group with more is shared by several workers


@dataclass(frozen=True)
class InputFile:
    """One file of the source: its name within it, its size, and hashes that distinguish it from another version."""

    name: str
    bytes: int
    digest: dict[str, str]


class Files(Protocol):
    """Where the source's files are, fetching them where needed."""

    listed: tuple[InputFile, ...]

    def path(self, index: int, meanwhile: Callable[[], None] = lambda: None) -> Path:
        """The file on this disk; may take as long as its download, and calls `meanwhile` repeatedly until then."""
        ...

    def done_with(self, index: int) -> None:
        """No file before `index` is needed any more."""
        ...


@dataclass(frozen=True)
class Settings:
    """All that decides the output apart from the source itself. Counts are tokens; `max_tokens` None means all, and so
    does `val_tokens` None, of the documents that a hash chooses.
    """

    shard_tokens: int
    val_tokens: int | None
    max_tokens: int | None
    field: str
    tokenizer: str
    validation_one_in: int
    validation_files: int | None  # how many of the first files have validation documents; None: all


@dataclass(frozen=True)
class Corpus:
    """What to prepare: `name` and `origin` for the manifest, the files, the settings.

    `count_absent`: records without text, or without its field, are counted in the manifest (`without_text`).
    `conversations`: records hold conversations, of at most `longest` tokens; `pairs`: preferences between two.
    """

    name: str
    origin: dict[str, Any]
    files: Files
    settings: Settings
    tokenizer: Tokenizer
    count_absent: bool = False
    conversations: bool = False
    longest: int | None = None
    pairs: bool = False

    def source(self) -> dict[str, Any]:
        return {
            "name": self.name,
            **self.origin,
            "settings": asdict(self.settings),
            "files": [asdict(file) for file in self.files.listed],
        }


def prepare(corpus: Corpus, folder: Path, workers: int, start_method: str, skip_bad: int = 0) -> Manifest:
    """Write the set, or what is still missing of it, and return its manifest.

    Up to `skip_bad` unreadable rows are skipped; the manifest's source lists them as `skipped`.
    """
    settings = corpus.settings
    plan = {"source": corpus.source(), "tokenizer": corpus.tokenizer.spec}
    journal = Journal.open(folder, plan, skip_bad)
    scope = len(corpus.files.listed) if settings.validation_files is None else settings.validation_files
    one_in = settings.validation_one_in if settings.val_tokens != 0 else 0
    if settings.val_tokens != 0:
        taking = Selection("val", one_in, scope)
        _write_split(corpus, folder, journal, taking, settings.val_tokens, scope, workers, start_method)
    taking = Selection("train", one_in, scope, journal.splits["val"].last)
    count = len(corpus.files.listed)
    if corpus.count_absent and journal.splits["train"].absent is None:
        journal.splits["train"].absent = {"counts": {}, "first": []}
    _write_split(corpus, folder, journal, taking, settings.max_tokens, count, workers, start_method)
    splits = {name: tuple(journal.splits[name].shards) for name in SPLITS}
    splits |= {marks_of(name): tuple(journal.splits[name].marks or ()) for name in SPLITS if corpus.conversations}
    if not splits["train"]:
        raise UserError(_nothing_left(corpus, journal))
    source = corpus.source() | ({"skipped": journal.skipped.entries} if journal.skipped.entries else {})
    if (absent := journal.splits["train"].absent) is not None:
        source["without_text"] = absent
    known = 0 if journal.splits["val"].keys is not None else None
    packages = ["tiktoken", "numpy", "pyarrow"]
    manifest = finish_set(folder, corpus.tokenizer, source, packages, splits, known, marked=corpus.conversations)
    journal.remove()
    return manifest


def _nothing_left(corpus: Corpus, journal: Journal) -> str:
    """Why no document is for training."""
    absent = journal.splits["train"].absent
    if corpus.conversations:
        counts = dict(absent["counts"]) if absent else {}
        told = "; ".join(f"{count:,}: {why}" for why, count in sorted(counts.items()))
        return f"no conversation is left for training ({told or 'there is none'}): give more files"
    return (
        f"the source's field {corpus.settings.field!r} has too little text, nothing is left for training: give more "
        "files"
    )


def _write_split(
    corpus: Corpus,
    folder: Path,
    journal: Journal,
    selection: Selection,
    limit: int | None,
    file_count: int,
    workers: int,
    start_method: str,
) -> None:
    """Write a split's shards from its recorded state on, up to `limit` tokens, keeping the journal."""
    state = journal.splits[selection.side]
    if state.done:
        return
    journal.save()
    finished = sum(shard.tokens for shard in state.shards)
    if limit is None or finished < limit:
        with (
            open_encoder(corpus.tokenizer, workers, start_method, journal.splits["val"].key_set()) as pool,
            _open_writer(corpus, folder, selection.side, state) as writer,
            contextlib.closing(
                _works(corpus, state.next, file_count, selection, journal.skipped.allowed, pool.check)
            ) as works,
            _Bar(writer, limit, sum(file.bytes for file in corpus.files.listed[:file_count])) as bar,
        ):
            parts = pool.run(works)
            for number, part in enumerate(parts):
                skip = state.next.skip if number == 0 else 0
                taken = _write_part(part, skip, limit, writer, state, journal, corpus.files)
                bar.add(part, taken)
                if limit is not None and finished + bar.tokens >= limit:
                    break
    if limit is None or finished < limit:
        _keep_shards(state, writer)
    state.done = True
    journal.save()


def _write_part(
    part: Part, offset: int, limit: int | None, writer: ShardWriter, state: SplitState, journal: Journal, files: Files
) -> int:
    """Write a part's tokens from `offset` on, recording the place after every shard; returns how many were taken."""
    begin = offset
    left = len(part.tokens) - offset
    full = limit is not None and left > 0 and writer.total_tokens + left >= limit
    last = part.place(offset + limit - writer.total_tokens - 1) if full and limit is not None else None
    absences = Absences(part, journal, state)
    journal.skipped.add(part, last)  # before a shard is published that may start after what was skipped
    while offset < len(part.tokens):
        room = min(writer.room, len(part.tokens) - offset)
        if limit is not None:
            room = min(room, limit - writer.total_tokens)
        writer.write(part.tokens[offset : offset + room])
        state.add_keys(part.keys_between(offset, offset + room))
        offset += room
        if limit is not None and writer.total_tokens == limit:
            state.last = part.place(offset - 1)._replace(skip=0)
        if len(writer.shards) > len(state.shards):
            _keep_shards(state, writer)
            state.next = part.place(offset)
            absences.add_before(state.next.row)
            journal.save()
            if writer.split == "train":
                files.done_with(state.next.file)
        if limit is not None and writer.total_tokens == limit:
            break
    absences.add_before(None if last is None else last.row)
    return offset - begin


def _open_writer(corpus: Corpus, folder: Path, split: str, state: SplitState) -> ShardWriter:
    """A split's writer, after its published shards."""
    to, size = (folder, split, corpus.tokenizer), corpus.settings.shard_tokens
    if not corpus.conversations:
        return ShardWriter(*to, size, finished=state.shards)
    return MarkedWriter(*to, size, finished=state.shards, finished_marks=state.marks or ())


def _keep_shards(state: SplitState, writer: ShardWriter) -> None:
    state.shards = list(writer.shards)
    if isinstance(writer, MarkedWriter):
        state.marks = list(writer.marks)


def _works(
    corpus: Corpus, start: Place, file_count: int, selection: Selection, skip_bad: int, meanwhile: Callable[[], None]
) -> Generator[Work, None, None]:
    """Tasks from a place on, in the source's order; `meanwhile` as of `Files.path`."""
    before = sum(file.bytes for file in corpus.files.listed[: start.file])
    for index in range(start.file, file_count):
        listed, path = corpus.files.listed[index], corpus.files.path(index, meanwhile)
        found = units(path, corpus.settings.field)
        total = max(1, sum(unit.bytes for unit in found))
        read = 0
        for number, unit in enumerate(found):
            first = start.row if (index, number) == (start.file, start.unit) else 0
            begin, read = read, read + unit.bytes
            if (index, number) < (start.file, start.unit):
                continue
            rows = unit.rows if unit.rows is not None else first + 1
            step = max(1, rows * WORK_BYTES // max(1, unit.bytes)) if unit.rows is not None else 1
            for row in range(first, rows, step):
                stop = min(row + step, rows) if unit.rows is not None else None
                done = begin + unit.bytes * ((stop or rows) / rows if unit.rows else 1)
                reached = before + int(listed.bytes * done / total)
                settings = corpus.settings
                reading = (index, str(path), listed.name, number, row, stop)
                how = (settings.field, selection, reached, skip_bad, corpus.count_absent, corpus.conversations)
                yield Work(*reading, *how, corpus.longest, corpus.pairs)
        before += listed.bytes


class _Bar:
    """Progress in tokens, with documents and text rate; the total is estimated from how much of the input is read."""

    def __init__(self, writer: ShardWriter, limit: int | None, input_bytes: int) -> None:
        self.tokens = self._documents = 0
        self._writer, self._limit, self._input_bytes = writer, limit, max(1, input_bytes)
        self._bytes_before, self._started = writer.total_bytes, time.monotonic()
        self._bar = progress_bar(limit, "tok", writer.split, scale=True, initial=writer.total_tokens)

    def add(self, part: Part, taken: int) -> None:
        self.tokens += taken
        self._documents += len(part.rows)
        total = self._writer.total_tokens * self._input_bytes / max(1, part.work.input_bytes)
        self._bar.total = int(min(total, self._limit or total))
        rate = (self._writer.total_bytes - self._bytes_before) / 1e6 / max(1e-9, time.monotonic() - self._started)
        self._bar.set_postfix_str(f"{format_count(self._documents)} documents, {rate:.1f} MB/s of text", refresh=False)
        self._bar.update(taken)

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
