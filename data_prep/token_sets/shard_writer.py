"""The one writer of token shards: exact sizes, each published whole, the same bytes for the same tokens.

Tokens stream in; a shard is written beside its final name, synced, hashed and renamed. What a set holds is recorded
only by the manifest, which the caller writes last.
"""

import errno
import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol, Self

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from common.os_errors import refusal
from common.progress import format_bytes
from common.publish import TEMPORARY_SUFFIX, fsync_folder
from data_prep.token_sets.manifest import MANIFEST_FILE, SPLITS, Shard, fields_of, marks_of, shard_name
from data_prep.tokenization.tokenizer import Ids

SHARD_TOKENS = 100_000_000  # 200 MB of uint16
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NAMES = (*SPLITS, *map(marks_of, SPLITS), *map(fields_of, SPLITS))
_OWN_FILES = re.compile(rf"({'|'.join(_NAMES)})-\d{{5,}}\.bin({re.escape(TEMPORARY_SUFFIX)})?")


class Stored(Protocol):
    """What is stored, as a tokenizer has it: the ids' dtype, the bytes that each stands for, what starts a document."""

    dtype: np.dtype[Any]
    piece_bytes: npt.NDArray[np.int32]
    begin_of_text_id: int | None


class ShardWriter:
    """Writes one split's token stream as shards of exactly `shard_tokens` tokens, the last may be shorter.

    `finished` are shards that an earlier, interrupted writer published: writing continues after them. Use as a
    context manager: leaving with an exception publishes nothing more.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        tokenizer: Stored,
        shard_tokens: int = SHARD_TOKENS,
        *,
        finished: Sequence[Shard] = (),
    ) -> None:
        assert shard_tokens > 0, shard_tokens
        assert split in _NAMES, split
        self.shards = list(finished)
        self.split = split
        self._folder, self._tokenizer, self._shard_tokens = folder, tokenizer, shard_tokens
        self._file: BinaryIO | None = None
        self._start_shard()

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of what is stored."""
        return self._tokenizer.dtype

    def _start_shard(self) -> None:
        self._tokens = self._documents = self._bytes = 0
        self._digest = hashlib.sha256()

    @property
    def room(self) -> int:
        """Tokens that still fit the current shard, at least 1."""
        return self._shard_tokens - self._tokens

    @property
    def total_tokens(self) -> int:
        """Tokens of the split so far, finished shards included."""
        return sum(shard.tokens for shard in self.shards) + self._tokens

    @property
    def total_bytes(self) -> int:
        """Bytes of text that the split's tokens stand for so far."""
        return sum(shard.bytes for shard in self.shards) + self._bytes

    @property
    def path(self) -> Path:
        """The final name of the current shard."""
        return self._folder / shard_name(self.split, len(self.shards))

    def write(self, tokens: Ids) -> None:
        """Append ids (n,) of the tokenizer's dtype. Raises UserError where the disk is full."""
        assert tokens.dtype == self.dtype, (tokens.dtype, self.dtype)
        while len(tokens):
            part, tokens = tokens[: self.room], tokens[self.room :]
            self._append(part)
            if self.room == 0:
                self._publish()

    def _append(self, part: Ids) -> None:
        data = memoryview(np.ascontiguousarray(part).data).cast("B")
        try:
            if self._file is None:
                self._file = open(self.path.with_name(self.path.name + TEMPORARY_SUFFIX), "wb", buffering=0)  # noqa: SIM115
            _write_all(self._file, data)
        except OSError as error:
            raise write_error(error, self.path, self.room * self._tokenizer.dtype.itemsize) from error
        self._digest.update(data)
        self._tokens += len(part)
        self._documents += self._documents_in(part)
        lengths = np.take(self._tokenizer.piece_bytes, part, mode="clip")  # ids are in range: twice as fast unchecked
        self._bytes += int(lengths.sum(dtype=np.int64))

    def _documents_in(self, part: Ids) -> int:
        begin = self._tokenizer.begin_of_text_id
        if begin is None:  # then a split is one document
            return int(not self.shards and self._tokens == len(part))
        return int(np.count_nonzero(part == begin))

    def _publish(self) -> None:
        assert self._file is not None
        temporary = Path(self._file.name)
        try:
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(temporary, self.path)
            fsync_folder(self._folder)
        except OSError as error:
            raise write_error(error, self.path) from error
        self._file = None
        shard = Shard(self.path.name, self._tokens, self._documents, self._bytes, self._digest.hexdigest())
        self.shards.append(shard)
        self._start_shard()

    def close(self) -> tuple[Shard, ...]:
        """Publish the last, short shard (if there is one) and return all shards."""
        if self._tokens:
            self._publish()
        return tuple(self.shards)

    def abandon(self) -> None:
        """Delete the unfinished shard; published ones stay."""
        if self._file is not None:
            self._file.close()
            Path(self._file.name).unlink(missing_ok=True)
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()


def shard_files(folder: Path) -> list[Path]:
    """The shards in a folder, by their names, half-written ones included."""
    return sorted(path for path in folder.iterdir() if _OWN_FILES.fullmatch(path.name)) if folder.is_dir() else []


def clear_token_set(folder: Path) -> None:
    """Remove a token set's own files from its folder, the manifest first; nothing else is touched.

    Raises UserError, with all of them in their places, where a folder has the name of one.
    """
    own = [folder / MANIFEST_FILE, *shard_files(folder)]
    if in_the_way := next((path for path in own if path.is_dir() and not path.is_symlink()), None):
        raise UserError(f"{in_the_way} is a folder, but a file must be written there: move it away")
    for path in own:
        remove_file(path)


def remove_file(path: Path) -> None:
    """Remove a file, if it is there. Raises UserError where that is impossible, as for a folder."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(refusal("removed", error, path)) from None


def _write_all(file: BinaryIO, data: memoryview) -> None:
    while len(data):
        data = data[file.write(data) or 0 :]  # an unbuffered write may take a part


def write_error(error: OSError, path: Path, missing_bytes: int | None = None) -> UserError:
    """The message for `path` that can't be written."""
    if error.errno not in _DISK_FULL:
        return UserError(refusal("written", error, path, otherwise="run the same command again"))
    missing = "" if missing_bytes is None else f" needs {format_bytes(missing_bytes)} more"
    return UserError(
        f"the disk is full: {path}{missing} ({error.strerror}); free some space and run the same command again"
    )
