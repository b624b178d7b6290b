"""Publishing files whole: nothing has its final name before all of its bytes are on the disk.

Written aside, synced, renamed: a reader or a restart after a crash at any instant finds the old file or the new one.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import stat
import sys
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.os_errors import refusal
from common.paths import MOST_NAME_BYTES, expand_path
from common.regular_file import open_regular

TEMPORARY_SUFFIX = ".tmp"
LEFT_SECONDS = 3600.0  # temporary files older than this are stale
_TEMPORARY = re.compile(rf"(.+)\.[0-9a-f]{{8}}{re.escape(TEMPORARY_SUFFIX)}")
_OPEN_HERE = re.compile(r"(?:/dev/fd|/proc/self/fd)/(\d+)|/dev/(stdin|stdout|stderr)")


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
    """SHA-256 of a file's bytes in hexadecimal. Raises OSError, NotAFile for what might never end."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(block_bytes):
            digest.update(block)
    return digest.hexdigest()


def fsync_file(path: Path | str) -> None:
    """Wait until a file's bytes are on the disk."""
    _fsync(os.open(path, os.O_RDWR))


def fsync_folder(path: Path | str) -> None:
    """Wait until a folder's entries (new names, renames) are on the disk. Windows can't and needn't."""
    if os.name == "nt":
        return
    _fsync(os.open(path, os.O_RDONLY))


def _fsync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    finally:
        with contextlib.suppress(OSError):  # fsync has reported what is wrong with the bytes
            os.close(descriptor)


def write_whole(
    path: Path | str, data: bytes | str, wanted: Callable[[], bool] = lambda: True, *, mode: int = 0o666
) -> bool:
    """Replace a file by `data` in one step; two writers at once leave one of the two, never a mixture.

    A link is followed. A device or pipe (`/dev/stdout`) is written to: it can't be replaced.

    Args:
        wanted: asked when `data` is on the disk, which may take seconds, right before it would replace the file.
        mode: who may read and write the file, as far as the umask leaves it.

    Returns whether it did.
    """
    # undecodable bytes of a name: escaped in a page for people; our JSON and YAML are ASCII
    content = data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data
    if is_written_through(path):
        if wanted():
            _write_through(path, content)
            return True
        return False
    path = _followed(path)
    # no process id: two containers or machines may share a folder and have the same
    name = path.name
    while len(os.fsencode(name)) > MOST_NAME_BYTES - len(f".12345678{TEMPORARY_SUFFIX}"):
        name = name[:-1]
    temporary = path.with_name(f"{name}.{uuid.uuid4().hex[:8]}{TEMPORARY_SUFFIX}")
    try:
        with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if not wanted():
            temporary.unlink()
            return False
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the file system is gone: the reason comes from the error above
            temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)
    return True


def sweep_temporaries(folder: Path, names: Iterable[str], *, older_than_seconds: float = 0.0) -> None:
    """Delete the temporary files of these files in a folder that a killed `write_whole` left behind.

    Args:
        older_than_seconds: a younger one may have a live writer; 0 for a caller that knows there is none.
    """
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            name = _TEMPORARY.fullmatch(path.name)
            with contextlib.suppress(OSError):
                if name and name[1] in names and path.stat().st_mtime <= time.time() - older_than_seconds:
                    path.unlink()


def write_json_whole(
    path: Path | str, value: Any, wanted: Callable[[], bool] = lambda: True, *, mode: int = 0o666
) -> bool:
    """Replace a file by a JSON value, indented for people; see `finite_or_null` and `write_whole`."""
    return write_whole(path, _json_text(value), wanted, mode=mode)


def _json_text(value: Any) -> str:
    return json.dumps(finite_or_null(value), indent=2, allow_nan=False) + "\n"


def write_output(path: Path, data: bytes | str) -> None:
    """`write_whole` for a file that the command line named, and the folders above it.

    Raises UserError where the file system refuses it.
    """
    try:
        if not is_written_through(path):
            _followed(path).parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, data)
    except OSError as error:
        raise UserError(refusal("written", error, path, otherwise="name another file")) from None


def write_json_output(path: Path, value: Any) -> None:
    """`write_json_whole` for a file that the command line named. Raises UserError as `write_output`."""
    write_output(path, _json_text(value))


def is_written_through(path: Path | str) -> bool:
    """Whether a path leads to what only takes bytes: a device, a pipe, or what this process has open (`/dev/fd/63`)."""
    try:
        return _OPEN_HERE.fullmatch(os.path.abspath(path)) is not None or not stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False


def _followed(path: Path | str) -> Path:
    """Where links lead to, whether anything is there or not. Raises OSError for links that form a loop."""
    end = Path(os.path.realpath(path))
    if end.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return end


def _write_through(path: Path | str, content: bytes) -> None:
    """Write into what can't be replaced. Raises OSError where it takes no bytes."""
    sys.stdout.flush()
    sys.stderr.flush()
    here = _OPEN_HERE.fullmatch(os.path.abspath(path))
    if here is None:
        descriptor = os.open(path, os.O_WRONLY)
    else:  # what has been written to it stays before this, what follows comes behind
        descriptor = os.dup(int(here[1]) if here[1] else ("stdin", "stdout", "stderr").index(here[2]))
    with open(descriptor, "wb") as file:
        file.write(content)


def file_to_write(name: str | Path) -> Path:
    """A file that a command is to write when its work is done, with `write_output`: the type of such an option.

    Makes nothing: another option may be wrong.

    Raises UserError where it can't be written, before the work rather than after it.
    """
    path, why = expand_path(name), ""
    if path.is_dir():
        why = "it is a folder"
    elif is_written_through(path):
        why = "" if os.access(path, os.W_OK) else "no permission to write to it"
    else:
        try:
            folder = next(above for above in _followed(path).parents if os.path.lexists(above))
            if not folder.is_dir():
                why = os.strerror(errno.ENOTDIR)
            elif not os.access(folder, os.W_OK):
                why = f"no permission to write into {folder}"
        except OSError as error:
            why = str(error.strerror)
    if why:
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
