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
        half = _half_bits(size)
        self._half, self._mask = np.uint64(half), np.uint64((1 << half) - 1)
        self._keys = _keys(seed, epoch)

    def __call__(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Map positions (n,) int64 to sequence numbers (n,) int64."""
        values = _network(positions.astype(np.uint64), self._half, self._mask, self._keys)
        outside = np.flatnonzero(values >= self.size)
        while len(outside):
            values[outside] = _network(values[outside], self._half, self._mask, self._keys)
            outside = outside[values[outside] >= self.size]
        return values.astype(np.int64)


def _half_bits(size: int) -> int:
    """b/2: of a permutation of 0 … size-1."""
    return (max(2, (size - 1).bit_length()) + 1) // 2


def _keys(seed: int, epoch: int) -> npt.NDArray[np.uint64]:
    """Of the network's rounds: (ROUNDS,)."""
    return keys_of(f"longhaul order {seed} {epoch}", ROUNDS)


Words = npt.NDArray[np.uint64]


def _network(values: Words, half: Words | np.uint64, mask: Words | np.uint64, keys: Words) -> Words:
    """(n,) to (n,). Args: half, mask, and each of the keys: the same for all values, or (n,) each."""
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << half) | right


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


def numbers_at(positions: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.int64]:
    """The sequence numbers (n,) at positions (n,) of several sources' orders, each of `counts` (n,) sequences.

    They are those of `windows_at`, in one pass for all sources: for eight of them in a sixth of the time.
    """
    epochs, within = np.divmod(positions, counts)
    sizes, which = np.unique(counts, return_inverse=True)
    half = np.array([_half_bits(int(size)) for size in sizes], dtype=np.uint64)[which]  # (n,)
    mask = (np.uint64(1) << half) - np.uint64(1)  # (n,)
    different, which = np.unique(epochs, return_inverse=True)
    keys = np.stack([_keys(seed, int(epoch)) for epoch in different])[which].T  # (ROUNDS, n)
    limits = counts.astype(np.uint64)
    values = _network(within.astype(np.uint64), half, mask, keys)
    outside = np.flatnonzero(values >= limits)
    while len(outside):
        values[outside] = _network(values[outside], half[outside], mask[outside], keys[:, outside])
        outside = outside[values[outside] >= limits[outside]]
    return values.astype(np.int64)


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
