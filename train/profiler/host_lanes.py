"""What each thread of a process ran when, from a trace of PyTorch's profiler.

Operators lie in one another: a moment belongs to the innermost one. It is of the part that the outermost one names
which names any (products within attention are attention), and a backward function is of its forward's part where that
is attention or the head. What is sent is communication wherever it lies.
"""

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from train.profiler.intervals import Interval
from train.profiler.names import OVERRIDING, only_leads, part_of_operator

Event = dict[str, Any]  # one of a trace's: name, cat, ph, tid, ts and dur (microseconds), args
Place = tuple[Any, float]  # a thread and a time: where an event begins
OPERATOR, ANNOTATION = "cpu_op", "user_annotation"
INHERITED = {"attention", "head"}  # by backward functions


class _Open(NamedTuple):
    """An operator that has started. part: None for what only marks a range. fixed: what lies in it is of its part."""

    end: float
    name: str
    part: str | None
    fixed: bool


@dataclass
class Lane:
    """One thread. What ran when, in the order of time, without overlaps; nothing where nothing is known to have run."""

    intervals: list[Interval] = field(default_factory=list)
    _open: list[_Open] = field(default_factory=list)
    _reached: float = float("-inf")
    _starts: list[float] = field(default_factory=list)

    def begin(self, start: float, end: float, name: str, own: str | None, *, marks: bool) -> str | None:
        """The next operator, none of which begins before another that was given; return the part it is of.

        Args:
            own: what its name or its forward tells. marks: it is an annotation, and no work by itself.
        """
        self.finish(start)
        self._until(start)
        around = self._open[-1] if self._open else None
        part: str | None
        if own == OVERRIDING or (own is not None and not (around and around.fixed)):
            part, fixed = own, True
        elif around is not None and (around.part is not None or marks):
            part, fixed = around.part, around.fixed
        else:
            part, fixed = None if marks else "elementwise", False
        self._open.append(_Open(min(end, around.end) if around else end, name, part, fixed))
        return part

    def finish(self, until: float = float("inf")) -> None:
        """Close what has ended by then."""
        while self._open and self._open[-1].end <= until:
            self._until(self._open[-1].end)
            self._open.pop()

    def _until(self, time: float) -> None:
        """The time up to here was the innermost operator's."""
        if self._open and time > self._reached:
            inner = self._open[-1]
            if inner.part is not None:
                self.intervals.append(Interval(self._reached, time, inner.part, inner.name))
        self._reached = max(self._reached, time)

    def at(self, time: float) -> Interval | None:
        """What ran at a time."""
        if len(self._starts) != len(self.intervals):
            self._starts = [interval.start for interval in self.intervals]
        index = bisect_right(self._starts, time) - 1
        return self.intervals[index] if index >= 0 and time <= self.intervals[index].end else None


def host_lanes(events: Iterable[Event]) -> dict[Any, Lane]:
    """The lanes of all threads with operators or annotations, by thread."""
    events = list(events)
    forwards = _forwards(events)
    lanes: dict[Any, Lane] = {}
    parts: dict[Place, str | None] = {}
    for event in sorted(filter(is_host_work, events), key=lambda event: (event["ts"], -event["dur"])):
        place = (event["tid"], event["ts"])
        own = part_of_operator(event["name"])
        if own is None and (inherited := parts.get(forwards.get(place, ("", 0.0)))) in INHERITED:
            own = inherited
        lane = lanes.setdefault(event["tid"], Lane())
        marks = event["cat"] == ANNOTATION or only_leads(event["name"])
        parts[place] = lane.begin(event["ts"], event["ts"] + event["dur"], event["name"], own, marks=marks)
    for lane in lanes.values():
        lane.finish()
    return lanes


def is_host_work(event: Event) -> bool:
    """Whether a thread ran this. What gloo marks is how long something was under way, on a thread of its own."""
    return event.get("ph") == "X" and event.get("cat") in (OPERATOR, ANNOTATION) and not is_under_way(event)


def is_under_way(event: Event) -> bool:
    """Whether this is how long gloo took for something, however many threads waited for it."""
    return event.get("ph") == "X" and event["name"].startswith("gloo:")


def _forwards(events: Iterable[Event]) -> dict[Place, Place]:
    """Where the forward began of each backward function, by where that begins: the arrows in a trace's picture."""
    starts: dict[Any, Place] = {}
    ends: dict[Any, Place] = {}
    for event in events:
        if event.get("cat") == "fwdbwd":
            (starts if event["ph"] == "s" else ends)[event["id"]] = (event["tid"], event["ts"])
    return {place: starts[number] for number, place in ends.items() if number in starts}
