"""Runs of N words that evaluation examples and training text share, found without error on either side.

Words are runs of letters and digits in lower case: line breaks, white space, punctuation and case don't count. The
evaluation's N-grams are kept whole; a hash only finds the candidates among the training text's, which are then compared
word by word.
"""

import itertools
import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

SEPARATOR = "\x1e"  # between documents; no N-gram runs across one
WORD = re.compile(rf"[^\W_]+|{SEPARATOR}")
FILTER_BITS = 24
Counts = npt.NDArray[np.int64]


def words_of(text: str) -> list[str]:
    """A text's words, and a SEPARATOR where it has one."""
    return WORD.findall(text.lower())


class NgramIndex:
    """The N-grams of an evaluation's examples.

    Attributes:
        words: N.
        grams: (G, N) int32, each N-gram once, as numbers of words.
        of_item: for each example the numbers of its N-grams (n,), in its order; none for one that has fewer words.
    """

    def __init__(self, texts: Sequence[str], words: int) -> None:
        self.words = words
        self._numbers: dict[str, int] = {}  # from 1 on: 0 is any other word, and separates
        rows = [np.array([self._number(word) for word in words_of(text)], dtype=np.int32) for text in texts]
        self._names = ["", *self._numbers]
        found = [np.lib.stride_tricks.sliding_window_view(row, words) for row in rows if len(row) >= words]
        whole = np.concatenate(found) if found else np.zeros((0, words), dtype=np.int32)
        for attempt in itertools.count():  # a multiplier by which no two of them have the same hash
            self._powers = _powers(words, attempt)
            self._hashes, first, number = np.unique(self._hash(whole), return_index=True, return_inverse=True)
            self.grams = whole[first]
            if np.array_equal(self.grams[number], whole):
                break
        ends = np.cumsum([max(0, len(row) - words + 1) for row in rows])
        self.of_item: list[Counts] = np.split(number.astype(np.int64), ends[:-1])
        self._filter = np.zeros(1 << FILTER_BITS, dtype=np.bool_)
        self._filter[self._slot(self._hashes)] = True

    def _number(self, word: str) -> int:
        return 0 if word == SEPARATOR else self._numbers.setdefault(word, len(self._numbers) + 1)

    def _hash(self, rows: npt.NDArray[np.int32]) -> npt.NDArray[np.uint64]:
        """Of N-grams (n, N): (n,)."""
        total = np.zeros(len(rows), dtype=np.uint64)
        for column, power in enumerate(self._powers):
            total += rows[:, column].astype(np.uint64) * power
        return total

    @staticmethod
    def _slot(hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        return (hashes >> np.uint64(64 - FILTER_BITS)).astype(np.int64)

    def text(self, gram: int) -> str:
        """The words of an N-gram."""
        return " ".join(self._names[number] for number in self.grams[gram])

    def find(self, text: str) -> tuple[Counts, Counts]:
        """The N-grams that stand in documents, SEPARATOR between them: their numbers (n,), in which document (n,).

        Each pair once, documents counted from 0.
        """
        words = words_of(text)
        ids = np.fromiter(map(self._numbers.get, words, itertools.repeat(0)), dtype=np.int32, count=len(words))
        known = np.concatenate([[0], np.cumsum(ids != 0, dtype=np.int64)])
        places = np.flatnonzero(known[self.words :] - known[: -self.words] == self.words)  # no other word in it
        total = np.zeros(len(places), dtype=np.uint64)
        for offset, power in enumerate(self._powers):
            total += ids[places + offset].astype(np.uint64) * power
        may = self._filter[self._slot(total)]
        places, total = places[may], total[may]
        if not len(places):
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        numbers = np.minimum(np.searchsorted(self._hashes, total), len(self._hashes) - 1)
        rows = ids[places[:, None] + np.arange(self.words)]  # (n, N)
        same = (self.grams[numbers] == rows).all(axis=1)
        ends = np.array([place for place, word in enumerate(words) if word == SEPARATOR], dtype=np.int64)
        documents = np.searchsorted(ends, places[same], side="right")
        pairs = np.unique(np.stack([numbers[same], documents]), axis=1)
        return pairs[0], pairs[1]


def _powers(words: int, attempt: int) -> list[np.uint64]:
    multiplier = 0x9E3779B97F4A7C15 + 2 * attempt  # odd, from the golden ratio (Knuth, vol. 3, 6.4)
    return [np.uint64(pow(multiplier, power, 1 << 64)) for power in range(1, words + 1)]
