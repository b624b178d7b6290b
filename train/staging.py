"""Copying a token set to a disk of each node's own, so that a shared file system is read once and not every step."""

import contextlib
import hashlib
import os
import shutil
import socket
import sys
import time
import uuid
from pathlib import Path
from typing import Literal

from common.errors import UserError
from common.progress import format_bytes, progress_bar
from common.publish import TEMPORARY_SUFFIX, fsync_file, sha256_file
from data_prep.manifest import MANIFEST_FILE, Shard
from data_prep.token_set import TokenSet
from model.ranks import Ranks

BLOCK_BYTES = 8 << 20
LEFT_SECONDS = 3600.0  # a temporary file that nobody has written to for so long is nobody's


def stage(tokens: TokenSet, folder: Path, ranks: Ranks, verify: Literal["size", "full"] = "size") -> TokenSet:
    """The same token set on this node's disk, copied there by one rank of every node. (All ranks call.)

    A copy that is there already is used, once its sizes (or with `verify` full its hashes) are right: what lies on such
    disks gets cleaned away. Where copying fails (no space, not writable, bytes that differ), the nodes
    concerned go on with the set where it is, and say so.
    """
    target, host, problem = folder / f"longhaul-{tokens.identity[:16]}", socket.gethostname(), None
    if ranks.local_rank == 0:
        try:
            copy_set(tokens, target, verify)
            TokenSet.open(target)
        except (OSError, UserError) as error:
            problem = f"{host}: {error}"
    answers = ranks.gather((host, problem))
    if ranks.is_first:
        for _, said in answers:
            if said:
                print(f"data are read from {tokens.folder}, not staged, on {said}", file=sys.stderr, flush=True)
    return tokens if any(said for of, said in answers if of == host) else TokenSet.open(target)


def copy_set(tokens: TokenSet, target: Path, verify: Literal["size", "full"] = "size") -> None:
    """Copy and verify a set, the manifest last; shards that are there already stay where they pass for whole.

    Raises OSError where it can't be written and UserError where a copy's SHA-256 is not the manifest's.
    """
    target.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    shards = [shard for split in tokens.manifest.splits.values() for shard in split]
    sizes = {shard.file: (tokens.folder / shard.file).stat().st_size for shard in shards}
    missing = [shard for shard in shards if not _is_there(target / shard.file, sizes[shard.file], shard, verify)]
    if not missing and (target / MANIFEST_FILE).exists():
        return
    needed, free = sum(sizes[shard.file] for shard in missing), shutil.disk_usage(target).free
    if needed > free:
        raise OSError(f"{target} has {format_bytes(free)} free, the data need {format_bytes(needed)}")
    with progress_bar(needed, "B", f"staging to {target}", scale=True) as bar:
        for shard in missing:
            bar.update(_copy_shard(tokens.folder, target, shard))
    temporary = _temporary(target, MANIFEST_FILE)
    shutil.copyfile(tokens.folder / MANIFEST_FILE, temporary)
    os.replace(temporary, target / MANIFEST_FILE)


def _is_there(path: Path, size: int, shard: Shard, verify: Literal["size", "full"]) -> bool:
    if not path.exists() or path.stat().st_size != size:
        return False
    return verify == "size" or sha256_file(path) == shard.sha256


def _temporary(target: Path, file: str) -> Path:
    """A name of this copy's own: another run on the node may be staging the same set."""
    return target / f".{file}.{uuid.uuid4().hex[:8]}{TEMPORARY_SUFFIX}"


def _sweep(target: Path) -> None:
    """Delete what copies that were killed have left: nobody has written to it for a while."""
    for path in target.glob(f".*{TEMPORARY_SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):  # published in this moment
            if time.time() - path.stat().st_mtime > LEFT_SECONDS:
                path.unlink()


def _copy_shard(source: Path, target: Path, shard: Shard) -> int:
    """Copy one shard under a temporary name, hashing on the way; return its bytes."""
    temporary = _temporary(target, shard.file)
    digest, copied = hashlib.sha256(), 0
    try:
        with open(source / shard.file, "rb") as read, open(temporary, "wb") as written:
            while block := read.read(BLOCK_BYTES):
                digest.update(block)
                written.write(block)
                copied += len(block)
        if digest.hexdigest() != shard.sha256:
            raise UserError(f"{source / shard.file} is not what was prepared (its SHA-256 differs)")
        fsync_file(temporary)
        os.replace(temporary, target / shard.file)
    finally:
        temporary.unlink(missing_ok=True)
    return copied
