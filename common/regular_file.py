"""Opening only what is a file: a pipe would be waited for without end, /dev/zero read without end."""

import os
import stat
from pathlib import Path
from typing import BinaryIO

KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}


class NotAFile(OSError):
    """What stands under a file's name is something else; `strerror` says what."""


def open_regular(path: Path | str) -> BinaryIO:
    """A file opened for reading, or what a link to it points to; never waits for another process.

    Raises NotAFile for a folder, pipe, device or socket, and OSError as `open` does.
    """
    # O_NONBLOCK: opening a pipe would wait for its writer; for regular files it means nothing
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if os.path.isdir(path):  # Windows can't open a folder at all
            raise NotAFile(error.errno, "it is a folder, not a file", str(path)) from None
        raise
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise NotAFile(None, f"it is {KINDS.get(stat.S_IFMT(mode), 'no regular file')}, not a file", str(path))
    return open(descriptor, "rb")


def read_at_most(path: Path | str, most_bytes: int) -> bytes:
    """The bytes of a regular file that has no more than `most_bytes`.

    Raises NotAFile, OSError, and OverflowError (with words) for a larger file, of which nothing is kept.
    """
    with open_regular(path) as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise OverflowError(f"it has more than {most_bytes:,} bytes")
    return content
