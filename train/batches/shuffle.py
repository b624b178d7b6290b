"""The order in which a run reads its sequences: a permutation per epoch that costs no memory.

The g-th sequence that a run reads of a token set of W sequences is number `permutation(seed, epoch)(g mod W)` of epoch
`g // W`. Any of them is found at once, so that jumping to the billionth costs what jumping to the first costs.
"""

import numpy as np
import numpy.typing as npt

from common.seeds import keys_of

ROUNDS = 6
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


class Permutation:
    """A pseudo-random permutation of 0 … size-1: a Feistel network (Luby & Rackoff 1988) with cycle walking.

    The network permutes 0 … 2^b - 1 for the least even b with 2^b ≥ size; a result of `size` or more is put through
    again until it falls below (Black & Rogaway 2002), four times at most on average.
    """

    def __init__(self, size: int, seed: int, epoch: int) -> None:
        assert 0 < size < 1 << 62, size
        self.size = size
        bits = max(2, (size - 1).bit_length())
        self._half = np.uint64((bits + 1) // 2)
        self._mask = np.uint64((1 << int(self._half)) - 1)
        self._keys = keys_of(f"longhaul order {seed} {epoch}", ROUNDS)

    def __call__(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Map positions (n,) int64 to sequence numbers (n,) int64."""
        values = self._network(positions.astype(np.uint64))
        outside = np.flatnonzero(values >= self.size)
        while len(outside):
            values[outside] = self._network(values[outside])
            outside = outside[values[outside] >= self.size]
        return values.astype(np.int64)

    def _network(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = values >> self._half, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right + key) & self._mask)
        return (left << self._half) | right


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele et al. 2014), (n,) to (n,); arithmetic modulo 2^64."""
    values = (values ^ (values >> np.uint64(30))) * _MIX_1
    values = (values ^ (values >> np.uint64(27))) * _MIX_2
    return values ^ (values >> np.uint64(31))


def windows_at(first: int, count: int, window_count: int, seed: int) -> npt.NDArray[np.int64]:
    """The sequence numbers (count,) at positions first … first+count-1, across epoch borders."""
    windows = np.empty(count, dtype=np.int64)
    done = 0
    while done < count:
        epoch, position = divmod(first + done, window_count)
        take = min(count - done, window_count - position)
        positions = np.arange(position, position + take, dtype=np.int64)
        windows[done : done + take] = Permutation(window_count, seed, epoch)(positions)
        done += take
    return windows


class EpochOrder:
    """The order of one source's sequences."""

    def __init__(self, count: int, seed: int) -> None:
        """Args: count: of the source's sequences."""
        assert count > 0
        self.count, self.seed = count, seed

    def numbers(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """The sequence numbers (count,) at positions first … first+count-1."""
        return windows_at(first, count, self.count, self.seed)

    def named(self, number: int) -> int:
        """A sequence as it is recorded."""
        return number

    def read_by_source(self, position: int) -> dict[str, int]:
        """Nothing: there is one source."""
        return {}
