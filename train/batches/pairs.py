"""The pairs of a set of preferences as sequences: number 2k is the chosen answer of pair k, 2k + 1 the rejected one.

Each stands behind its prompt in a sequence of its own. A batch has whole pairs, and is a pure function of (data, seed,
sequences consumed); micro-batches and ranks only slice it.
"""

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from data_prep.token_sets.documents import documents_of
from data_prep.token_sets.manifest import COUNTED, STARTS
from data_prep.token_sets.packing import IGNORE
from data_prep.token_sets.sequences import Rows
from data_prep.token_sets.token_set import TokenSet

Ints = npt.NDArray[np.int64]


class PairSequences:
    """The pairs of a split of which both sides fit into a sequence.

    Attributes:
        pairs: how many. left_out: how many are too long.
    """

    def __init__(
        self, tokens: TokenSet, split: str, block_size: int, *, at_most: int | None = None, whole: bool = False
    ) -> None:
        """Args: at_most: only so many pairs, the first ones. whole: a conversation's last token is an input, too.

        Raises UserError where no pair fits.
        """
        self._inputs_less = 0 if whole else 1  # tokens that are targets only
        marks = tokens.marks(split)
        assert marks is not None, "fit_to_data has refused it"
        self._stream, self._marks, self.block_size = tokens.split(split), marks, block_size
        lengths = np.array([len(marked) for marked in documents_of(marks, STARTS)], dtype=np.int64).reshape(-1, 2)
        starts = np.cumsum(lengths.ravel()).reshape(-1, 2) - lengths  # (p, 2)
        fits = (lengths - self._inputs_less <= block_size).all(axis=1)
        self._starts, self._lengths = starts[fits][:at_most].ravel(), lengths[fits][:at_most].ravel()
        self.pairs, self.left_out = len(self._starts) // 2, int((~fits).sum())
        self.count = 2 * self.pairs
        if not self.pairs:
            raise UserError(
                f"all {self.left_out:,} pairs of the {split} split of {tokens.folder} have a side longer than "
                f"model.block_size {block_size}: use a longer one, or shorter answers"
            )

    def rows(self, numbers: Ints) -> Rows:
        """Sequences (n,), padded at the right, which no token before it sees."""
        shape = len(numbers), self.block_size
        inputs, targets = np.zeros(shape, dtype=np.int64), np.full(shape, IGNORE, dtype=np.int64)
        for row, number in enumerate(numbers.tolist()):
            start, length = int(self._starts[number]), int(self._lengths[number])
            ids = self._stream.read(start, start + length).astype(np.int64)
            counted = self._marks.read(start + 1, start + length) == COUNTED
            inputs[row, : length - self._inputs_less] = ids[: length - self._inputs_less]
            targets[row, : length - 1] = np.where(counted, ids[1:], IGNORE)
        return Rows(inputs, targets, None)

    def target_count(self, numbers: Ints) -> int:
        """What a loss is the mean over: the pairs of the sequences (n,)."""
        return len(numbers) // 2


class InOrder:
    """The order of sequences by their numbers, again and again."""

    def __init__(self, count: int) -> None:
        self._count = count

    def numbers(self, first: int, count: int) -> Ints:
        """The sequence numbers (count,) at positions first … first+count-1."""
        return np.arange(first, first + count, dtype=np.int64) % self._count

    def named(self, number: int) -> int:
        """A sequence as it is recorded."""
        return number

    def read_by_source(self, position: int) -> dict[str, int]:
        """Nothing: there is one source."""
        return {}


def width_of(targets: npt.NDArray[np.int64], multiple: int = 8) -> int:
    """How many tokens of the rows (…, T) are needed: up to the last target of any, rounded up."""
    used = np.flatnonzero((targets != IGNORE).reshape(-1, targets.shape[-1]).any(axis=0))
    last = int(used[-1]) + 1 if len(used) else 1
    return min(targets.shape[-1], -(-last // multiple) * multiple)
