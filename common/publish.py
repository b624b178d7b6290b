"""Publishing files whole: nothing stands under its final name before all of its bytes are on the disk.

Written aside, synced, renamed: a reader or a restart after a crash at any instant finds the old file or the new one.
"""

import hashlib
import json
import math
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.errors import UserError

TEMPORARY_SUFFIX = ".tmp"


def canonical_json(value: Any) -> str:
    """The one text of a JSON value (sorted keys, no spaces), for hashing and comparing."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def finite_or_null(value: Any) -> Any:
    """A JSON value with null in the place of NaN and infinities, which JSON does not know."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite_or_null(item) for key, item in value.items()}
    return [finite_or_null(item) for item in value] if isinstance(value, list | tuple) else value


def sha256_file(path: Path | str, block_bytes: int = 1 << 20) -> str:
    """SHA-256 of a file's bytes in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(block_bytes):
            digest.update(block)
    return digest.hexdigest()


def fsync_file(path: Path | str) -> None:
    """Wait until a file's bytes are on the disk."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(path: Path | str) -> None:
    """Wait until a folder's entries (new names, renames) are on the disk. Windows can't and needn't."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(
    path: Path | str, data: bytes | str, wanted: Callable[[], bool] = lambda: True, *, mode: int = 0o666
) -> bool:
    """Replace a file by `data` in one step; two writers at once leave one of the two, never a mixture.

    Args:
        wanted: asked when `data` is on the disk, which may take seconds, right before it would replace the file.
        mode: who may read and write the file, as far as the umask leaves it.

    Returns whether it did.
    """
    path = Path(path)
    # no process id: two containers or machines may share a folder and have the same
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{TEMPORARY_SUFFIX}")
    try:
        with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        if not wanted():
            temporary.unlink()
            return False
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)
    return True


def write_json_whole(
    path: Path | str, value: Any, wanted: Callable[[], bool] = lambda: True, *, mode: int = 0o666
) -> bool:
    """Replace a file by a JSON value, indented for people; see `finite_or_null` and `write_whole`."""
    return write_whole(path, json.dumps(finite_or_null(value), indent=2, allow_nan=False) + "\n", wanted, mode=mode)


def file_to_write(name: str | Path) -> Path:
    """A file that a command is to write when its work is done, its folder made now: the type of such an option.

    Raises UserError where it can't be written, before the work rather than after it.
    """
    path = Path(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} can't be written ({error.strerror}): name another file") from None
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        why = "it is a folder" if path.is_dir() else f"no permission to write into {path.parent}"
        raise UserError(f"{path} can't be written ({why}): name another file")
    return path


def publish_folder(temporary: Path, final: Path) -> None:
    """Give a finished folder (its files already synced) its final name.

    Raises FileExistsError where `final` is already there with something in it: a published folder is never replaced.
    """
    fsync_folder(temporary)
    if final.exists() and any(final.iterdir()):
        raise FileExistsError(f"{final} is already there")
    os.replace(temporary, final)
    fsync_folder(final.parent)
