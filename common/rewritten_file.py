"""A small JSON record that is rewritten in place every few seconds: a heartbeat, a lock's renewal.

Nothing is renamed and nothing synced, so it costs next to nothing even on a shared file system, and a writer whose file
was moved away keeps writing to the file it opened, never to its successor.
"""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.json_file import BadJson, read_json

RECORD_BYTES = 1024  # every record has this length: a shorter one leaves nothing of a longer one
MOST_BYTES = 1 << 16  # of a file that may still be one of ours


class RewrittenFile:
    """The writing side; one writer."""

    def __init__(self, path: Path, *, must_be_new: bool = False) -> None:
        """Open `path`. Raises FileExistsError where it must be new and is not, OSError where it can't be written."""
        flags = os.O_WRONLY | os.O_CREAT | getattr(os, "O_BINARY", 0) | (os.O_EXCL if must_be_new else 0)
        self._descriptor = os.open(path, flags, 0o666)

    def write(self, record: dict[str, Any]) -> None:
        """Replace the record. Raises OSError, and UserError for one that is longer than a record can be."""
        data = json.dumps(record).encode()
        if len(data) >= RECORD_BYTES:
            longest = max(record, key=lambda name: len(str(record[name])))
            raise UserError(
                f"the {longest} of this process has {len(str(record[longest])):,} characters, too long for "
                f"a record of {RECORD_BYTES:,} bytes: is it what the system or Slurm gave?"
            )
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        os.write(self._descriptor, data.ljust(RECORD_BYTES - 1) + b"\n")

    def sync(self) -> None:
        """Hand it to the server of a shared file system."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close it. An error of the file system at this point is of no use to anybody."""
        with contextlib.suppress(OSError):
            os.close(self._descriptor)


def read_record(path: Path) -> dict[str, Any] | None:
    """The record, or None for one that is missing, torn, or not a record at all."""
    try:
        return read_json(path, dict[str, Any], most_bytes=MOST_BYTES)
    except (OSError, BadJson):
        return None
