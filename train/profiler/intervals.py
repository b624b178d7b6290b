"""Intervals of time on a line: who had which of them."""

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple


class Interval(NamedTuple):
    """From start to end, in microseconds: what ran, and the part of a step that it belongs to."""

    start: float
    end: float
    part: str
    name: str


def disjoint(intervals: Iterable[Interval]) -> list[Interval]:
    """In the order of time; where several overlap, the one that began first has the time."""
    found: list[Interval] = []
    reached = float("-inf")
    for interval in sorted(intervals):
        if interval.end > reached:
            found.append(interval if interval.start >= reached else interval._replace(start=reached))
            reached = interval.end
    return found


class Shares:
    """Time that is given away, layer after layer, until what is left is idle.

    Attributes:
        free: what nobody has had, as disjoint (start, end) in order.
        given: microseconds by (part, name).
    """

    def __init__(self, time: Iterable[tuple[float, float]]) -> None:
        self.free = sorted(time)
        self.total = sum(end - start for start, end in self.free)
        self.given: dict[tuple[str, str], float] = defaultdict(float)

    def give(self, layer: Iterable[Interval]) -> float:
        """Let a layer have what it covers of the time that is free; return the microseconds that it covers of it."""
        intervals, still_free = disjoint(layer), []
        index, covered = 0, 0.0
        for start, end in self.free:
            while index and intervals[index - 1].end > start:  # it reaches into several free stretches
                index -= 1
            while index < len(intervals) and intervals[index].start < end:
                interval = intervals[index]
                index += 1
                if interval.end <= start:
                    continue
                if interval.start > start:
                    still_free.append((start, interval.start))
                taken = min(interval.end, end) - max(interval.start, start)
                self.given[interval.part, interval.name] += taken
                covered += taken
                start = max(start, min(interval.end, end))
            if start < end:
                still_free.append((start, end))
        self.free = still_free
        return covered
