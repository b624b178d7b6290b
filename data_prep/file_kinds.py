"""Which files are read, by their names, and how they are opened: parquet, JSON lines and text, compressed or not."""

import bz2
import codecs
import errno
import gzip
import hashlib
import io
import lzma
import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa

from common.errors import UserError
from common.os_errors import refusal
from common.publish import sha256_file

STREAM_BYTES = 1 << 20


class Kind(NamedTuple):
    """What a name says of a file: what it holds, and by what it is compressed ("" for nothing)."""

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
    """What a name says of a file. Raises UserError for a file that can't be read."""
    if (suffix := suffix_of(name)) is None:
        raise UserError(f"{name}: only these can be read: {READABLE}")
    return KINDS[suffix]


def open_bytes(path: Path | str, kind: Kind) -> Any:
    """A binary file with the decompressed bytes, for reading lines or blocks."""
    if kind.compression == "gzip":
        return gzip.open(path, "rb")
    if kind.compression == "bz2":
        return bz2.open(path, "rb")
    if kind.compression == "xz":
        return lzma.open(path, "rb")
    if kind.compression == "zstd":
        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"), STREAM_BYTES)
    return open(path, "rb")


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
    except (OSError, EOFError, lzma.LZMAError, ValueError):  # reading it for its documents will say so
        return True
    return True


def fingerprint(path: Path) -> dict[str, str]:
    """A hash that changes with the file: of all its bytes, or of a parquet file's footer, which lists every chunk."""
    if kind_of(path.name).content != "parquet":
        return {"sha256": sha256_file(path)}
    try:
        with open(path, "rb") as file:
            file.seek(-8, os.SEEK_END)
            length = int.from_bytes(file.read(4), "little")
            if file.read(4) != b"PAR1":  # a download that broke off: to be known now, not when its turn comes
                raise UserError(f"{path} is no whole parquet file: fetch it again, or take it away")
            file.seek(-8 - length, os.SEEK_END)
            return {"footer_sha256": hashlib.sha256(file.read(length)).hexdigest()}
    except OSError as error:
        if error.errno == errno.EINVAL:  # too short for what is looked for at its end
            raise UserError(f"{path} is no whole parquet file: fetch it again, or take it away") from None
        raise UserError(refusal("read", error, path)) from None
