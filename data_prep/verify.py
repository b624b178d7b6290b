"""Check a token set: every shard's size, SHA-256, token-id range and document count.

Exit status 0 only if all is well; else 1, with a line for everything that is broken (2 where there is no set to check).
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import hashlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from tqdm import tqdm

from common.command_line import CommandParser
from common.errors import exit_on_user_error
from common.progress import format_count, progress_bar
from common.publish import file_to_write, write_json_whole
from data_prep.manifest import Manifest, Shard
from data_prep.workers import choose_workers

BLOCK_BYTES = 4 << 20


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser(__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of the token set")
    parser.add_argument("--workers", type=int, help="shards checked at once (default: all cores)")
    parser.add_argument("--json", type=file_to_write, help="also write the result to this file")
    return parser.parse_args()


def shard_problems(folder: Path, manifest: Manifest, bar: "tqdm[None]", named: tuple[str, Shard]) -> list[str]:
    """What is wrong with a shard, in words; reads it once, block by block."""
    split, shard = named
    path, dtype = folder / shard.file, manifest.numpy_dtype
    end_of_text = manifest.tokenizer.get("end_of_text_id")
    try:
        size = path.stat().st_size
        problems = (
            [] if size == shard.tokens * dtype.itemsize else [f"{size:,} bytes, not {shard.tokens * dtype.itemsize:,}"]
        )
        digest, largest, documents = hashlib.sha256(), -1, 0
        with open(path, "rb") as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
                tokens = np.frombuffer(block[: len(block) // dtype.itemsize * dtype.itemsize], dtype=dtype)
                largest = max(largest, int(tokens.max(initial=0)))
                documents += int(np.count_nonzero(tokens == end_of_text)) if end_of_text is not None else 0
                bar.update(len(block))
    except OSError as error:
        return [f"{path}: {error.strerror}"]
    if largest >= manifest.tokenizer["vocab_size"]:
        problems.append(f"token id {largest:,} is outside the vocabulary of {manifest.tokenizer['vocab_size']:,}")
    if end_of_text is not None and documents != shard.documents:
        problems.append(f"{documents:,} documents begin in it, not {shard.documents:,}")
    if digest.hexdigest() != shard.sha256:
        problems.append(f"SHA-256 {digest.hexdigest()[:16]}…, not {shard.sha256[:16]}…")
    return [f"{path} ({split}): {problem}" for problem in problems]


def set_problems(folder: Path, manifest: Manifest, workers: int) -> list[str]:
    """Everything that is wrong with a set, shards in their order."""
    shards = [(split, shard) for split in manifest.splits for shard in manifest.splits[split]]
    listed = {shard.file for _, shard in shards}
    problems = [f"{path}: not in the manifest" for path in sorted(folder.glob("*.bin")) if path.name not in listed]
    total = sum(shard.tokens for _, shard in shards) * manifest.numpy_dtype.itemsize
    with progress_bar(total, "B", "verifying", scale=True) as bar, ThreadPoolExecutor(workers) as pool:
        for found in pool.map(partial(shard_problems, folder, manifest, bar), shards):
            problems += found
    return problems


def main() -> int:
    arguments = parse_arguments()
    manifest = Manifest.read(arguments.folder)
    problems = set_problems(arguments.folder, manifest, max(1, choose_workers(arguments.workers)))
    for problem in problems:
        print(problem)
    count = sum(len(shards) for shards in manifest.splits.values())
    tokens = sum(manifest.total(split, "tokens") for split in manifest.splits)
    if not problems:
        print(f"{arguments.folder}: {count} shards, {format_count(tokens)} tokens, all is well")
    if arguments.json:
        figures = {"problems": problems, "shards": count, "tokens": tokens, "identity": manifest.identity}
        write_json_whole(arguments.json, figures)
    return 1 if problems else 0


if __name__ == "__main__":
    exit_on_user_error(main)
