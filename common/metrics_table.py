"""`metrics.jsonl` as columns, for reading a million steps in one pass and for following a run that is going.

What holds and what a resume made void is decided as in `common.metrics_file.read_metrics`. Beside that the table keeps
what `read_metrics` drops: every start, and how much work was lost and done again.
"""

import bisect
import math
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic_core import from_json

from common.curves import KnownCurves
from common.growing_file import GrowingFile
from common.measured import like_the_newest
from common.metric_fields import FIELDS, MOST_SOURCES, NUMBER, TRAINED, by_source, fits, is_step, mended
from common.metrics_file import parse_line
from common.planned import planned_in

Values = npt.NDArray[np.float64]

TRAIN_COLUMNS = (
    "step",
    "tokens",
    "loss",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "mfu",
    "step_seconds",
    "data_wait_seconds",
    "memory_gib",
    "time",
)
SAME_HANG_SECONDS = 30.0
SAVE_SECONDS = ("save_blocked_seconds", "save_seconds")  # the first that a save's record has


@dataclass
class Life:
    """One launch's part of a run, from its start to its last record. Times in seconds since the epoch."""

    step: int  # steps done when it started
    start: float
    end: float
    world_size: int | None
    starting_seconds: float | None = None  # from the start to its first piece of work


@dataclass
class Lost:
    """Work that a resume made void, because no checkpoint held it: done once for nothing."""

    steps: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class RolledBack:
    """Steps that a roll-back past a loss spike made void: (steps,) each."""

    number: int  # of the roll-back, the run's first being 1
    steps: Values
    tokens: Values
    losses: Values
    times: Values


@dataclass
class Hang:
    """A time in which all ranks waited for one.

    Attributes:
        within: the phase that continued, in whose seconds these are; "" where none did, or its work was lost.
    """

    step: int
    seconds: float
    within: str
    time: float

    def is_of(self, other: "Hang") -> bool:
        """Whether two ranks have recorded the same one."""
        return self.step == other.step and abs(self.time - other.time) < SAME_HANG_SECONDS


@dataclass
class MetricsTable:
    """The records of one file that hold, in columns; `update` reads on where the last one ended."""

    path: Path
    events: list[dict[str, Any]] = field(default_factory=list)  # validations, saves and the like, by step
    lives: list[Life] = field(default_factory=list)
    lost: Lost = field(default_factory=Lost)
    skips: int = 0  # steps that were skipped as spikes, those that were rolled back included
    rollbacks: list[RolledBack] = field(default_factory=list)
    hangs: list[Hang] = field(default_factory=list)
    curves: KnownCurves = field(default_factory=KnownCurves)  # as far as the file has been read
    planned: dict[str, float] = field(default_factory=dict)  # by the newest start that has planned anything
    _columns: dict[str, "array[float]"] = field(default_factory=lambda: {key: array("d") for key in TRAIN_COLUMNS})
    _sources: dict[str, "array[float]"] = field(default_factory=dict)  # training losses of a mix's sources
    _file: GrowingFile = field(init=False)

    def __post_init__(self) -> None:
        self._file = GrowingFile(self.path)

    def __len__(self) -> int:
        return len(self._columns["step"])

    def column(self, key: str) -> Values:
        """One value a training step, float64, NaN where it is missing or was not finite (null)."""
        return np.array(self._columns[key], dtype=np.float64)

    def losses_by_source(self) -> dict[str, Values]:
        """Training losses, one a training step, by the name of a mix's source, NaN where a step has none of it."""
        return {
            key.removeprefix(f"{TRAINED}."): np.array(values, dtype=np.float64) for key, values in self._sources.items()
        }

    def tail(self, key: str, count: int) -> Values:
        """The last `count` values of a column."""
        return np.array(self._columns[key][-count:], dtype=np.float64)

    def of_kind(self, key: str) -> list[dict[str, Any]]:
        """The other records that hold `key`, such as `val_loss`, by step."""
        return [event for event in self.events if key in event]

    def comparable(self, key: str) -> list[dict[str, Any]]:
        """Those of `of_kind` that were measured as the newest of them was: on the same data, as much of them."""
        records, curve = self.of_kind(key), self.curves.get(key)
        return records if curve is None else like_the_newest(curve, records)

    @property
    def complaint(self) -> str:
        """Which of the descriptions of curves could not be taken; empty where all were."""
        return self.curves.complaint_about(self.path)

    def update(self) -> bool:
        """Read what has been appended since, whole lines only; return whether there was anything.

        Raises OSError where it can't be read.
        """
        if self._file.was_replaced():
            vars(self).update(vars(MetricsTable(self.path)))
        anything = False
        for lines in self._file.blocks():
            self.add(_parse(lines))
            anything = True
        return anything

    def add(self, records: list[dict[str, Any]]) -> None:
        """Take in records in the order of the file."""
        plain: list[dict[str, Any]] = []
        last = self._last_step()
        for record in records:
            step: Any = record.get("step")
            if not is_step(step):
                continue
            if "loss" in record and step > last and self.lives:
                plain.append(record)  # the common case, by the block
                last = step
                continue
            self._append(plain)
            plain = []
            if (uncommon := mended(record)) is not None:
                self._add_uncommon(uncommon, step)
            last = self._last_step()
        self._append(plain)

    def _last_step(self) -> float:
        """A training record of a later one voids nothing."""
        return max(
            self._columns["step"][-1:].tolist() + [event["step"] for event in self.events[-1:]], default=-math.inf
        )

    def _append(self, records: list[dict[str, Any]]) -> None:
        if not records:
            return
        for key, column in self._columns.items():
            column.frombytes(_as_numbers(key, [record.get(key) for record in records]).tobytes())
        if self._sources or TRAINED in records[0]:
            self._append_sources([by_source(record, TRAINED) for record in records])
        self._note_time(records[0])
        self._note_time(records[-1])

    def _append_sources(self, found: list[dict[str, float]]) -> None:
        """A value a training step that has just been appended, by source, NaN where a step has none of it."""
        before = len(self) - len(found)
        for name in dict.fromkeys(name for figures in found for name in figures):
            if name not in self._sources and len(self._sources) < MOST_SOURCES:
                self._sources[name] = array("d", [math.nan]) * before
        for name, column in self._sources.items():
            column.extend(figures.get(name, math.nan) for figures in found)

    def _add_uncommon(self, record: dict[str, Any], step: int) -> None:
        """A record that is no training step, or one that goes back."""
        if record.get("kind") == "start" or not self.lives:
            self._begin_life(record, step)
        self.curves.learn(record)
        if record.get("kind") == "start":
            self.planned = planned_in(record) or self.planned
            self._void(step)
            return
        if record.get("kind") == "rollback":
            self._keep_rolled_back(record.get("rollback") or 1, step)
            self._void(step)
        self.skips = record.get("skips") or self.skips
        if "loss" in record:
            self._void(step - 1)
            self._append([record])
            return
        if "val_loss" in record:
            self._void(step)
        if record.get("kind") == "hang":
            self._add_hang(record, step)
            return
        self._note_time(record)
        kind = self._event_kind(record)
        position = bisect.bisect_right(self.events, step, key=lambda event: event["step"])
        for index in range(position - 1, -1, -1):
            if self.events[index]["step"] != step:
                break
            if self._event_kind(self.events[index]) == kind:
                del self.events[index]
                position -= 1
                break
        self.events.insert(position, record)

    def _begin_life(self, record: dict[str, Any], step: int) -> None:
        time = record.get("time")
        time = float(time) if time is not None else (self.lives[-1].end if self.lives else math.nan)
        own = 0.0 if record.get("kind") == "start" else self._own_seconds(record)
        start, launched = time - own, record.get("launched")
        if launched is not None and not launched > start:  # the processes were there before their first record
            start = max(float(launched), self.lives[-1].end if self.lives else float(launched))
        self.lives.append(Life(step, start, time, record.get("world_size")))

    def _note_time(self, record: dict[str, Any]) -> None:
        time: Any = record.get("time")
        if not fits("time", time):
            return
        life = self.lives[-1]
        if life.starting_seconds is None:
            life.starting_seconds = max(0.0, time - life.start - self._own_seconds(record))
        if not life.end >= time:
            life.end = float(time)

    def _void(self, step: int) -> None:
        """Drop every record of a later step."""
        keep = bisect.bisect_right(self._columns["step"], step)
        if keep < len(self):
            self.lost.steps += len(self) - keep
            self.lost.seconds += float(np.nansum(self.tail("step_seconds", len(self) - keep)))
            for column in (*self._columns.values(), *self._sources.values()):
                del column[keep:]
        while self.events and self.events[-1]["step"] > step:
            self.lost.seconds += self._own_seconds(self.events.pop())
        for hang in self.hangs:
            if hang.within and hang.step > step:  # its seconds are among those of the lost work
                self.lost.seconds = max(0.0, self.lost.seconds - hang.seconds)
                hang.within = ""

    def _add_hang(self, record: dict[str, Any], step: int) -> None:
        started = self.lives[-1].starting_seconds is not None  # else the start is counted up to this hang
        within = str(record.get("phase")) if record.get("continued") is True and started else ""
        self._note_time(record)
        hang = Hang(step, max(0.0, self._own_seconds(record)), within, float(record.get("time") or 0.0))
        if self.hangs and hang.is_of(self.hangs[-1]):
            self.hangs.pop()
        self.hangs.append(hang)

    def _keep_rolled_back(self, number: int, step: int) -> None:
        """Args: number: of the roll-back. One that was killed before its end is recorded again."""
        keep = bisect.bisect_right(self._columns["step"], step)
        parts = (np.array(self._columns[key][keep:], dtype=np.float64) for key in ("step", "tokens", "loss", "time"))
        self.rollbacks = [other for other in self.rollbacks if other.number != number]
        self.rollbacks.append(RolledBack(number, *parts))

    def _event_kind(self, record: dict[str, Any]) -> str:
        for curve in self.curves:
            if curve.figure in record:
                return curve.figure
        return str(record.get("kind"))

    def _own_seconds(self, record: dict[str, Any]) -> float:
        """How long the work took that a record is about."""
        for key in ("step_seconds", *self.curves.seconds, *SAVE_SECONDS, "hang_seconds"):
            if NUMBER.has(record.get(key)):
                return float(record[key])
        return 0.0


def read_metrics_table(path: Path) -> MetricsTable:
    """The whole of a metrics file; an empty table where there is none. Raises OSError where it can't be read."""
    table = MetricsTable(path)
    table.update()
    return table


def _parse(lines: bytes) -> list[dict[str, Any]]:
    """The JSON objects of whole lines; torn and foreign lines are passed over."""
    try:  # all at once takes two thirds of the time. A torn line leaves a brace open, which never fits a later one.
        found = from_json(b"[" + lines[:-1].replace(b"\n", b",") + b"]")
    except ValueError:
        found = [parse_line(line) for line in lines.splitlines()]
    return [record for record in found if isinstance(record, dict)]


def _as_numbers(key: str, values: list[Any]) -> Values:
    """A column's values, NaN for what is none of that key's."""
    field = FIELDS[key]
    if field.types.issuperset(set(map(type, values)) - {type(None)}):
        try:
            numbers = np.array(values, dtype=np.float64)
        except OverflowError:  # a whole number beyond all floats
            numbers = np.full(1, math.inf)
        if field.low is None or field.high is None or not np.any((numbers < field.low) | (numbers > field.high)):
            return numbers
    return np.array([value if field.has(value) else math.nan for value in values], dtype=np.float64)
