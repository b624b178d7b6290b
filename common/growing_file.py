"""A file of lines that is still being appended to, read from where the last read ended: every byte once."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from common.regular_file import open_regular

BLOCK_BYTES = 1 << 20
LINE_BYTES = 16 << 20  # a longer line is not ours: it is skipped, and not kept in memory
MOST_BYTES = 16 << 30  # of a file; fifty million steps have less, and all of it has to be read


class GrowingFile:
    """Whole lines of one file. The start of a line that has no end yet is kept (`LINE_BYTES` at most)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._position = 0  # of the first byte that has not been read
        self._begun = bytearray()  # a line without its end
        self._too_long = False  # the line being read is skipped

    def was_replaced(self) -> bool:
        """Whether the file is shorter than what was read of it: another one has taken its place."""
        size = self._size()
        return size is not None and size < self._position

    def blocks(self) -> Iterator[bytes]:
        """Whole lines that have been appended since, about a mebibyte at a time; nothing where there is no file.

        Raises OSError for what can't be read, is not a file, or is larger than any run's.
        """
        size = self._size()
        if size is not None and size <= self._position:
            return
        with open_regular(self.path, most_bytes=MOST_BYTES) as file:
            file.seek(self._position)
            while block := file.read(BLOCK_BYTES):
                self._position += len(block)
                if lines := self._whole_lines(block):
                    yield lines

    def _whole_lines(self, block: bytes) -> bytes:
        """The lines that end in a block, the kept start of the first included; what follows the last is kept."""
        first, last = block.find(b"\n") + 1, block.rfind(b"\n") + 1
        if first == 0:
            self._begin(block)
            return b""
        lines = block[first:last] if self._too_long else bytes(self._begun) + block[:last]
        self._too_long = False
        self._begun.clear()
        self._begin(block[last:])
        return lines

    def _begin(self, part: bytes) -> None:
        """Keep a part of a line without its end, unless it has grown too long."""
        if self._too_long or len(self._begun) + len(part) > LINE_BYTES:
            self._too_long = True
            self._begun.clear()
        else:
            self._begun += part

    def _size(self) -> int | None:
        """The file's size in bytes: 0 where there is none, None for what is not a file and so has no size."""
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            return 0
        return found.st_size if stat.S_ISREG(found.st_mode) else None
