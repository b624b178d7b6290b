"""The manifest of a token set: what the shards hold, who made them, and whether they are all there.

A token set is a folder of headerless little-endian shards (`train-00000.bin`, …) and a `manifest.json`, written last.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.os_errors import refusal
from common.publish import canonical_json, write_json_whole

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
SPLITS = ("train", "val")
UINT16_VOCABULARY = 1 << 16  # the largest vocabulary whose ids fit 16 bits
BLOCK_BYTES = 1 << 20
_SHA256 = re.compile("[0-9a-f]{64}")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrowest stored dtype for a vocabulary: little-endian uint16, or uint32 above 65,536 ids."""
    return np.dtype("<u2" if vocab_size <= UINT16_VOCABULARY else "<u4")


def document_start(tokenizer_spec: dict[str, Any]) -> int | None:
    """The id that stands before every document, by a tokenizer's spec; None where documents are not marked."""
    found: int | None = tokenizer_spec.get("begin_of_text_id", tokenizer_spec.get("end_of_text_id"))
    return found


def shard_name(split: str, index: int) -> str:
    return f"{split}-{index:05d}.bin"


def split_sha256(folder: Path, shards: "Sequence[Shard]") -> str:
    """SHA-256 of a split's bytes, whatever its shards; read in blocks, as a shard may be larger than the memory."""
    digest = hashlib.sha256()
    for shard in shards:
        with open(folder / shard.file, "rb") as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class Shard:
    """One file of tokens. `documents` counts those that begin in it, `bytes` the UTF-8 bytes its tokens stand for."""

    file: str
    tokens: int
    documents: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """All that is known about a token set. `tokenizer` is the tokenizer's spec; `source`, `versions`: for people.

    `val_sha256` is the SHA-256 of the validation split's bytes, whatever its shards: two sets with the same one are
    evaluated on the same tokens.
    """

    dtype: str
    tokenizer: dict[str, Any]
    source: dict[str, Any]
    versions: dict[str, str]
    splits: dict[str, tuple[Shard, ...]]
    val_sha256: str
    format_version: int = FORMAT_VERSION
    complete: bool = True

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def identity(self) -> str:
        """SHA-256 of what defines the data: every token, and how to read it. No times, no paths, no versions."""
        shards = {name: [[s.tokens, s.sha256] for s in self.splits[name]] for name in sorted(self.splits)}
        defining = [self.format_version, self.dtype, self.tokenizer["sha256"], shards]
        return hashlib.sha256(canonical_json(defining).encode()).hexdigest()

    def total(self, split: str, field: str) -> int:
        """Sum of `tokens`, `documents` or `bytes` over a split's shards."""
        return sum(getattr(shard, field) for shard in self.splits.get(split, ()))

    def write(self, folder: Path) -> None:
        """Publish the manifest: from here on the set counts as complete."""
        write_json_whole(folder / MANIFEST_FILE, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest of a complete set.

        Raises UserError in one line where it is missing, damaged, incomplete or of another format.
        """
        path = folder / MANIFEST_FILE
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(_missing(folder)) from None
        except OSError as error:
            raise UserError(refusal("read", error, path, otherwise="prepare the set again with --force")) from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} can't be read ({error}): prepare the set again with --force") from None
        if not isinstance(fields, dict) or fields.get("complete") is not True:
            raise UserError(f"{folder} is incomplete: run its preparation command again, it continues")
        if fields.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"{path} has format {fields.get('format_version')}, this Longhaul reads {FORMAT_VERSION}: "
                "prepare the set again with --force"
            )
        try:
            splits = {name: tuple(Shard(**shard) for shard in shards) for name, shards in fields.pop("splits").items()}
            manifest = cls(**fields, splits=splits)
            if problem := next(_wrong_fields(manifest), None):
                raise ValueError(problem)
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise UserError(f"{path} is damaged ({error}): prepare the set again with --force") from None
        return manifest


def _wrong_fields(manifest: Manifest) -> Iterator[str]:
    """What can't be true of a manifest, whatever its shards hold, in words."""
    if not {"kind", "vocab_size", "sha256"} <= manifest.tokenizer.keys():
        yield "tokenizer lacks its kind, vocab_size or sha256"
    elif not _is_count(manifest.tokenizer["vocab_size"]):
        yield f"vocab_size is {manifest.tokenizer['vocab_size']!r}"
    elif manifest.dtype != token_dtype(manifest.tokenizer["vocab_size"]).name:
        yield f"dtype is {manifest.dtype!r} for a vocabulary of {manifest.tokenizer['vocab_size']:,}"
    if not _is_sha256(manifest.val_sha256):
        yield f"val_sha256 is {manifest.val_sha256!r}"
    if missing := set(SPLITS) - manifest.splits.keys():
        yield f"there is no split {min(missing)}"
    seen: set[str] = set()
    for shard in (shard for shards in manifest.splits.values() for shard in shards):
        if not isinstance(shard.file, str) or shard.file != Path(shard.file).name or not shard.file.endswith(".bin"):
            yield f"{shard.file!r} is no shard's name"
        elif shard.file in seen:  # its tokens would be read twice
            yield f"{shard.file} is listed twice"
        elif not _is_sha256(shard.sha256):
            yield f"the sha256 of {shard.file} is {shard.sha256!r}"
        else:
            counts = {name: getattr(shard, name) for name in ("tokens", "documents", "bytes")}
            yield from (f"{shard.file} has {n!r} {name}" for name, n in counts.items() if not _is_count(n))
        seen.add(str(shard.file))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _missing(folder: Path) -> str:
    if not folder.exists():
        return (
            f"there is no token set in {folder}: make one, for example with "
            f"'python data_prep/docstrings.py --out {folder}' or 'python data_prep/fineweb.py --out {folder}'"
        )
    if folder.is_file():
        return f"{folder} is a file: a token set is a folder, which data_prep/text_files.py makes of texts"
    if any(folder.glob("*.bin*")):
        return f"{folder} is incomplete (no {MANIFEST_FILE}): run its preparation command again, it continues"
    return f"{folder} holds no token set (no {MANIFEST_FILE}): is it the right folder?"
