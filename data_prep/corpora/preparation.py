"""What every preparation command shares: its options, refusing to redo or mix up work, the lock, the final table."""

import argparse
import contextlib
import hashlib
import importlib.metadata
import platform
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from common.errors import UserError
from common.os_errors import refusal
from common.paths import PROJECT
from common.progress import format_bytes, format_count, format_duration
from common.publish import canonical_json, file_to_write, write_json_output
from data_prep.token_sets.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    MARK_COUNT,
    MARKED_VERSION,
    SPLITS,
    ConversationCounts,
    Manifest,
    Shard,
    marks_of,
    padded_size,
    validation_sha256,
)
from data_prep.token_sets.marked_writer import count_conversations
from data_prep.token_sets.shard_writer import SHARD_TOKENS, write_error
from data_prep.token_sets.token_set import TokenStream
from data_prep.tokenization.text_hash import split_text_sha256
from data_prep.tokenization.tokenizer import Tokenizer

DATA_FOLDER = PROJECT / "data"
LOCK_FILE = ".preparing.lock"
LOCK_SECONDS = 3.0  # a killed command's workers may live on for a moment
VALIDATION_KEY_CHARACTERS = 200
VALIDATION_ONE_IN = 32


def add_output_options(parser: argparse.ArgumentParser, default_name: str, shard_tokens: int = SHARD_TOKENS) -> None:
    """`--out`, `--shard-tokens`, `--force`, `--json`."""
    written = parser.add_argument_group("what is written")
    written.add_argument("--out", type=Path, default=DATA_FOLDER / default_name, help="folder of the token set")
    written.add_argument("--shard-tokens", type=positive_count, default=shard_tokens, help="tokens per shard file")
    written.add_argument("--force", action="store_true", help="remove the token set that is there and make it again")
    written.add_argument("--json", type=file_to_write, help="also write the final figures to this file")


def positive_count(text: str) -> int:
    """A whole number above zero; 100_000, 10M, 1.5B and 1e9 are understood too."""
    units = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
    try:
        unit = units.get(text[-1:].upper(), 1)
        value = Fraction(text[:-1] if unit != 1 else text) * unit  # exactly: as a float 2.01M isn't whole
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number such as 100000, 10M or 1e9") from None
    if value < 1 or value.denominator != 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above zero: use 1 or more")
    return int(value)


def document_key(text: str) -> int:
    """A hash of a document's first 200 characters (64 bits), which decides the side that it may be on.

    So documents that start alike (copies with small changes, shared templates) stay on one side.
    """
    start = text[:VALIDATION_KEY_CHARACTERS].encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(start, digest_size=8).digest(), "little")


def chosen_for_validation(text: str, one_in: int) -> bool:
    """Whether a document may validate: decided only by its key."""
    return document_key(text) % one_in == 0


@contextlib.contextmanager
def writing_alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, so that no second command writes into it. Raises UserError where one does."""
    lock = FileLock(folder / LOCK_FILE, timeout=LOCK_SECONDS)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UserError(f"another command is writing to {folder}: wait for it, or choose another --out") from None
    except OSError as error:
        raise UserError(refusal("written", error, folder, otherwise="choose another --out")) from None
    try:
        yield
    finally:
        lock.release()


def complete_set(folder: Path, source_name: str, *, force: bool) -> Manifest | None:
    """The complete set that is there already, or None where one is to be made.

    A complete set is never rebuilt unless `force` is given; the caller removes it, once the source of the
    new one is known to be there. Raises UserError where the folder holds another corpus.
    """
    if force or not (folder / MANIFEST_FILE).exists():
        return None
    manifest = Manifest.read(folder)
    if manifest.source.get("name") != source_name:
        raise UserError(f"{folder} holds the {manifest.source.get('name')} set: choose another --out, or --force")
    return manifest


def first_difference(stored: Any, wanted: Any, path: str = "") -> str | None:
    """The name of the first entry in which two JSON values differ, or None."""
    if canonical_json(stored) == canonical_json(wanted):
        return None
    if isinstance(stored, dict) and isinstance(wanted, dict):
        for key in sorted(stored.keys() | wanted.keys()):
            if found := first_difference(stored.get(key), wanted.get(key), key):
                return found
    return path if isinstance(stored, dict | list) else f"{path} ({stored}, now {wanted})"


def finish_set(
    folder: Path,
    tokenizer: Tokenizer,
    source: dict[str, Any],
    packages: Sequence[str],
    splits: dict[str, tuple[Shard, ...]],
    shared_documents: int | None = None,
    *,
    marked: bool = False,
) -> Manifest:
    """Publish the manifest of a set whose shards are all there. Versions of `packages` are noted.

    Args:
        shared_documents: as the manifest has it.
        marked: the tokens have marks, which are in `splits`, too.
    """
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
    manifest = Manifest(
        tokenizer.dtype.name,
        tokenizer.spec,
        source,
        versions,
        splits,
        validation_sha256(folder, splits),
        MARKED_VERSION if marked else FORMAT_VERSION,
        val_text_sha256=None if marked else split_text_sha256(folder, splits["val"], tokenizer),
        vocabulary={
            "tokens": tokenizer.token_count,
            "largest_id": tokenizer.vocab_size - 1,
            "padded": padded_size(tokenizer.vocab_size),
        },
        shared_documents=shared_documents,
        conversations=_counts(folder, tokenizer, splits) if marked else None,
    )
    try:
        manifest.write(folder)
    except OSError as error:
        raise write_error(error, folder / MANIFEST_FILE) from error
    return manifest


def _counts(folder: Path, tokenizer: Tokenizer, splits: dict[str, tuple[Shard, ...]]) -> dict[str, ConversationCounts]:
    streams = {name: TokenStream(folder, splits[marks_of(name)], tokenizer.dtype, MARK_COUNT) for name in SPLITS}
    return {name: count_conversations(stream) for name, stream in streams.items()}


def report(folder: Path, manifest: Manifest, *, seconds: float | None, json_file: Path | None, made: bool) -> None:
    """Print what the set holds, and write the same figures to `json_file`."""
    itemsize = manifest.numpy_dtype.itemsize
    figures: dict[str, Any] = {
        "folder": str(folder),
        "made": made,
        "identity": manifest.identity,
        "val_sha256": manifest.val_sha256,
        "val_text_sha256": manifest.val_text_sha256,
        "vocabulary": manifest.vocabulary,
        "shared_documents": manifest.shared_documents,
        "seconds": seconds,
        "skipped": manifest.source.get("skipped", []),
        "splits": {},
    }
    print(f"{'split':8}{'documents':>12}{'tokens':>16}{'text':>12}{'on disk':>12}{'shards':>8}")
    for split, shards in ((name, manifest.splits[name]) for name in SPLITS):
        row = {field: manifest.total(split, field) for field in ("documents", "tokens", "bytes")}
        disk = row["tokens"] * itemsize
        conversations = (manifest.conversations or {}).get(split)
        row |= {"documents": conversations["conversations"]} if conversations else {}
        figures["splits"][split] = row | {"disk_bytes": disk, "shards": len(shards)} | (conversations or {})
        print(
            f"{split:8}{row['documents']:>12,}{row['tokens']:>16,}{format_bytes(row['bytes']):>12}"
            f"{format_bytes(disk):>12}{len(shards):>8}"
        )
    for split, found in (manifest.conversations or {}).items():
        pairs = f"{found['conversations'] // 2:,} pairs, " if manifest.has_pairs else ""
        print(
            f"{split}: {pairs}{found['conversations']:,} conversations, {found['answer_tokens']:,} tokens of answers, "
            f"the longest has {found['longest']:,} tokens"
        )
    if seconds:
        tokens = sum(row["tokens"] for row in figures["splits"].values())
        print(f"{format_count(tokens)} tokens in {format_duration(seconds)}, {format_count(tokens / seconds)} tokens/s")
    if manifest.splits["val"]:
        print(f"validation set sha256 {manifest.val_sha256}")
    if json_file:
        write_json_output(json_file, figures)
