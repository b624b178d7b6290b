"""Several sources in one order: which source, and which of its sequences, stands at each position.

A pure function of the stages, found in constant time and in integers only: a run's position stays its one integer.
Weights are shares of sequences in 1/4,096. A stage's sources follow each other in a period that Tijdeman's rule orders
("The chairman assignment problem", Discrete Mathematics 32, 1980): at every position each source has had its share to
within one sequence. A source resumes where it was when a stage ends.
"""

import bisect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import gcd

import numpy as np
import numpy.typing as npt

from train.batches.shuffle import numbers_at

PARTS = 4_096  # of which a weight is a whole number
MOST_LEVELS = 256  # of a ramp's staircase
BLOCK = 4_096  # positions that are found at once
COARSE = 256  # parts of a ramp's weights: short periods, as there are many to be ordered

Ints = npt.NDArray[np.int64]


def shares_of(weights: Sequence[float], parts_in_all: int = PARTS, *, at_least: int = 1) -> tuple[int, ...]:
    """Weights, (m,), as whole parts: the largest remainders get what rounding leaves.

    Args: at_least: parts that a weight above 0 gets.

    Raises ValueError for weights that are negative, not finite or all 0.
    """
    total = sum(weights)
    if not 0 < total < float("inf") or min(weights) < 0:
        raise ValueError("weights must not be negative, and one of them must be above 0")
    exact = [weight / total * parts_in_all for weight in weights]
    parts = [max(int(value), at_least * (weight > 0)) for value, weight in zip(exact, weights, strict=True)]
    by_remainder = sorted(range(len(exact)), key=lambda i: (int(exact[i]) - exact[i], i))
    for i in by_remainder[: max(0, parts_in_all - sum(parts))]:
        parts[i] += 1
    while (over := sum(parts) - parts_in_all) > 0:  # many tiny weights: the largest give way
        largest = parts.index(max(parts))
        parts[largest] -= min(over, parts[largest] - 1)
    return tuple(parts)


def tijdeman(shares: Sequence[int]) -> npt.NDArray[np.int16]:
    """One period of sources, (p,) with p = sum of shares: any prefix of n has n·share/p of each to within one.

    Of the sources that may have one more without getting too far ahead, the one whose time runs out first is taken.
    """
    used = [i for i, share in enumerate(shares) if share]
    period, m = sum(shares), len(used)
    order = np.zeros(period, dtype=np.int16)
    if m == 1:
        order[:] = used[0]
        return order
    had = dict.fromkeys(used, 0)
    slack = 2 * m - 2  # all in units of 1/(period·slack)
    for n in range(1, period + 1):
        best, best_deadline = -1, (0, 1)
        for i in used:
            behind = slack * (n * shares[i] - had[i] * period)  # what it has too little
            if behind < period:
                continue
            deadline = (slack * period - period - behind, shares[i])  # a fraction
            if best < 0 or deadline[0] * best_deadline[1] < best_deadline[0] * deadline[1]:
                best, best_deadline = i, deadline
        had[best] += 1
        order[n - 1] = best
    return order


@dataclass(frozen=True)
class Level:
    """From a position on these shares hold, (m,) parts."""

    start: int
    shares: tuple[int, ...]

    @cached_property
    def order(self) -> npt.NDArray[np.int16]:
        """One period of sources, (p,)."""
        common = gcd(*self.shares)
        return tijdeman([share // common for share in self.shares])

    @cached_property
    def before(self) -> Ints:
        """How many of each source stand before each place of the period, and in all of it: (p+1, m)."""
        one_hot = np.zeros((len(self.order) + 1, len(self.shares)), dtype=np.int64)
        one_hot[np.arange(1, len(self.order) + 1), self.order] = 1
        return one_hot.cumsum(axis=0)

    def counts(self, length: int) -> Ints:
        """How many of each source are among the level's first `length` positions: (m,)."""
        whole, rest = divmod(length, len(self.order))
        return whole * self.before[-1] + self.before[rest]


class Mixture:
    """The order of `len(levels[0].shares)` sources over one or several levels."""

    def __init__(self, levels: Sequence[Level], first: Sequence[int] | None = None) -> None:
        """Args: levels: by rising start, the first at 0. first: (m,) where each source starts; None: at its first."""
        assert levels and levels[0].start == 0, "the first level starts the order"
        self.levels = levels
        self._starts = [level.start for level in levels]
        bases = [np.zeros(len(levels[0].shares), dtype=np.int64) if first is None else np.array(first, dtype=np.int64)]
        for level, following in itertools.pairwise(levels):
            bases.append(bases[-1] + level.counts(following.start - level.start))
        self._bases = bases

    def consumed(self, position: int) -> Ints:
        """How many sequences of each source stand before a position, those before the first included: (m,)."""
        number = bisect.bisect_right(self._starts, position) - 1
        return self._bases[number] + self.levels[number].counts(position - self._starts[number])

    def at(self, first: int, count: int) -> tuple[Ints, Ints]:
        """At positions first … first+count-1: the source, and its how-manieth sequence, (count,) each."""
        sources, indices = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            number = bisect.bisect_right(self._starts, first + done) - 1
            level, offset = self.levels[number], first + done - self._starts[number]
            take = count - done
            if number + 1 < len(self.levels):
                take = min(take, self._starts[number + 1] - first - done)
            whole, place = np.divmod(np.arange(offset, offset + take, dtype=np.int64), len(level.order))
            found = level.order[place].astype(np.int64)
            part = slice(done, done + take)
            sources[part] = found
            indices[part] = self._bases[number][found] + whole * level.before[-1][found] + level.before[place, found]
            done += take
        return sources, indices


class MixedOrder:
    """The order of several sources' sequences, numbered one source after another."""

    def __init__(self, mixture: Mixture, counts: Mapping[str, int], seed: int) -> None:
        """Args: counts: (m,) of each source's sequences, by its name."""
        assert min(counts.values()) > 0
        self._mixture, self._names, self._seed = mixture, list(counts), seed
        self._counts = np.array(list(counts.values()), dtype=np.int64)
        self._offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(self._counts)])
        self._block = lru_cache(maxsize=4)(self._find_block)

    def numbers(self, first: int, count: int) -> Ints:
        """The sequence numbers (count,) at positions first … first+count-1."""
        start = first // BLOCK
        blocks = [self._block(number) for number in range(start, (first + count - 1) // BLOCK + 1)]
        return np.concatenate(blocks)[first - start * BLOCK : first - start * BLOCK + count]

    def _find_block(self, number: int) -> Ints:
        """(BLOCK,): found together, as many small steps cost more than one large one."""
        sources, indices = self._mixture.at(number * BLOCK, BLOCK)
        return self._offsets[sources] + numbers_at(indices, self._counts[sources], self._seed)

    def named(self, number: int) -> tuple[str, int]:
        """A sequence's source, and its number in it."""
        source = int(np.searchsorted(self._offsets, number, side="right")) - 1
        return self._names[source], number - int(self._offsets[source])

    def read_by_source(self, position: int) -> dict[str, int]:
        """How many sequences of each source stand before a position."""
        counts = self._mixture.consumed(position) - self._mixture.consumed(0)
        return dict(zip(self._names, counts.tolist(), strict=True))


def levels_of_mix(
    weights: Mapping[str, float], stages: Sequence[tuple[Mapping[str, float], int | None, int]], block_size: int
) -> list[Level]:
    """The order of a mix in positions of sequences; a stage starts with the first sequence after its tokens.

    Args:
        weights: of all sources, which hold where there are no stages.
        stages: the weights of each, the tokens up to which they hold (None: to the end), and over how many they are
            reached.
    """
    if not stages:
        return levels_of([(0, weights, 0)], [*weights])
    found, start = [], 0
    for stage_weights, until, ramp in stages:
        found.append((start, stage_weights, -(-ramp // block_size)))
        start = -(-(until or 0) // block_size)
    return levels_of(found, [*weights])


def levels_of(stages: Sequence[tuple[int, Mapping[str, float], int]], names: Sequence[str]) -> list[Level]:
    """Stages as levels.

    Args:
        stages: by rising start: its first position, the weights of its sources by name (0 for those it leaves out), and
            over how many positions they are reached, from the stage before; 0: at once.
        names: of all sources, in the order of the shares.

    Raises ValueError as `shares_of`.
    """
    levels: list[Level] = []
    for number, (start, weights, ramp) in enumerate(stages):
        target = np.array(shares_of([weights.get(name, 0.0) for name in names]), dtype=np.float64)
        steps = min(ramp, MOST_LEVELS) if number else 0
        before = np.array(levels[-1].shares, dtype=np.float64) if levels else target
        for step in range(steps):
            between = before + (target - before) * (step + 1) / (steps + 1)
            shares = shares_of(between.tolist(), COARSE, at_least=0)
            _append(levels, Level(start + step * ramp // steps, tuple(share * (PARTS // COARSE) for share in shares)))
        _append(levels, Level(start + ramp if steps else start, shares_of(target.tolist())))
    return levels


def _append(levels: list[Level], level: Level) -> None:
    """Add a level, in place of those that start there or later."""
    while levels and levels[-1].start >= level.start:
        levels.pop()
    levels.append(level)
