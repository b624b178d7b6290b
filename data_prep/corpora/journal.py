"""How far a preparation is: its published shards, where in the source each split resumes, and what it had to skip.

The journal is kept beside the shards and rewritten whole after every one of them; the manifest replaces it in the end.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from common.errors import UserError
from common.json_file import Count, keep_others, read_json_for_user
from common.plain_text import one_line
from common.publish import TEMPORARY_SUFFIX, canonical_json, sha256_file, write_json_whole
from common.regular_file import size_of_file
from data_prep.corpora.encode_worker import Place
from data_prep.corpora.preparation import first_difference
from data_prep.corpora.skipping import Skipped
from data_prep.token_sets.manifest import (
    MOST_BYTES,
    Shard,
    SkippedRow,
    StoredTokenizer,
    marks_of,
    shard_name,
    token_dtype,
)
from data_prep.token_sets.shard_writer import clear_token_set, remove_file, write_error

JOURNAL_FILE = "preparing.json"
ANEW = "use --force to start again"


@keep_others
class PlannedFile(TypedDict):
    """A file of the source."""

    name: str
    bytes: Count
    digest: dict[str, str]


@keep_others
class PlannedSettings(TypedDict):
    """The settings that decide how many files the shards depend on."""

    validation_files: Count | None


@keep_others
class PlannedSource(TypedDict):
    """Where the documents come from; `repo`, `config` and `revision`: of the hub."""

    name: str
    settings: PlannedSettings
    files: list[PlannedFile]
    repo: NotRequired[str]
    config: NotRequired[str]
    revision: NotRequired[str]


class Plan(TypedDict):
    """What a preparation was started with."""

    source: PlannedSource
    tokenizer: StoredTokenizer


class StoredAbsences(TypedDict):
    """`Absences`."""

    counts: dict[str, Count]
    first: list[SkippedRow]


class StoredSplit(TypedDict):
    """A `SplitState`, none of which may be missing: a default would start the split again."""

    shards: list[Shard]
    next: Place
    done: bool
    last: Place | None
    keys: NotRequired[str]
    absent: NotRequired[StoredAbsences]
    marks: NotRequired[list[Shard]]


class StoredSplits(TypedDict):
    """Both, as they are made."""

    val: StoredSplit
    train: StoredSplit


class StoredJournal(TypedDict):
    """`preparing.json`."""

    plan: Plan
    splits: StoredSplits
    skipped: NotRequired[list[tuple[tuple[Count, Count, Count], SkippedRow]]]


@dataclass
class SplitState:
    """How far a split is: its published shards, and where the next one starts."""

    shards: list[Shard] = field(default_factory=list)
    next: Place = field(default_factory=lambda: Place(0, 0, 0))
    done: bool = False
    last: Place | None = None  # the row of the last token, where the split was full before its documents ended
    keys: str | None = ""  # of its documents, where it is validation: 16 digits each; None: a 0.1.0 did not record them
    marks: list[Shard] | None = None  # those of the published shards, of conversations
    absent: StoredAbsences | None = None  # records without text up to `next`, where they are counted

    def add_keys(self, found: Iterable[int]) -> None:
        if self.keys is not None:
            self.keys += "".join(f"{key:016x}" for key in found)

    def key_set(self) -> frozenset[int]:
        """The keys of its documents, as `document_key` makes them."""
        digits = self.keys or ""
        return frozenset(int(digits[place : place + 16], 16) for place in range(0, len(digits), 16))


@dataclass(frozen=True)
class Begun:
    """A journal as it was found: the plan, the splits, and what was skipped."""

    plan: dict[str, Any]
    splits: dict[str, SplitState]
    skipped: list[Any]

    @classmethod
    def read(cls, folder: Path) -> "Begun | None":
        """The folder's, or None where there is none. Raises UserError where it can't be read."""
        path = folder / JOURNAL_FILE
        try:
            stored = read_json_for_user(path, StoredJournal, ANEW, most_bytes=MOST_BYTES)
        except FileNotFoundError:
            return None
        unknown: dict[str, Any] = {"keys": None}
        splits = {
            "val": SplitState(**(unknown | dict(stored["splits"]["val"]))),
            "train": SplitState(**(unknown | dict(stored["splits"]["train"]))),
        }
        if set(splits["val"].keys or "") - set("0123456789abcdef"):
            raise UserError(f"{path} is damaged (the validation documents' keys): {ANEW}")
        for name, state in splits.items():
            marks = state.marks
            if marks is not None and [(s.file, s.tokens) for s in marks] != [
                (shard_name(marks_of(name), index), shard.tokens) for index, shard in enumerate(state.shards)
            ]:
                raise UserError(f"{path} is damaged (the marks of {name} are not those of its tokens): {ANEW}")
            for index, shard in enumerate(state.shards):
                if shard.file != shard_name(name, index):  # the next one's name follows from their number
                    raise UserError(f"{path} is damaged ({shard.file!r} is not {shard_name(name, index)}): {ANEW}")
        return cls(dict(stored["plan"]), splits, list(stored.get("skipped", [])))

    @property
    def has_shards(self) -> bool:
        return any(state.shards for state in self.splits.values())

    def files_read(self) -> int | None:
        """How many of the source's first files the published shards depend on; None: on all, and on there being no
        more.

        Nothing of later files is in any shard, so they may change.
        """
        scope = {"val": self.plan["source"]["settings"]["validation_files"], "train": None}
        read = 0
        for name, state in self.splits.items():
            if not state.done:
                count = state.next.file + (state.next[1:] != (0, 0, 0))
            elif state.last is not None:
                count = state.last.file + 1
            elif scope[name] is None:  # the split ended where the files did
                return None
            else:
                count = scope[name]
            read = max(read, count)
        return read


def source_difference(
    stored: Mapping[str, Any], wanted: Mapping[str, Any], files_read: int | None = None
) -> str | None:
    """How two sources differ, or None; of their files only the first `files_read` count, where that is given."""
    if "files" in stored and "files" in wanted:
        before, now = ((source["files"] or [])[:files_read] for source in (stored, wanted))
        for index in range(max(len(before), len(now))):
            if canonical_json(before[index : index + 1]) != canonical_json(now[index : index + 1]):
                return f"file {(now if index < len(now) else before)[index]['name']}"
    rest = [{key: source[key] for key in source if key != "files"} for source in (stored, wanted)]
    return first_difference(rest[0], rest[1])


class Journal:
    """How far a preparation is, on disk. Rewritten whole after every shard."""

    def __init__(self, folder: Path, plan: dict[str, Any], skip_bad: int = 0) -> None:
        self._path = folder / JOURNAL_FILE
        self._plan = plan
        self.splits = {"val": SplitState(), "train": SplitState()}
        self.skipped = Skipped(skip_bad)

    @classmethod
    def open(cls, folder: Path, plan: dict[str, Any], skip_bad: int = 0) -> "Journal":
        """The folder's journal, or a new one.

        Files that no published shard has read may have changed. Raises UserError where there are shards of other
        settings or sources.
        """
        journal, begun = cls(folder, plan, skip_bad), Begun.read(folder)
        if begun is None or not begun.has_shards:  # then there is nothing to lose
            clear_token_set(folder)
            return journal
        difference = source_difference(begun.plan["source"], plan["source"], begun.files_read())
        if difference := difference or first_difference(begun.plan["tokenizer"], plan["tokenizer"]):
            raise UserError(f"{folder} was started with another {difference}: use the same, another --out, or --force")
        if changed := source_difference(begun.plan["source"], plan["source"]):
            note = f"note     another {changed} than at the start: no published shard used it, so it is read as it is"
            print(one_line(note))
        journal.splits = begun.splits
        journal.skipped.restore(begun.skipped, begun.files_read())
        journal._drop_leftovers(folder)
        return journal

    def _drop_leftovers(self, folder: Path) -> None:
        """Remove half-written files, and make sure that the published ones are there as they were written."""
        for path in folder.glob(f"*.bin{TEMPORARY_SUFFIX}"):
            remove_file(path)
        itemsize = token_dtype(self._plan["tokenizer"]["vocab_size"]).itemsize
        kept = [shards for state in self.splits.values() for shards in (state.shards, state.marks or [])]
        for shards in kept:
            for number, shard in enumerate(shards):
                path = folder / shard.file
                try:
                    whole = size_of_file(path) == shard.tokens * itemsize
                    if whole and number == len(shards) - 1:  # the one that a power cut could have damaged
                        whole = sha256_file(path) == shard.sha256
                except OSError:
                    whole = False
                if not whole:
                    raise UserError(f"{path} is not what was written: put it back, or start again with --force")

    def save(self) -> None:
        try:
            splits = {
                name: {
                    key: value
                    for key, value in asdict(state).items()
                    if value is not None or key not in ("keys", "absent", "marks")
                }
                for name, state in self.splits.items()
            }
            write_json_whole(self._path, {"plan": self._plan, "splits": splits} | self.skipped.to_store())
            size = size_of_file(self._path)
        except OSError as error:
            raise write_error(error, self._path) from error
        if size > MOST_BYTES:  # before the first shard: neither this nor the manifest could be read again
            raise UserError(
                f"{self._path} would have {size:,} bytes for so many files, and at most {MOST_BYTES:,} are read: "
                "put the documents into fewer files, as lines of JSON"
            )

    def remove(self) -> None:
        remove_file(self._path)
