"""Copying a token set to a disk of each node's own, so that a shared file system is read once and not every step.

Such disks are shared with other users and get cleaned away, so a copy is trusted for what was hashed, not for its name:
`staged.json` in it lists the files as they were when their SHA-256 was the manifest's, in this boot of the machine.
"""

import contextlib
import hashlib
import os
import shutil
import socket
import stat
import tempfile
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from typing_extensions import TypedDict

from common.errors import UserError
from common.host_limits import allowed_cores
from common.json_file import BadJson, read_json
from common.os_errors import refusal
from common.paths import expand_path
from common.processes import boot_id
from common.progress import format_bytes, progress_bar
from common.publish import TEMPORARY_SUFFIX, fsync_file, sha256_file, write_json_whole
from common.regular_file import open_regular
from data_prep.token_sets.manifest import MANIFEST_FILE, Shard
from data_prep.token_sets.token_mix import TokenMix
from data_prep.token_sets.token_set import TokenSet
from model.ranks import Ranks

BLOCK_BYTES = 8 << 20
LEFT_SECONDS = 3600.0  # temporary files older than this are stale
STAGED_FILE = "staged.json"

Stamp = list[int]  # device, inode, size, mtime_ns, ctime_ns: changes whenever a file changes


class Staged(TypedDict):
    """`staged.json`."""

    boot: str | None
    files: dict[str, Stamp]


def stage(
    tokens: TokenSet, folder: str | Path, ranks: Ranks, verify: Literal["size", "full"] = "size"
) -> tuple[TokenSet, dict[str, str]]:
    """The same token set on this node's disk, copied there by one rank of every node. (All ranks call.)

    A copy that is there already is used where it is this user's and its SHA-256 were right, in this boot or (with
    `verify` full, always) now. Where a node's disk can't take the copy (no space, not writable), that node's ranks
    read the set where it is: then the second value has the reason by host.

    Args:
        folder: as the configuration has it. Each node replaces variables by its own values.

    Raises UserError on all ranks where the set itself is not what was prepared, or can't be read, or a variable is not
    set on a node.
    """
    host, target, problem, mistake = socket.gethostname(), None, None, None
    if ranks.local_rank == 0:
        try:
            target = own_folder(expand_path(folder), f"longhaul-{tokens.identity[:16]}")
            copy_set(tokens, target, verify)
        except OSError as error:
            problem = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        except UserError as error:
            mistake = error
    answers = ranks.gather((host, target, problem, mistake))
    for *_, said in answers:
        if said is not None:
            raise said
    opened: TokenSet | None = None
    if all(why is None for of, _, why, _ in answers if of == host):
        try:
            opened = TokenSet.open(next(copy for of, copy, _, _ in answers if of == host and copy is not None))
        except (UserError, StopIteration) as error:  # containers of a node may each have a disk of their own
            problem = str(error) or "no rank of this host has copied"
    in_place = {of: why for of, why in ranks.gather((host, problem)) if why is not None}
    return tokens if opened is None or host in in_place else opened, in_place


def stage_all(
    tokens: TokenSet, folder: str | Path, ranks: Ranks, verify: Literal["size", "full"] = "size"
) -> tuple[TokenSet, dict[str, str]]:
    """`stage`, of a mix each of its sets. (All ranks call.)"""
    if not isinstance(tokens, TokenMix):
        return stage(tokens, folder, ranks, verify)
    sets, in_place = {}, dict[str, str]()
    for source in tokens.sources:
        sets[source.name], why = stage(source.tokens, folder, ranks, verify)
        in_place |= why
    return tokens.with_sets(sets), in_place


def own_folder(folder: Path, name: str) -> Path:
    """A folder of this user's below `folder`, made where it is missing: `name`, or one with the user's id behind it.

    Links are not followed: they may lead to what others can change.

    Raises OSError where neither is possible.
    """
    user = os.geteuid() if hasattr(os, "geteuid") else 0
    for target in (folder / name, folder / f"{name}-{user}"):
        with contextlib.suppress(FileExistsError):
            target.mkdir(parents=True)
        found = target.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == _owner_of_new_files(target):
            return target
    raise OSError(f"{folder / name} and {name}-{user} beside it are links, or another user's")


def _owner_of_new_files(folder: Path) -> int | None:
    """As whom a folder's file system knows this user; None where nothing can be made in it."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_uid
    except PermissionError:
        return None


def copy_set(tokens: TokenSet, target: Path, verify: Literal["size", "full"] = "size") -> None:
    """Copy and verify a set into a folder of this user's, the manifest last; shards that are whole stay.

    Raises OSError where it can't be written and UserError where the set can't be read, or a shard's SHA-256 is not the
    manifest's.
    """
    _sweep(target)
    shards = [shard for split in tokens.manifest.splits.values() for shard in split]
    hashed = {} if verify == "full" else _read_hashed(target)
    stamps = _good_copies(tokens, target, shards, hashed)
    missing = [shard for shard in shards if shard.file not in stamps]
    needed = sum(shard.tokens * tokens.manifest.numpy_dtype.itemsize for shard in missing)
    if needed > (free := shutil.disk_usage(target).free):
        raise OSError(f"{target} has {format_bytes(free)} free, but the data need {format_bytes(needed)}")
    if missing:
        with progress_bar(needed, "B", f"staging to {target}", scale=True) as bar:
            for shard in missing:
                stamps[shard.file] = _copy_shard(tokens.folder, target, shard)
                bar.update(stamps[shard.file][2])
    _copy_manifest(tokens.folder, target)
    if stamps != hashed:
        with contextlib.suppress(OSError):  # then the next start hashes once more
            write_json_whole(target / STAGED_FILE, {"boot": boot_id(), "files": stamps})


def _good_copies(tokens: TokenSet, target: Path, shards: list[Shard], hashed: dict[str, Stamp]) -> dict[str, Stamp]:
    """The copies that are whole, with their stamps: those known as `hashed`, and those whose SHA-256 is right now."""
    stamps: dict[str, Stamp] = {}
    unknown: list[tuple[Shard, Stamp]] = []
    for shard in shards:
        stamp = _own_file(target / shard.file)
        if stamp is None or stamp[2] != shard.tokens * tokens.manifest.numpy_dtype.itemsize:
            continue
        if hashed.get(shard.file) == stamp:
            stamps[shard.file] = stamp
        else:
            unknown.append((shard, stamp))
    if unknown:
        with (
            ThreadPoolExecutor(min(4, allowed_cores())) as pool,
            progress_bar(len(unknown), "shard", f"verifying {target}") as bar,
        ):
            found = pool.map(lambda item: sha256_file(target / item[0].file), unknown)
            for (shard, stamp), sha256 in zip(unknown, found, strict=True):
                if sha256 == shard.sha256:
                    stamps[shard.file] = stamp
                bar.update()
    return stamps


def _read_hashed(target: Path) -> dict[str, Stamp]:
    """What this user's `staged.json` lists, if it is of this boot; else nothing."""
    path = target / STAGED_FILE
    try:
        staged = read_json(path, Staged) if _own_file(path) else None
    except (OSError, BadJson):
        return {}
    if staged is None or staged["boot"] is None or staged["boot"] != boot_id():
        return {}
    return staged["files"]


def _own_file(path: Path) -> Stamp | None:
    """The stamp of a regular file whose owner is its folder's; None for any other, a link, or none at all."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(found.st_mode) or found.st_uid != path.parent.stat().st_uid:
        return None
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _temporary(target: Path, file: str) -> Path:
    """A name unique to this copy: another run on the node may be staging the same set."""
    return target / f".{file}.{uuid.uuid4().hex[:8]}{TEMPORARY_SUFFIX}"


def _sweep(target: Path) -> None:
    """Delete what killed copies have left, once nobody has written to it for a while."""
    for path in target.glob(f"*{TEMPORARY_SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):  # just published
            if time.time() - path.lstat().st_mtime > LEFT_SECONDS:
                path.unlink()


def _copy_shard(source: Path, target: Path, shard: Shard) -> Stamp:
    """Copy one shard under a temporary name, hashing on the way; return the copy's stamp."""
    temporary = _temporary(target, shard.file)
    digest = hashlib.sha256()
    try:
        with open(temporary, "wb") as written:
            for block in _blocks(source / shard.file):
                digest.update(block)
                written.write(block)
        if digest.hexdigest() != shard.sha256:
            raise UserError(
                f"{source / shard.file} is not what was prepared (its SHA-256 differs): copy it again, or prepare the "
                "set again with --force"
            )
        fsync_file(temporary)
        inode = temporary.stat().st_ino
        os.replace(temporary, target / shard.file)
    finally:
        temporary.unlink(missing_ok=True)
    found = (target / shard.file).stat()  # after the renaming, which changes its ctime
    ctime = found.st_ctime_ns if found.st_ino == inode else 0  # another run's copy since: for the next start to hash
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, ctime]


def _copy_manifest(source: Path, target: Path) -> None:
    content = b"".join(_blocks(source / MANIFEST_FILE))
    path = target / MANIFEST_FILE
    stamp = _own_file(path)
    if stamp is not None and stamp[2] == len(content) and path.read_bytes() == content:
        return
    temporary = _temporary(target, MANIFEST_FILE)
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _blocks(path: Path) -> Iterator[bytes]:
    """A file of the set, block by block. Raises UserError where it can't be read: training could not read it either."""
    try:
        with open_regular(path) as file:
            while block := file.read(BLOCK_BYTES):
                yield block
    except OSError as error:
        advice = "copy it again, or prepare the set again"
        raise UserError(refusal("read", error, path, otherwise=advice)) from None
