"""Reading a token set: each split as one long stream of tokens, memory-mapped, whatever files it is in."""

import bisect
import errno
import itertools
import mmap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from common.errors import UserError
from common.host_limits import allowed_cores
from common.os_errors import refusal
from common.paths import find_path
from common.progress import progress_bar
from common.publish import sha256_file
from common.regular_file import open_regular, size_of_file
from data_prep.token_sets.manifest import AGAIN, MARK_COUNT, Manifest, Shard, fields_of, marks_of, validation_sha256
from data_prep.tokenization.tokenizer import Ids

BYTES = 256  # values of a byte
HUGE_PAGE_BYTES = 2 << 20  # a read of a few bytes can make this much resident: kernels map a cached folio as a whole


class TokenStream:
    """One split as a stream: `len(stream)` tokens, `read(start, stop)` across file borders.

    Every file is opened once, here. Pages are handed back after every read, so that resident memory does not grow while
    the operating system's cache keeps what it can.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], dtype: np.dtype[Any], vocab_size: int) -> None:
        self.dtype = dtype
        self._vocab_size = vocab_size
        self.documents = sum(shard.documents for shard in shards)
        self.bytes = sum(shard.bytes for shard in shards)
        self._paths = [folder / shard.file for shard in shards]
        self._sizes = [shard.tokens * dtype.itemsize for shard in shards]
        self._ends = list(itertools.accumulate(shard.tokens for shard in shards))  # first token after each shard
        _allow_open_files(len(shards))
        self._maps = [_map_file(path) for path in self._paths]

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, start: int, stop: int) -> Ids:
        """Tokens start … stop - 1 as a new array (stop - start,) of the stored dtype.

        Raises IndexError outside the stream and UserError where a file has changed its size since it was opened, or
        holds an id outside the vocabulary.
        """
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start} … {stop} of {len(self)}")
        out = np.empty(stop - start, dtype=self.dtype)
        position, index = start, bisect.bisect_right(self._ends, start)
        while position < stop:
            shard_start = self._ends[index] - self._sizes[index] // self.dtype.itemsize
            end = min(stop, self._ends[index])
            part = slice(position - shard_start, end - shard_start)
            taken = out[position - start : end - start]
            taken[:] = self._tokens(index)[part]
            self._hand_back_pages(index, part)
            if (largest := int(taken.max())) >= self._vocab_size:  # a model would fail on it without saying where
                what = f"token id {largest:,}, outside the vocabulary of {self._vocab_size:,}"
                what = f"mark {largest:,}, which none is" if self._vocab_size == MARK_COUNT else what
                raise UserError(
                    f"{self._paths[index]} holds the {what}, so it is damaged: run data_prep/verify.py on its folder"
                )
            position, index = end, index + 1
        return out

    def _tokens(self, index: int) -> Ids:
        """All tokens (n,) of a shard, mapped. Raises UserError where its size has changed."""
        mapped = self._maps[index]
        if mapped.size() != self._sizes[index]:  # reading past a truncated file's end would kill the process
            raise UserError(f"{self._paths[index]} changed while it was read: run data_prep/verify.py on its folder")
        return np.frombuffer(mapped, dtype=self.dtype)

    def _hand_back_pages(self, index: int, part: slice) -> None:
        """Take what was just read out of this process's memory; it stays in the operating system's cache."""
        if not hasattr(mmap, "MADV_DONTNEED"):  # Windows, and macOS before Python knows it
            return
        start = part.start * self.dtype.itemsize // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
        stop = min(self._sizes[index], part.stop * self.dtype.itemsize + HUGE_PAGE_BYTES)
        self._maps[index].madvise(mmap.MADV_DONTNEED, start, stop - start)


def find_token_set(path: Path | str) -> Path:
    """A set's folder as a configuration names it: a relative path in the working directory, or else in the project."""
    return find_path(path)


class TokenSet:
    """A complete token set in a folder. Make one with `TokenSet.open`."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest

    @classmethod
    def open(cls, folder: Path | str, verify: Literal["size", "full"] = "size") -> "TokenSet":
        """Open a set after checking that exactly the listed shards are there, with their sizes or (`full`) hashes,
        the validation split's own among them.

        Raises UserError in one line for a missing, incomplete, truncated, unlisted or otherwise wrong set.
        """
        folder = Path(folder)
        manifest = Manifest.read(folder)
        shards = [shard for name in sorted(manifest.splits) for shard in manifest.splits[name]]
        unlisted = sorted({path.name for path in folder.glob("*.bin")} - {shard.file for shard in shards})
        if unlisted:
            raise UserError(
                f"{folder / unlisted[0]} is not in the set's manifest: move it away, or prepare the set again"
            )
        for shard in shards:
            _check_size(folder, shard, manifest.numpy_dtype)
        if verify == "full":
            with (
                ThreadPoolExecutor(min(4, allowed_cores())) as pool,
                progress_bar(len(shards), "shard", "verifying") as bar,
            ):
                for _ in pool.map(partial(_check_hash, folder), shards):
                    bar.update()
            _check_validation_hash(folder, manifest)
        return cls(folder, manifest)

    @property
    def identity(self) -> str:
        """SHA-256 of what defines the data: no times, no paths."""
        return self.manifest.identity

    @property
    def tokenizer_spec(self) -> dict[str, Any]:
        return self.manifest.tokenizer

    def split(self, name: str) -> TokenStream:
        """The split's stream (of no tokens where the set lacks the split)."""
        shards, vocab_size = self.manifest.splits.get(name, ()), self.tokenizer_spec["vocab_size"]
        return TokenStream(self.folder, shards, self.manifest.numpy_dtype, vocab_size)

    @property
    def has_conversations(self) -> bool:
        """Whether it is of conversations, whose tokens have marks."""
        return self.manifest.conversations is not None

    @property
    def has_pairs(self) -> bool:
        """Whether its conversations are pairs of a chosen and a rejected one."""
        return self.manifest.has_pairs

    def marks(self, name: str) -> TokenStream | None:
        """The marks of a split's tokens, one for each; None in a set of texts, in which all tokens are learned from."""
        if not self.has_conversations:
            return None
        shards = self.manifest.splits.get(marks_of(name), ())
        return TokenStream(self.folder, shards, self.manifest.numpy_dtype, MARK_COUNT)

    def fields(self, name: str) -> TokenStream | None:
        """The further fields of a split's prompts, a line of JSON each, by bytes; None in a set without."""
        shards = self.manifest.splits.get(fields_of(name))
        return None if shards is None else TokenStream(self.folder, shards, self.manifest.numpy_dtype, BYTES)


def _check_size(folder: Path, shard: Shard, dtype: np.dtype[Any]) -> None:
    path, expected = folder / shard.file, shard.tokens * dtype.itemsize
    try:
        found = size_of_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: copy it again, or prepare the set again with --force") from None
    except OSError as error:
        raise UserError(refusal("read", error, path, otherwise=AGAIN)) from None
    if found != expected:
        raise UserError(f"{path} has {found:,} bytes, not {expected:,}: copy it again, or prepare the set with --force")


def _check_hash(folder: Path, shard: Shard) -> None:
    if sha256_file(folder / shard.file) != shard.sha256:
        raise UserError(
            f"{folder / shard.file} is not what was written (its SHA-256 differs): "
            "copy it again, or prepare the set again with --force"
        )


def _check_validation_hash(folder: Path, manifest: Manifest) -> None:
    if (found := validation_sha256(folder, manifest.splits)) != manifest.val_sha256:
        raise UserError(
            f"the validation split of {folder} has the SHA-256 {found[:16]}…, not its manifest's val_sha256 "
            f"({manifest.val_sha256[:16]}…): copy the manifest again, or prepare the set again with --force"
        )


def _map_file(path: Path) -> mmap.mmap:
    try:
        with open_regular(path) as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        fewer = "; a set with fewer, larger shards needs fewer" if error.errno in (errno.EMFILE, errno.ENFILE) else ""
        raise UserError(f"{refusal('read', error, path)}{fewer}") from None
    except ValueError as error:  # an empty file
        raise UserError(f"{path} can't be mapped ({error}): run data_prep/verify.py on its folder") from None


def _allow_open_files(count: int) -> None:
    """A map keeps its file open: raise the soft limit where a set has more shards than it allows."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = soft + count if hard == resource.RLIM_INFINITY else min(hard, soft + count)
    if count > soft // 2 and wanted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
