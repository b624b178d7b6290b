"""Check a token set: every shard's size, SHA-256, token ids, documents and bytes of text; the validation split's hash;
that no document of it is in the training split, too; of conversations also their marks.

Exit status 0 only if all is well; else 1, with a line for everything that is broken (2 where there is no set
to check).
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.early_end import end_in_one_line

    sys.excepthook = end_in_one_line

import argparse
import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from common.command_line import CommandParser
from common.errors import UserError, exit_on_user_error
from common.plain_text import one_line
from common.progress import Bar, format_count, progress_bar
from common.publish import file_to_write, write_json_output
from common.regular_file import open_regular
from data_prep.corpora.workers import choose_workers
from data_prep.token_sets.manifest import (
    MANIFEST_FILE,
    MARK_COUNT,
    SPLITS,
    STARTS,
    Manifest,
    Shard,
    document_start,
    fields_of,
    validation_sha256,
)
from data_prep.token_sets.marked_writer import count_conversations
from data_prep.token_sets.prompt_fields import NEWLINE
from data_prep.token_sets.shared_documents import shared_documents
from data_prep.token_sets.token_set import BYTES, TokenSet
from data_prep.tokenization.loading import load_tokenizer
from data_prep.tokenization.text_hash import split_text_sha256
from data_prep.tokenization.tokenizer import Tokenizer

BLOCK_BYTES = 4 << 20


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser(__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of the token set")
    parser.add_argument("--workers", type=int, help="shards checked at once (default: all cores)")
    parser.add_argument("--json", type=file_to_write, help="also write the result to this file")
    return parser.parse_args()


def starts_of(manifest: Manifest, split: str) -> int | None:
    """What a document starts with in a split's shards, a conversation in its marks, and a line of fields ends with."""
    if split in map(fields_of, SPLITS):
        return NEWLINE
    return document_start(manifest.tokenizer) if split in SPLITS else STARTS


@dataclass
class ShardReading:
    """What a shard really holds. `text_bytes` is None where the tokenizer can't be loaded here."""

    size: int = 0
    documents: int = 0
    text_bytes: int | None = None
    largest: int = -1
    sha256: str = ""


def read_shard(
    folder: Path, manifest: Manifest, tokenizer: Tokenizer | None, bar: Bar, shard: Shard, *, split: str = "train"
) -> ShardReading | OSError:
    """A shard's `ShardReading`, read once, block by block; or the OSError that kept it from being read.

    A file longer than its tokens is read no further: it may be endless, and its size is enough.

    Args: split: as the manifest names it. Marks start documents, too, and stand for no text.
    """
    dtype, begin = manifest.numpy_dtype, starts_of(manifest, split)
    tokenizer = tokenizer if split in SPLITS else None
    found = ShardReading(text_bytes=None if tokenizer is None else 0)
    digest = hashlib.sha256()
    try:
        with open_regular(folder / shard.file) as opened:
            size = os.fstat(opened.fileno()).st_size
            while found.size <= shard.tokens * dtype.itemsize and (block := opened.read(BLOCK_BYTES)):
                digest.update(block)
                found.size += len(block)
                tokens = np.frombuffer(block[: len(block) // dtype.itemsize * dtype.itemsize], dtype=dtype)
                found.largest = max(found.largest, int(tokens.max(initial=0)))
                if begin is not None:
                    found.documents += int(np.count_nonzero(tokens == begin))
                if tokenizer is not None and found.text_bytes is not None:
                    lengths = np.take(tokenizer.piece_bytes, tokens, mode="clip")  # `largest` reports ids outside
                    found.text_bytes += int(lengths.sum(dtype=np.int64))
                bar.update(len(block))
    except OSError as error:
        return error
    found.size, found.sha256 = max(size, found.size), digest.hexdigest()
    return found


def shard_problems(manifest: Manifest, split: str, index: int, found: ShardReading) -> Iterator[str]:
    """How a shard differs from its entry in the manifest, in words."""
    shard, tokens = manifest.splits[split][index], split in SPLITS
    vocab_size, begin = manifest.tokenizer["vocab_size"], starts_of(manifest, split)
    if found.size != (size := shard.tokens * manifest.numpy_dtype.itemsize):
        yield f"{found.size:,} bytes, not {size:,}"
    if found.size > size:  # not read to its end
        return
    if not tokens and found.largest >= (BYTES if begin == NEWLINE else MARK_COUNT):
        yield f"{found.largest:,} is no {'byte' if begin == NEWLINE else 'mark'}"
    elif tokens and found.largest >= vocab_size:
        yield f"token id {found.largest:,} is outside the vocabulary of {vocab_size:,}"
    if begin is None:  # then a split is one document
        found.documents = int(index == 0 and found.size > 0)
    if found.documents != shard.documents:
        yield f"{found.documents:,} documents start in it, not {shard.documents:,}"
    if found.text_bytes not in (None, shard.bytes):
        yield f"its tokens stand for {found.text_bytes:,} bytes of text, not {shard.bytes:,}"
    if found.sha256 != shard.sha256:
        yield f"SHA-256 {found.sha256[:16]}…, not {shard.sha256[:16]}…"


def tokenizer_of(manifest: Manifest) -> tuple[Tokenizer | None, list[str]]:
    """The tokenizer, to count text with (None where it isn't available here), and how the manifest's differs."""
    try:
        checked_here = ("sha256", "vocab_size")
        tokenizer = load_tokenizer({key: value for key, value in manifest.tokenizer.items() if key not in checked_here})
    except UserError as error:
        print(f"note: bytes of text are not checked: {error}", file=sys.stderr)
        return None, []
    differing = [key for key, value in manifest.tokenizer.items() if tokenizer.spec.get(key) != value]
    return tokenizer, [f"{MANIFEST_FILE}: its tokenizer's {key} is not that of the tokenizer here" for key in differing]


def set_problems(folder: Path, manifest: Manifest, workers: int) -> list[str]:
    """Everything that is wrong with a set, shards in their order."""
    places = [(split, index) for split in manifest.splits for index in range(len(manifest.splits[split]))]
    splits, shards = [split for split, _ in places], [manifest.splits[split][index] for split, index in places]
    listed = {shard.file for shard in shards}
    problems = [f"{path}: not in the manifest" for path in sorted(folder.glob("*.bin")) if path.name not in listed]
    tokenizer, differing = tokenizer_of(manifest)
    problems += differing
    total = sum(manifest.total(split, "tokens") for split in manifest.splits) * manifest.numpy_dtype.itemsize
    with progress_bar(total, "B", "verifying", scale=True) as bar, ThreadPoolExecutor(workers) as pool:
        read = partial(read_shard, folder, manifest, tokenizer, bar)
        readings = list(pool.map(lambda shard, split: read(shard, split=split), shards, splits))
    all_read = True
    for (split, index), shard, found in zip(places, shards, readings, strict=True):
        if isinstance(found, OSError):
            problems.append(f"{folder / shard.file}: {found.strerror}")
        else:
            wrong = shard_problems(manifest, split, index, found)
            problems += [f"{folder / shard.file} ({split}): {problem}" for problem in wrong]
        if isinstance(found, OSError) or found.size > shard.tokens * manifest.numpy_dtype.itemsize:
            all_read = False
    if all_read:
        val_sha256 = validation_sha256(folder, manifest.splits)
        if val_sha256 != manifest.val_sha256:
            problems.append(
                f"{folder / MANIFEST_FILE}: val_sha256 is {manifest.val_sha256[:16]}…, the validation split's is "
                f"{val_sha256[:16]}…"
            )
    recorded = manifest.val_text_sha256
    if not problems and tokenizer is not None and recorded is not None:
        found_text = split_text_sha256(folder, manifest.splits["val"], tokenizer)
        if found_text != recorded:
            problems.append(
                f"{folder / MANIFEST_FILE}: val_text_sha256 is {recorded[:16]}…, the validation text's is "
                f"{found_text[:16]}…"
            )
    if not problems:
        problems += [*mark_problems(folder, manifest), *shared_problems(folder, manifest)]
    return problems


def mark_problems(folder: Path, manifest: Manifest) -> Iterator[str]:
    """How the marks of a set of conversations differ from the manifest's counts of them, in words."""
    for split, recorded in (manifest.conversations or {}).items():
        marks = TokenSet(folder, manifest).marks(split)
        found = None if marks is None else count_conversations(marks)
        if found != recorded:
            yield f"{folder}: the marks of {split} are of {found}, the manifest has {dict(recorded)}"


def shared_problems(folder: Path, manifest: Manifest) -> list[str]:
    """A line where documents are in both splits: their loss is then measured on text that was trained on."""
    count, first = shared_documents(folder, manifest)
    if not count:
        return []
    which = f"{count:,} documents of train, the first of them document {first:,}, are in val, too"
    return [f"{folder}: {which}: prepare the set again with --force, which leaves them out of train"]


def main() -> int:
    arguments = parse_arguments()
    manifest = Manifest.read(arguments.folder)
    problems = set_problems(arguments.folder, manifest, max(1, choose_workers(arguments.workers)))
    for problem in problems:
        print(one_line(problem))
    count = sum(len(shards) for shards in manifest.splits.values())
    tokens = sum(manifest.total(split, "tokens") for split in SPLITS)
    if not problems:
        print(f"{arguments.folder}: {count} shards, {format_count(tokens)} tokens, all is well")
    if arguments.json:
        figures = {"problems": problems, "shards": count, "tokens": tokens, "identity": manifest.identity}
        write_json_output(arguments.json, figures)
    return 1 if problems else 0


if __name__ == "__main__":
    exit_on_user_error(main)
