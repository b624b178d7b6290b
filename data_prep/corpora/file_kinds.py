"""Which files are read, by their names, and how they are opened: parquet, JSON lines and text, compressed or not."""

import bz2
import codecs
import errno
import gzip
import hashlib
import io
import lzma
import os
import zlib
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa

from common.errors import UserError
from common.os_errors import refusal
from common.progress import format_bytes
from common.publish import sha256_file
from common.regular_file import open_regular, size_of_file

STREAM_BYTES = 1 << 20
# what damaged data raise: bad JSON or UTF-8, a truncated compressed stream or parquet page
DAMAGE = (ValueError, OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)
ZSTD_WINDOW_BYTES = 1 << 27  # pyarrow's decompressor takes no more, as `zstd -d` without --long
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_ZSTD_SKIPPABLE = b"\x2a\x4d\x18"  # after a byte of 0x50 to 0x5F
_ZSTD_HEADER_BYTES = 18


class Kind(NamedTuple):
    """What a file's name shows: what it holds, and how it is compressed ("" for not at all)."""

    content: Literal["parquet", "lines", "text"]
    compression: Literal["", "gzip", "zstd", "bz2", "xz"] = ""


_COMPRESSIONS: dict[str, Literal["", "gzip", "zstd", "bz2", "xz"]] = {
    "": "", ".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bz2", ".xz": "xz",
}  # fmt: skip
KINDS: dict[str, Kind] = {".parquet": Kind("parquet")}  # by suffix
for _end, _compression in _COMPRESSIONS.items():
    KINDS |= {base + _end: Kind("lines", _compression) for base in (".jsonl", ".ndjson", ".json")}
    KINDS |= {base + _end: Kind("text", _compression) for base in (".txt", ".md")}
READABLE = ".parquet, .jsonl, .ndjson, .json (lines), .txt, .md; all but the first also with .gz, .zst, .bz2 or .xz"


def suffix_of(name: str) -> str | None:
    """The longest suffix of KINDS that a name has, if any."""
    lower = name.lower()
    return max((suffix for suffix in KINDS if lower.endswith(suffix)), key=len, default=None)


def kind_of(name: str) -> Kind:
    """What a file's name shows. Raises UserError for a kind of file that can't be read."""
    if (suffix := suffix_of(name)) is None:
        raise UserError(f"{name}: only these can be read: {READABLE}")
    return KINDS[suffix]


def open_bytes(path: Path | str, kind: Kind) -> Any:
    """A binary file with the decompressed bytes, for reading lines or blocks. Raises OSError, NotAFile for a pipe."""
    size_of_file(path)
    if kind.compression == "gzip":
        return gzip.open(path, "rb")
    if kind.compression == "bz2":
        return bz2.open(path, "rb")
    if kind.compression == "xz":
        return lzma.open(path, "rb")
    if kind.compression == "zstd":
        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"), STREAM_BYTES)
    return open_regular(path)


def is_utf8(path: Path) -> bool:
    """Whether a text file is UTF-8 from its first byte to its last (one that can't be decompressed passes)."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with open_bytes(path, kind_of(path.name)) as file:
            while block := file.read(STREAM_BYTES):
                decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    except DAMAGE:  # reading its documents will report it
        return True
    return True


def check_zstd_window(path: Path) -> None:
    """Raises UserError for a file whose frame header asks for a larger window than the decompressor takes.

    Otherwise the decompressor would fail when the file's turn comes.
    """
    with open_regular(path) as file:
        header = file.read(_ZSTD_HEADER_BYTES)
        while header[1:4] == _ZSTD_SKIPPABLE and 0x50 <= header[0] <= 0x5F:
            file.seek(int.from_bytes(header[4:8], "little") + 8 - len(header), os.SEEK_CUR)
            header = file.read(_ZSTD_HEADER_BYTES)
    window = zstd_window(header)
    if window is not None and window > ZSTD_WINDOW_BYTES:
        raise UserError(
            f"{path} was compressed with a window of {format_bytes(window)} (zstd --long), and "
            f"{format_bytes(ZSTD_WINDOW_BYTES)} is the most that can be read: compress it again, "
            f"'zstd -d --long={(window - 1).bit_length()} --stdout FILE | zstd -o NEW'"
        )


def zstd_window(header: bytes) -> int | None:
    """Bytes of what came before that a frame refers to, by its header (RFC 8878, 3.1.1.1); None for another file."""
    if header[:4] != _ZSTD_MAGIC or len(header) < 6:
        return None
    described = header[4]
    if not described & 0x20:
        exponent, mantissa = header[5] >> 3, header[5] & 7
        return (1 << (10 + exponent)) // 8 * (8 + mantissa)
    start = 5 + (0, 1, 2, 4)[described & 3]  # one segment: the window is the content, whose size follows
    size = (1, 2, 4, 8)[described >> 6]
    return int.from_bytes(header[start : start + size], "little") + (256 if size == 2 else 0)


def fingerprint(path: Path) -> dict[str, str]:
    """A hash that changes with the file: of all its bytes, or of a parquet file's footer, which lists every chunk."""
    kind = kind_of(path.name)
    if kind.compression == "zstd":
        check_zstd_window(path)
    if kind.content != "parquet":
        return {"sha256": sha256_file(path)}
    try:
        with open_regular(path) as file:
            file.seek(-8, os.SEEK_END)
            length = int.from_bytes(file.read(4), "little")
            if file.read(4) != b"PAR1":  # a truncated download: to be found now, not when its turn comes
                raise UserError(f"{path} is not a whole parquet file: fetch it again, or remove it")
            file.seek(-8 - length, os.SEEK_END)
            digest = hashlib.sha256()
            while block := file.read(min(length, STREAM_BYTES)):
                digest.update(block)
                length -= len(block)
            return {"footer_sha256": digest.hexdigest()}
    except OSError as error:
        if error.errno == errno.EINVAL:  # too short for what is looked for at its end
            raise UserError(f"{path} is not a whole parquet file: fetch it again, or remove it") from None
        raise UserError(refusal("read", error, path)) from None
