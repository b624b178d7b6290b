"""The manifest of a token set: what the shards hold, who made them, and whether they are all there.

A token set is a folder of headerless little-endian shards (`train-00000.bin`, …) and a `manifest.json`, written last.
One of conversations has marks beside its tokens (`train-marks-00000.bin`, …), one of the same size for each of them:
where a conversation starts, and which tokens are learned from. In a set without marks all are. One of preferences has
pairs of conversations, the chosen one first and the rejected one after it. One of prompts has their further fields
beside them (`train-fields-00000.bin`, …), lines of JSON of which every byte is stored as a token is.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NotRequired

import numpy as np
from typing_extensions import TypedDict

from common.errors import UserError
from common.json_file import BadJson, Count, Positive, Sha256, keep_others, parse_json
from common.os_errors import refusal
from common.paths import is_plain_name
from common.publish import canonical_json, write_json_whole
from common.regular_file import open_regular, read_at_most

FORMAT_VERSION = 1
MARKED_VERSION = 2  # of a set with marks: those that don't know them would learn from users' turns
MANIFEST_FILE = "manifest.json"
PREFERENCES = "preferences"  # the name of a source of pairs
SPLITS = ("train", "val")
NO_MARK, COUNTED, STARTS = 0, 1, 2  # a token's mark: a target that counts; a conversation's first, which is no target
MARK_COUNT = 3
UINT16_VOCABULARY = 1 << 16  # the largest vocabulary whose ids fit 16 bits
MOST_IDS = 1 << 32
PADDING_MULTIPLE = 128  # of a model's embedding table (ModelConfig.vocab_multiple): whole tiles of a matrix product
BLOCK_BYTES = 1 << 20
MOST_BYTES = 256 << 20  # of a manifest or a journal, which list every file that was read: a million have 200 MB
AGAIN = "copy it again, or prepare the set again with --force"


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrowest stored dtype for a vocabulary: little-endian uint16, or uint32 above 65,536 ids."""
    return np.dtype("<u2" if vocab_size <= UINT16_VOCABULARY else "<u4")


def padded_size(vocab_size: int) -> int:
    """The rows of a model's embedding table for a vocabulary."""
    return -(-vocab_size // PADDING_MULTIPLE) * PADDING_MULTIPLE


def document_start(tokenizer_spec: dict[str, Any]) -> int | None:
    """The id before every document, by a tokenizer's spec; None where documents are not marked."""
    found: int | None = tokenizer_spec.get("begin_of_text_id", tokenizer_spec.get("end_of_text_id"))
    return found


def shard_name(split: str, index: int) -> str:
    return f"{split}-{index:05d}.bin"


def marks_of(split: str) -> str:
    """The name under which the manifest lists a split's marks."""
    return f"{split}-marks"


def fields_of(split: str) -> str:
    """The name under which the manifest lists the further fields of a split's prompts."""
    return f"{split}-fields"


def split_sha256(folder: Path, shards: "Sequence[Shard]") -> str:
    """SHA-256 of a split's bytes, whatever its shards; read in blocks, as a shard may be larger than the memory."""
    digest = hashlib.sha256()
    for shard in shards:
        with open_regular(folder / shard.file) as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()


def validation_sha256(folder: Path, splits: "Mapping[str, Sequence[Shard]]") -> str:
    """That of the validation split, with its marks and fields where it has them."""
    return split_sha256(folder, [*splits["val"], *splits.get(marks_of("val"), ()), *splits.get(fields_of("val"), ())])


@dataclass(frozen=True)
class Shard:
    """One file of tokens. `documents` counts those that start in it, `bytes` the UTF-8 bytes its tokens stand for."""

    file: str
    tokens: Positive
    documents: Count
    bytes: Count
    sha256: Sha256


@keep_others
class StoredTokenizer(TypedDict):
    """What every tokenizer's spec has; `load_tokenizer` judges the rest."""

    kind: str
    vocab_size: Positive
    end_of_text_id: NotRequired[Count | None]
    sha256: Sha256
    begin_of_text_id: NotRequired[Count]


class Vocabulary(TypedDict):
    """How large a vocabulary is: its tokens (ids may have gaps), its largest id, and a model's rows for it."""

    tokens: Positive
    largest_id: Count
    padded: Positive


@keep_others
class SourceFile(TypedDict):
    """A file that was read, by its name within the source."""

    name: str


class SkippedRow(TypedDict):
    """What was skipped in a file, and where; keys in the order in which they are written, as in all of these."""

    file: str
    line: NotRequired[Count]
    row_group: NotRequired[Count]
    row: NotRequired[Count]
    block: NotRequired[Count]
    rest: NotRequired[bool]


class ConversationCounts(TypedDict):
    """Of a split: conversations, their tokens that count as targets, and the tokens of the longest."""

    conversations: Count
    answer_tokens: Count
    longest: Count


@keep_others
class Source(TypedDict, total=False):
    """Where a set comes from: the keys that programs read."""

    name: str
    files: list[SourceFile]
    skipped: list[SkippedRow]


class StoredManifest(TypedDict):
    """`manifest.json` of a complete set."""

    dtype: str
    tokenizer: StoredTokenizer
    source: Source
    versions: dict[str, str]
    splits: dict[str, tuple[Shard, ...]]
    val_sha256: Sha256
    val_text_sha256: NotRequired[Sha256]
    vocabulary: NotRequired[Vocabulary]
    shared_documents: NotRequired[Count]
    conversations: NotRequired[dict[str, ConversationCounts]]


@dataclass(frozen=True)
class Manifest:
    """All that is known about a token set. `tokenizer` is the tokenizer's spec; `source`, `versions`: for people.

    `val_sha256` is the SHA-256 of the validation split's bytes, its marks among them, whatever its shards: two sets
    with the same one are evaluated on the same tokens. `val_text_sha256` is that of its documents' text, whatever their
    tokens. It and `vocabulary` are None in sets made before 0.2.0. `shared_documents` is how many training documents
    start with the same 200 characters as one of validation, 0; None where the preparation can't tell. `conversations`:
    by split, of a set with marks; None: a set of texts.
    """

    dtype: str
    tokenizer: dict[str, Any]
    source: dict[str, Any]
    versions: dict[str, str]
    splits: dict[str, tuple[Shard, ...]]
    val_sha256: str
    format_version: int = FORMAT_VERSION
    complete: bool = True
    val_text_sha256: str | None = None
    vocabulary: Vocabulary | None = None
    shared_documents: int | None = None
    conversations: dict[str, ConversationCounts] | None = None

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def identity(self) -> str:
        """SHA-256 of what defines the data: every token, and how to read it. No times, no paths, no versions."""
        shards = {name: [[s.tokens, s.sha256] for s in self.splits[name]] for name in sorted(self.splits)}
        defining = [self.format_version, self.dtype, self.tokenizer["sha256"], shards]
        return hashlib.sha256(canonical_json(defining).encode()).hexdigest()

    @property
    def has_pairs(self) -> bool:
        """Whether its conversations are pairs of a chosen and a rejected one."""
        return self.conversations is not None and self.source.get("name") == PREFERENCES

    def total(self, split: str, field: str) -> int:
        """Sum of `tokens`, `documents` or `bytes` over a split's shards."""
        return sum(getattr(shard, field) for shard in self.splits.get(split, ()))

    def write(self, folder: Path) -> None:
        """Publish the manifest: from here on the set counts as complete."""
        written = {key: value for key, value in asdict(self).items() if value is not None}
        write_json_whole(folder / MANIFEST_FILE, written)

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest of a complete set.

        Raises UserError in one line where it is missing, damaged, incomplete or of another format.
        """
        path = folder / MANIFEST_FILE
        try:
            content = read_at_most(path, MOST_BYTES)
            state = parse_json(content, _State)
            if state.get("complete") is not True:
                raise UserError(f"{folder} is incomplete: run its preparation command again, it continues")
            if (version := state.get("format_version")) not in (FORMAT_VERSION, MARKED_VERSION):
                raise UserError(
                    f"{path} has format {str(version)[:40]}, but this Longhaul reads {FORMAT_VERSION} and "
                    f"{MARKED_VERSION}: prepare the set again with --force"
                )
            stored = parse_json(content, StoredManifest)
            marked = version == MARKED_VERSION
            if problem := next(_untrue(stored, marked=marked), None):
                raise BadJson(problem)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(_missing(folder)) from None
        except OSError as error:
            raise UserError(refusal("read", error, path, otherwise=AGAIN)) from None
        except (BadJson, OverflowError) as error:
            raise UserError(f"{path} is damaged ({error}): {AGAIN}") from None
        return cls(
            stored["dtype"],
            dict(stored["tokenizer"]),
            dict(stored["source"]),
            stored["versions"],
            stored["splits"],
            stored["val_sha256"],
            MARKED_VERSION if marked else FORMAT_VERSION,
            val_text_sha256=stored.get("val_text_sha256"),
            vocabulary=stored.get("vocabulary"),
            shared_documents=stored.get("shared_documents"),
            conversations=stored.get("conversations"),
        )


class _State(TypedDict, total=False):
    """The keys that are read before the rest."""

    complete: Any
    format_version: Any


def _untrue(stored: StoredManifest, *, marked: bool) -> Iterator[str]:
    """What is wrong with a manifest, whatever its shards hold, in words."""
    vocab_size = stored["tokenizer"]["vocab_size"]
    if vocab_size > MOST_IDS:
        yield f"tokenizer.vocab_size: {vocab_size:,} ids do not fit 32 bits"
    if stored["dtype"] != token_dtype(vocab_size).name:
        yield f"dtype is {stored['dtype']!r} for a vocabulary of {vocab_size:,}"
    if sizes := stored.get("vocabulary"):
        expected = (vocab_size - 1, padded_size(vocab_size))
        if (sizes["largest_id"], sizes["padded"]) != expected or sizes["tokens"] > vocab_size:
            yield f"vocabulary is {dict(sizes)} for a tokenizer of {vocab_size:,} ids"
    if shared := stored.get("shared_documents"):
        yield f"{shared:,} documents are both in train and in val"
    if missing := set(SPLITS) - stored["splits"].keys():
        yield f"there is no split {min(missing)}"
    for split in SPLITS if marked else ():
        of_tokens, marks = ([s.tokens for s in stored["splits"].get(name, ())] for name in (split, marks_of(split)))
        if of_tokens != marks or split not in stored.get("conversations", {}):
            yield f"the marks of the split {split} are not those of its tokens"
    if not marked and (stored["splits"].keys() - set(SPLITS) or "conversations" in stored):
        yield "it has marks, but the format of a set without"
    yield from wrong_names(shard for shards in stored["splits"].values() for shard in shards)


CORPORA = (  # how folders are named, what makes the corpora, what to know before
    ("fineweb", "data_prep/fineweb.py", " (10 billion tokens; for a first try add --max-tokens 100M)"),
    ("demo", "data_prep/docstrings.py --tokenizer gpt2-8k", ""),
    ("docstrings", "data_prep/docstrings.py", ""),
    ("shakespeare", "data_prep/shakespeare.py", ""),
    ("tiny-shakespeare", "data_prep/shakespeare.py", ""),
)


def wrong_names(shards: Iterable[Shard]) -> Iterator[str]:
    """What is wrong with the names of a set's shards, in words."""
    seen: set[str] = set()
    for shard in shards:
        if not is_plain_name(shard.file) or not shard.file.endswith(".bin"):
            yield f"{shard.file!r} is not a shard's name"
        elif shard.file in seen:  # its tokens would be read twice
            yield f"{shard.file} is listed twice"
        seen.add(shard.file)


def _missing(folder: Path) -> str:
    if not folder.exists():
        return f"there is no token set in {folder}: make one with {_preparation(folder)}"
    if folder.is_file():
        return f"{folder} is a file: a token set is a folder, which data_prep/text_files.py makes from texts"
    if any(folder.glob("*.bin*")):
        return f"{folder} is incomplete (no {MANIFEST_FILE}): run its preparation command again, it continues"
    if not any(path for path in folder.iterdir() if not path.name.startswith(".")):  # a preparation got no further
        return f"{folder} holds no token set yet: make one with {_preparation(folder)}"
    return f"{folder} holds no token set (no {MANIFEST_FILE}): is it the right folder?"


def _preparation(folder: Path) -> str:
    """The command that makes the set which a folder is named after, as in the configurations of train/configs."""
    for name, command, remark in CORPORA:
        if folder.name.startswith(name):
            return f"'python {command} --out {folder}'{remark}"
    return f"'python data_prep/text_files.py … --out {folder}' from your own texts, or name another --data.path"
