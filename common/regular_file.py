"""Opening only regular files: a pipe would be waited for without end, /dev/zero read without end."""

import errno
import io
import os
import stat
from pathlib import Path
from typing import BinaryIO

KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}


class NotAFile(OSError):
    """What has a file's name is something else, or far larger; `strerror` names it."""


def open_regular(path: Path | str, *, most_bytes: int | None = None) -> BinaryIO:
    """A file opened for reading, or what a link to it points to; never waits for another process.

    Raises NotAFile for a folder, pipe, device or socket, or a file that has more than `most_bytes`, and OSError as
    `open` does.
    """
    # O_NONBLOCK: opening a pipe would wait for its writer; for regular files it has no effect
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if os.path.isdir(path):  # Windows can't open a folder at all
            raise NotAFile(error.errno, "it is a folder, not a file", str(path)) from None
        raise
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise NotAFile(None, f"it is {_kind_of(found.st_mode)}, not a file", str(path))
    if most_bytes is not None and found.st_size > most_bytes:
        os.close(descriptor)
        raise NotAFile(None, f"it has more than {most_bytes:,} bytes", str(path))
    return open(descriptor, "rb")


def size_of_file(path: Path | str) -> int:
    """The bytes of a regular file, or of what a link to it points to. Raises NotAFile, and OSError as `os.stat`."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise NotAFile(None, f"it is {_kind_of(found.st_mode)}, not a file", str(path))
    return found.st_size


def append_to_regular(path: Path | str) -> io.FileIO:
    """A file opened for appending, made where there is none; never waits for a reader.

    Raises NotAFile for a folder, pipe, device or socket, and OSError as `open` does.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    if os.path.exists(path) and not os.path.isfile(path):
        raise NotAFile(None, f"it is {what_stands_at(path)}, not a file", str(path))
    return open(os.open(path, flags, 0o666), "ab", buffering=0)


def what_stands_at(path: Path | str) -> str:
    """What a path leads to, in words; "" for nothing, or where it can't be known."""
    try:
        return _kind_of(os.stat(path).st_mode)
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "a link to itself"
        return "a link to nothing" if isinstance(error, FileNotFoundError) and os.path.islink(path) else ""


def _kind_of(mode: int) -> str:
    return KINDS.get(stat.S_IFMT(mode), "not a regular file")


def read_at_most(path: Path | str, most_bytes: int) -> bytes:
    """The bytes of a regular file that has no more than `most_bytes`.

    Raises NotAFile, OSError, and OverflowError (with a message) for a larger file, of which nothing is kept.
    """
    with open_regular(path) as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise OverflowError(f"it has more than {most_bytes:,} bytes")
    return content
