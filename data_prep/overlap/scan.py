"""A token set's text searched for an evaluation's N-grams, block by block, by several processes."""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.progress import progress_bar
from data_prep.corpora.encode_pool import START_METHODS
from data_prep.corpora.workers import choose_workers, ignoring_interrupts
from data_prep.overlap.word_ngrams import SEPARATOR, Counts, NgramIndex
from data_prep.token_sets.token_set import TokenSet, TokenStream
from data_prep.tokenization.loading import load_tokenizer
from data_prep.tokenization.tokenizer import Ids, Tokenizer

BLOCK_TOKENS = 1 << 19
OVERLAP_TOKENS = 1 << 12  # of blocks in a split without documents: more than any N-gram has
FEW_TOKENS = 4_000_000  # this process has read them before others would have started


@dataclass
class Occurrences:
    """Where N-grams were found: in how many documents (G,), and the first of these (G,), -1 for none."""

    documents: Counts
    first: Counts
    count: int = 0  # documents read
    tokens: int = 0

    @classmethod
    def none(cls, grams: int) -> "Occurrences":
        return cls(np.zeros(grams, dtype=np.int64), np.full(grams, -1, dtype=np.int64))

    def add(self, found: "BlockResult") -> None:
        np.add.at(self.documents, found.grams, 1)
        new, places = np.unique(found.grams, return_index=True)  # a block's pairs are sorted by N-gram, then document
        unseen = self.first[new] < 0
        self.first[new[unseen]] = found.documents[places[unseen]] + self.count
        self.count += found.count


@dataclass(frozen=True)
class BlockResult:
    """A block's pairs of N-gram and document, counted from the block's first; how many documents start in it."""

    grams: Counts
    documents: Counts
    count: int
    tokens: int


@dataclass
class Scanner:
    """What a process needs to search blocks of a split."""

    folder: Path
    split: str
    index: NgramIndex
    _stream: TokenStream = field(init=False)
    _tokenizer: Tokenizer = field(init=False)

    def __post_init__(self) -> None:
        opened = TokenSet.open(self.folder)
        self._stream, self._tokenizer = opened.split(self.split), load_tokenizer(opened.tokenizer_spec)
        self.size = len(self._stream)  # tokens

    def search(self, start: int) -> BlockResult:
        """The documents that start in a block, to their ends. Where documents are not marked, all of the block."""
        stop = min(len(self._stream), start + BLOCK_TOKENS)
        begin = self._tokenizer.begin_of_text_id
        if begin is None:
            ids = self._stream.read(start, min(len(self._stream), stop + OVERLAP_TOKENS))
            grams, documents = self.index.find(self._tokenizer.text_bytes(ids).decode("utf-8", "replace"))
            return BlockResult(grams, documents, int(stop == len(self._stream)), stop - start)
        ids = self._stream.read(start, stop)
        starts = np.flatnonzero(ids == begin)
        if not len(starts):
            return BlockResult(np.zeros(0, np.int64), np.zeros(0, np.int64), 0, stop - start)
        parts = [ids[int(starts[0]) :], *self._rest_of_document(stop, begin)]
        grams, documents = self.index.find(self._text(np.concatenate(parts), begin))
        return BlockResult(grams, documents - 1, len(starts), stop - start)  # a separator precedes the first, too

    def _rest_of_document(self, place: int, begin: int) -> Iterator[Ids]:
        while place < len(self._stream):
            ids = self._stream.read(place, min(len(self._stream), place + OVERLAP_TOKENS))
            ends = np.flatnonzero(ids == begin)
            yield ids[: int(ends[0])] if len(ends) else ids
            if len(ends):
                return
            place += len(ids)

    def _text(self, ids: Ids, begin: int) -> str:
        """The documents' text with a separator before each; one that stands in the text becomes a space."""
        data = self._tokenizer.text_bytes(ids).replace(SEPARATOR.encode(), b" ")
        places = np.cumsum(self._tokenizer.piece_bytes[ids], dtype=np.int64)[ids == begin].tolist()
        texts = [data[here:there] for here, there in zip(places, [*places[1:], len(data)], strict=True)]
        return "".join(f"{SEPARATOR}{text.decode('utf-8', 'replace')}" for text in texts)


_OPENED: list[Scanner] = []  # in a worker process: its own


def _open(folder: Path, split: str, index: NgramIndex) -> None:
    _OPENED.append(Scanner(folder, split, index))


def _search(start: int) -> BlockResult:
    return _OPENED[-1].search(start)


def scan(folder: Path, split: str, index: NgramIndex, workers: int | None) -> Occurrences:
    """Search all of a split, by `workers` processes (0: only this one; None: as many as is sensible).

    Raises UserError where the set or its tokenizer can't be read, or a process dies.
    """
    scanner = Scanner(folder, split, index)
    found = Occurrences.none(len(index.grams))
    found.tokens = scanner.size
    if workers is None:
        workers = 0 if scanner.size < FEW_TOKENS else choose_workers(None)
    with progress_bar(scanner.size, "tok", "searching", scale=True) as bar:
        for result in _results(scanner, range(0, scanner.size, BLOCK_TOKENS), workers):
            found.add(result)
            bar.update(result.tokens)
    return found


def _results(scanner: Scanner, starts: range, workers: int) -> Iterator[BlockResult]:
    """Of all blocks, in their order."""
    if not workers:
        yield from map(scanner.search, starts)
        return
    context = multiprocessing.get_context(START_METHODS[0])
    opening = (scanner.folder, scanner.split, scanner.index)
    try:
        with ProcessPoolExecutor(workers, context, initializer=_open, initargs=opening) as pool:
            with ignoring_interrupts():  # all processes start with the first task
                results = pool.map(_search, starts)
            yield from results
    except BrokenProcessPool:
        raise UserError("a worker process died: run the command again (short of memory? fewer --workers)") from None
