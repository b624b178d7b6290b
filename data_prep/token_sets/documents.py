"""A token set's documents, one after the other, whatever blocks and shards they are in."""

from collections.abc import Iterator

import numpy as np

from data_prep.token_sets.manifest import STARTS
from data_prep.token_sets.sequences import Tokens
from data_prep.tokenization.tokenizer import Ids

BLOCK_TOKENS = 1 << 20


def conversations_of(stream: Tokens, marks: Tokens) -> Iterator[Ids]:
    """The ids (n,) of every conversation of a split, by its marks."""
    place = 0
    for marked in documents_of(marks, STARTS):
        yield stream.read(place, place + len(marked))
        place += len(marked)


def documents_of(stream: Tokens, begin: int | None, start: int = 0, stop: int | None = None) -> Iterator[Ids]:
    """The ids (n,) of every document that starts at start … stop - 1, the id that marks its start included.

    Args:
        begin: the id before every document; None: documents are not marked, and the stream is a single one.
        stop: None: to the end. A document that starts before it is given whole.
    """
    size = len(stream)
    stop = size if stop is None else min(stop, size)
    if begin is None:
        if start == 0 < stop:
            yield stream.read(0, size)
        return
    rest: list[Ids] = []  # of the document that is being read
    for place in range(start, size, BLOCK_TOKENS):
        if place >= stop and not rest:
            return
        block = stream.read(place, min(size, place + BLOCK_TOKENS))
        starts = np.flatnonzero(block == begin)
        first = int(starts[0]) if len(starts) else len(block)
        if rest:
            rest.append(block[:first])
            if first < len(block):
                yield np.concatenate(rest)
                rest = []
        for number, one in enumerate(starts.tolist()):
            if place + one >= stop:
                return
            if number + 1 < len(starts):
                yield block[one : int(starts[number + 1])]
            else:
                rest = [block[one:]]
    if rest:
        yield np.concatenate(rest)
