"""A corpus out of many files: validation first, then training, in shards, going on wherever an earlier run was stopped.

The output is a pure function of the files and the settings. A journal beside the shards says after every shard where in
the source the next one begins; the manifest replaces it when all is done.
"""

import contextlib
import time
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from common.errors import UserError
from common.progress import format_count, progress_bar
from common.publish import TEMPORARY_SUFFIX, sha256_file, write_json_whole
from data_prep.encode_pool import open_encoder
from data_prep.encode_worker import Part, Place, Selection, Work
from data_prep.inputs import units
from data_prep.manifest import Manifest, Shard
from data_prep.preparation import finish_set, first_difference, read_json
from data_prep.shard_writer import ShardWriter, clear_token_set, told
from data_prep.tokenization import Tokenizer

JOURNAL_FILE = "preparing.json"
WORK_BYTES = 8 << 20  # text in one task: a row group with more is shared by several workers


@dataclass(frozen=True)
class InputFile:
    """One file of the source: its name within it, its size, and hashes that tell it from another version."""

    name: str
    bytes: int
    digest: dict[str, str]


class Files(Protocol):
    """Where the source's files are, fetching them where needed."""

    listed: tuple[InputFile, ...]

    def path(self, index: int, meanwhile: Callable[[], None] = lambda: None) -> Path:
        """The file on this disk; may take as long as its download, and calls `meanwhile` again and again until then."""
        ...

    def done_with(self, index: int) -> None:
        """No file before `index` is needed any more."""
        ...


@dataclass(frozen=True)
class Settings:
    """All that decides the output beside the source itself. Counts are tokens; `max_tokens` None means all."""

    shard_tokens: int
    val_tokens: int
    max_tokens: int | None
    field: str
    tokenizer: str
    validation_one_in: int
    validation_files: int | None  # how many of the first files have validation documents; None: all


@dataclass(frozen=True)
class Corpus:
    """What to prepare: `name` and `origin` for the manifest, the files, the settings."""

    name: str
    origin: dict[str, Any]
    files: Files
    settings: Settings
    tokenizer: Tokenizer

    def source(self) -> dict[str, Any]:
        return {
            "name": self.name,
            **self.origin,
            "settings": asdict(self.settings),
            "files": [asdict(file) for file in self.files.listed],
        }


@dataclass
class SplitState:
    """How far a split is: its published shards, and where the next one begins."""

    shards: list[Shard] = field(default_factory=list)
    next: Place = field(default_factory=lambda: Place(0, 0, 0))
    done: bool = False
    last: Place | None = None  # the row of the last token, where the split was full before its documents ended


class Journal:
    """What a stopped preparation had reached. Written after every shard, whole."""

    def __init__(self, folder: Path, plan: dict[str, Any]) -> None:
        self._path = folder / JOURNAL_FILE
        self._plan = plan
        self.splits = {"val": SplitState(), "train": SplitState()}

    @classmethod
    def open(cls, folder: Path, plan: dict[str, Any]) -> "Journal":
        """The folder's journal, or a new one. Raises UserError where it has shards of other settings or sources."""
        journal = cls(folder, plan)
        if not journal._path.exists():
            clear_token_set(folder)
            return journal
        try:
            stored = read_json(journal._path)
            for name, state in stored["splits"].items():
                shards = [Shard(**shard) for shard in state["shards"]]
                last = state["last"] and Place(*state["last"])
                journal.splits[name] = SplitState(shards, Place(*state["next"]), state["done"], last)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{journal._path} can't be read ({error}): --force starts anew") from None
        if difference := first_difference(stored["plan"], plan):
            if not any(state.shards for state in journal.splits.values()):  # then there is nothing to lose
                clear_token_set(folder)
                return cls(folder, plan)
            raise UserError(f"{folder} was begun with another {difference}: use the same, another --out, or --force")
        journal._drop_leftovers(folder)
        return journal

    def _drop_leftovers(self, folder: Path) -> None:
        """Remove half-written files, and make sure that the published ones are there as they were written."""
        for path in folder.glob(f"*.bin{TEMPORARY_SUFFIX}"):
            path.unlink()
        itemsize = 2 if self._plan["tokenizer"]["vocab_size"] <= 1 << 16 else 4
        for state in self.splits.values():
            for number, shard in enumerate(state.shards):
                path = folder / shard.file
                whole = path.is_file() and path.stat().st_size == shard.tokens * itemsize
                if whole and number == len(state.shards) - 1:  # the one that a power cut could have hurt
                    whole = sha256_file(path) == shard.sha256
                if not whole:
                    raise UserError(f"{path} is not what was written: put it back, or start anew with --force")

    def save(self) -> None:
        try:
            write_json_whole(self._path, {"plan": self._plan, "splits": {n: asdict(s) for n, s in self.splits.items()}})
        except OSError as error:
            raise told(error, self._path) from error

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


def prepare(corpus: Corpus, folder: Path, workers: int, start_method: str) -> Manifest:
    """Write the set, or what is still missing of it, and return its manifest."""
    settings = corpus.settings
    plan = {"source": corpus.source(), "tokenizer": corpus.tokenizer.spec}
    journal = Journal.open(folder, plan)
    scope = len(corpus.files.listed) if settings.validation_files is None else settings.validation_files
    one_in = settings.validation_one_in if settings.val_tokens else 0
    if settings.val_tokens:
        taking = Selection("val", one_in, scope)
        _write_split(corpus, folder, journal, taking, settings.val_tokens, scope, workers, start_method)
    taking = Selection("train", one_in, scope, journal.splits["val"].last)
    count = len(corpus.files.listed)
    _write_split(corpus, folder, journal, taking, settings.max_tokens, count, workers, start_method)
    splits = {name: tuple(journal.splits[name].shards) for name in ("train", "val")}
    if not splits["train"]:
        raise UserError(f"the source has too little text in the field {settings.field!r}: nothing is left for training")
    manifest = finish_set(folder, corpus.tokenizer, corpus.source(), ["tiktoken", "numpy", "pyarrow"], splits)
    journal.remove()
    return manifest


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
    """Write a split's shards from where its state says, up to `limit` tokens, keeping the journal."""
    state = journal.splits[selection.side]
    if state.done:
        return
    journal.save()
    finished = sum(shard.tokens for shard in state.shards)
    if limit is None or finished < limit:
        with (
            open_encoder(corpus.tokenizer, workers, start_method) as pool,
            ShardWriter(
                folder, selection.side, corpus.tokenizer, corpus.settings.shard_tokens, finished=state.shards
            ) as writer,
            contextlib.closing(_works(corpus, state.next, file_count, selection, pool.check)) as works,
            _Bar(writer, limit, sum(file.bytes for file in corpus.files.listed[:file_count])) as bar,
        ):
            parts = pool.run(works)
            for number, part in enumerate(parts):
                skip = state.next.skip if number == 0 else 0
                taken = _write_part(part, skip, limit, writer, state, journal, corpus.files)
                bar.add(part, taken)
                if limit is not None and finished + bar.tokens >= limit:
                    break
    state.shards = list(writer.shards) if limit is None or finished < limit else state.shards
    state.done = True
    journal.save()


def _write_part(
    part: Part, offset: int, limit: int | None, writer: ShardWriter, state: SplitState, journal: Journal, files: Files
) -> int:
    """Write a part's tokens from `offset` on, noting the place after every shard; returns how many were taken."""
    begin = offset
    while offset < len(part.tokens):
        room = min(writer.room, len(part.tokens) - offset)
        if limit is not None:
            room = min(room, limit - writer.total_tokens)
        writer.write(part.tokens[offset : offset + room])
        offset += room
        if limit is not None and writer.total_tokens == limit:
            state.last = part.place(offset - 1)._replace(skip=0)
        if len(writer.shards) > len(state.shards):
            state.shards, state.next = list(writer.shards), part.place(offset)
            journal.save()
            if writer.split == "train":
                files.done_with(state.next.file)
        if limit is not None and writer.total_tokens == limit:
            break
    return offset - begin


def _works(
    corpus: Corpus, start: Place, file_count: int, selection: Selection, meanwhile: Callable[[], None]
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
                yield Work(index, str(path), listed.name, number, row, stop, settings.field, selection, reached)
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
