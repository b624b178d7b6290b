"""A file of lines that is still being appended to, read on from where the last look ended: every byte once."""

import os
from collections.abc import Iterator
from pathlib import Path

BLOCK_BYTES = 1 << 20
LINE_BYTES = 16 << 20  # a longer line is none of ours: it is passed over, and not kept in memory


class GrowingFile:
    """Whole lines of one file. The beginning of a line that has no end yet is kept (`LINE_BYTES` at most)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._position = 0  # of the first byte that has not been read
        self._begun = bytearray()  # a line without its end
        self._too_long = False  # the line being read is passed over

    def was_replaced(self) -> bool:
        """Whether the file is shorter than what was read of it: another one has taken its place."""
        return self._size() < self._position

    def blocks(self) -> Iterator[bytes]:
        """Whole lines that have been appended since, about a mebibyte at a time; nothing where there is no file."""
        if self._size() <= self._position:
            return
        with open(self.path, "rb") as file:
            file.seek(self._position)
            while block := file.read(BLOCK_BYTES):
                self._position += len(block)
                if lines := self._whole_lines(block):
                    yield lines

    def _whole_lines(self, block: bytes) -> bytes:
        """The lines that end in a block, the begun one before them; what follows them is begun."""
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

    def _size(self) -> int:
        try:
            return os.stat(self.path).st_size
        except FileNotFoundError:
            return 0
