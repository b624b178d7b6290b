"""Lines appended to a file on a disk that may fail for a while: what can't be written waits in memory, in order."""

import contextlib
import io
import os
import time
from collections import deque
from pathlib import Path
from typing import Any

from common.metrics_file import ends_with_newline, to_line
from common.regular_file import append_to_regular


class PatientFile:
    """The writing side of a file of JSON lines, for a process that must not end because of it.

    All lines since the last good `sync` are kept: after a failed one the system may have dropped what it had taken, and
    answers the next with success. So they are written again, in their place, once the file system is back.
    """

    def __init__(self, path: Path, *, most_bytes: int = 64 << 20, retry_seconds: float = 5.0) -> None:
        """Open the file and close a torn last line. Raises OSError.

        Args:
            most_bytes: of lines that are kept.
            retry_seconds: how long `append` doesn't try a file again that has failed.
        """
        self.path = path
        self.trouble: OSError | None = None  # why lines are waiting
        self._most_bytes = most_bytes
        self._retry_seconds = retry_seconds
        self._lines: deque[bytes] = deque()  # since the last good sync
        self._bytes = 0
        self._retry_at = 0.0
        self._file: io.FileIO | None = append_to_regular(path)
        if not ends_with_newline(path):
            self._file.write(b"\n")
        self._base = os.fstat(self._file.fileno()).st_size  # where the first of the lines belongs

    def append(self, record: dict[str, Any]) -> None:
        """Append one record, now or when the file takes it.

        Raises OSError where more waits than is kept: the record would have a gap.
        """
        line = to_line(record)
        self._lines.append(line)
        self._bytes += len(line)
        try:
            if self.trouble is None:
                assert self._file is not None
                _write_all(self._file, line)
            elif time.monotonic() >= self._retry_at:
                self._write_again()
        except OSError as error:
            self._remember(error)
        while self._bytes > self._most_bytes:
            if self.trouble is not None:
                raise OSError(self.trouble.errno, self.trouble.strerror, str(self.path))
            oldest = len(self._lines.popleft())  # taken long ago, and never refused since
            self._base, self._bytes = self._base + oldest, self._bytes - oldest

    def sync(self) -> None:
        """Wait until all lines are on the disk. Raises OSError (with the file's name) where they may not be."""
        try:
            if self.trouble is not None:
                self._write_again()
            assert self._file is not None
            os.fsync(self._file.fileno())
        except OSError as error:
            self._remember(error)
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        self._base += self._bytes
        self._lines.clear()
        self._bytes = 0

    def close(self) -> None:
        """Sync and close. Raises OSError where the last lines may not have reached the disk."""
        try:
            self.sync()
        finally:
            self._drop_descriptor()

    def _remember(self, error: OSError) -> None:
        self.trouble = error
        self._retry_at = time.monotonic() + self._retry_seconds

    def _write_again(self) -> None:
        """All lines since the last good sync, over whatever is left of them. Raises OSError."""
        self._drop_descriptor()  # which may be stale for good
        data = b"".join(self._lines)
        with open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            start = self._base
            if not start <= size <= start + len(data):  # another process has written: nothing of it is touched
                start = size
                if not ends_with_newline(self.path):
                    start += file.write(b"\n")
            file.seek(start)
            _write_all(file, data)
        self._file = append_to_regular(self.path)
        self._base = start
        self.trouble = None

    def _drop_descriptor(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            with contextlib.suppress(OSError):  # all lines since the last good sync are kept
                file.close()


def _write_all(file: io.FileIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
