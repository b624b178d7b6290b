"""Copying a token set to a disk of each node's own, so that a shared file system is read once and not every step."""

import hashlib
import os
import shutil
import socket
import sys
from pathlib import Path

from common.errors import UserError
from common.progress import format_bytes, progress_bar
from common.publish import fsync_file
from data_prep.manifest import MANIFEST_FILE, Shard
from data_prep.token_set import TokenSet
from model.ranks import Ranks

BLOCK_BYTES = 8 << 20


def stage(tokens: TokenSet, folder: Path, ranks: Ranks) -> TokenSet:
    """The same token set on this node's disk, copied there by one rank of every node. (All ranks call.)

    A copy that is there already is used. Where copying fails (no space, not writable, bytes that differ), the nodes
    concerned go on with the set where it is, and say so.
    """
    target = folder / f"longhaul-{tokens.identity[:16]}"
    problem = None
    if ranks.local_rank == 0:
        try:
            copy_set(tokens, target)
        except (OSError, UserError) as error:
            problem = f"{socket.gethostname()}: {error}"
    problems = [answer for answer in ranks.gather(problem) if answer]
    if ranks.is_first:
        for problem in problems:
            print(f"data are read from {tokens.folder}, not staged, on {problem}", file=sys.stderr, flush=True)
    try:
        return TokenSet.open(target)
    except UserError:  # its reason has been said
        return tokens


def copy_set(tokens: TokenSet, target: Path) -> None:
    """Copy and verify a set, the manifest last; whole shards that are there from an earlier attempt stay.

    Raises OSError where it can't be written and UserError where a copy's SHA-256 is not the manifest's.
    """
    if (target / MANIFEST_FILE).exists():
        return
    target.mkdir(parents=True, exist_ok=True)
    shards = [shard for split in tokens.manifest.splits.values() for shard in split]
    sizes = {shard.file: (tokens.folder / shard.file).stat().st_size for shard in shards}
    missing = [shard for shard in shards if not (target / shard.file).exists()]
    needed, free = sum(sizes[shard.file] for shard in missing), shutil.disk_usage(target).free
    if needed > free:
        raise OSError(f"{target} has {format_bytes(free)} free, the data need {format_bytes(needed)}")
    with progress_bar(needed, "B", f"staging to {target}", scale=True) as bar:
        for shard in missing:
            bar.update(_copy_shard(tokens.folder, target, shard))
    shutil.copyfile(tokens.folder / MANIFEST_FILE, target / f".{MANIFEST_FILE}")
    os.replace(target / f".{MANIFEST_FILE}", target / MANIFEST_FILE)


def _copy_shard(source: Path, target: Path, shard: Shard) -> int:
    """Copy one shard under a temporary name, hashing on the way; return its bytes."""
    temporary = target / f".{shard.file}.tmp"
    digest, copied = hashlib.sha256(), 0
    with open(source / shard.file, "rb") as read, open(temporary, "wb") as written:
        while block := read.read(BLOCK_BYTES):
            digest.update(block)
            written.write(block)
            copied += len(block)
    if digest.hexdigest() != shard.sha256:
        temporary.unlink()
        raise UserError(f"{source / shard.file} is not what was prepared (its SHA-256 differs)")
    fsync_file(temporary)
    os.replace(temporary, target / shard.file)
    return copied
