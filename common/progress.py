"""Progress of long work, and numbers as people read them."""

import math
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from tqdm import tqdm

from common.periodic import Periodic
from common.plain_text import bar_file, one_line

FIRST_SECONDS = 5.0  # until work says how long it still takes, and
LOOK_SECONDS = 1.0  # how often a thread looks whether it is time to
LINE_SECONDS = 10.0  # how often it does so then, where standard error is no terminal


class Bar(Protocol):
    """A progress bar, tqdm's or `LineBar`. Any thread may update it; whoever made it closes it."""

    n: Any
    total: Any

    def update(self, n: Any = 1) -> Any: ...
    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None: ...
    def clear(self) -> None: ...
    def close(self) -> None: ...
    def __enter__(self) -> "Bar": ...
    def __exit__(self, *_: Any) -> Any: ...


def progress_bar(
    total: int | None, unit: str, description: str, *, scale: bool = False, initial: int = 0, disable: bool = False
) -> Bar:
    """A bar with rate and ETA on standard error; in a log file a line every 10 seconds.

    `scale` writes large counts as 1.2M. The caller closes it (it is a context manager).
    """
    if not sys.stderr.isatty():
        return LineBar(total, unit, description, scale=scale, initial=initial, disable=disable)
    return tqdm(
        total=total,
        unit=unit,
        desc=one_line(description),
        unit_scale=scale,
        initial=initial,
        disable=disable,
        dynamic_ncols=True,
        mininterval=0.1,
        maxinterval=LINE_SECONDS,
        file=bar_file(),
    )


class ProgressLines:
    """How much of long work is done and how long the rest takes, in a line after 5 s and then every 10 s.

    Attributes:
        n: how much is done; total: of how much, None where that is not known.
    """

    def __init__(
        self, total: int | None, unit: str, description: str, show: Callable[[str], object], *, scale: bool = False
    ) -> None:
        """Args: show: gets the lines. scale: large counts are written as 1.2M; counts of unit "B" always as 1.2 MiB."""
        self.n = 0
        self.total = total
        self.shown = False  # whether any line was
        self._unit, self._description, self._show, self._scale = unit, one_line(description), show, scale
        self._initial = 0
        self._started = time.monotonic()
        self._next = self._started + FIRST_SECONDS
        self._lock = threading.Lock()

    def update(self, n: int = 1) -> None:
        """Count what has been done since the last call."""
        with self._lock:
            self.n += n
            now = time.monotonic()
            if now < self._next:
                return
            self._next, self.shown = now + LINE_SECONDS, True
            self._show(self.line(now))

    def line(self, now: float) -> str:
        """Args: now: by time.monotonic()."""
        seconds, done = now - self._started, self.n - self._initial
        parts = [f"{self._description}: {self._amount(self.n)}{self._of_total()}"]
        if done > 0 and seconds > 0:
            parts.append(f"{self._amount(done / seconds)}/s")
            if self.total is not None and self.total > self.n:
                parts.append(f"{format_duration((self.total - self.n) * seconds / done)} left")
        return ", ".join(parts)

    def _of_total(self) -> str:
        unit = (
            "" if self._unit == "B" else f" {self._unit}{'' if len(self._unit) < 4 or self._unit[-1] == 's' else 's'}"
        )
        return unit if self.total is None else f" of {self._amount(self.total)}{unit}"

    def _amount(self, number: float) -> str:
        if self._unit == "B":
            return format_bytes(number)
        return format_count(number) if self._scale or number != int(number) else f"{number:,.0f}"


class WaitingLines:
    """How long work has taken whose end can't be seen from inside, in a line after 5 s and then every 10 s.

    A context manager: a thread shows the lines meanwhile.
    """

    def __init__(
        self,
        description: str,
        so_far: Callable[[], str],
        show: Callable[[str], object],
        last_seconds: float | None = None,
    ) -> None:
        """Args: so_far: says what is done by now. show: gets the lines. last_seconds: what it took the last time."""
        self.shown = False  # whether any line was
        self._description, self._so_far, self._show = description, so_far, show
        self._last_seconds = last_seconds
        self._started = time.monotonic()
        self._next = self._started + FIRST_SECONDS

    def __enter__(self) -> "WaitingLines":
        self._watch = Periodic("waiting", LOOK_SECONDS, self._look, at_once=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._watch.stop()

    def _look(self) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next, self.shown = now + LINE_SECONDS, True
            self._show(self.line(now))

    def line(self, now: float) -> str:
        """Args: now: by time.monotonic()."""
        seconds, last = now - self._started, self._last_seconds
        parts = [f"{format_duration(seconds)} so far", self._so_far()]
        if last is not None:
            took = f"{format_duration(last)} the last time"
            parts.append(
                f"{format_duration(last - seconds)} left ({took})" if seconds < last else f"longer than {took}"
            )
        return f"{self._description}: {', '.join(filter(None, parts))}"


class LineBar(ProgressLines):
    """A progress bar for a log file: a line on standard error with the size of the work at once, then as above."""

    def __init__(
        self, total: int | None, unit: str, description: str, *, scale: bool, initial: int = 0, disable: bool = False
    ) -> None:
        self._silent, self._postfix = disable, ""
        super().__init__(total, unit, description, self._print, scale=scale)
        self.n = self._initial = initial
        self._print(f"{self._description}: {'…' if total is None else self._of_total().removeprefix(' of ')}")

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        """More words for the next lines."""
        self._postfix = s

    def clear(self) -> None:
        """Make room for other output, which lines don't stand in the way of."""

    def close(self) -> None:
        seconds = time.monotonic() - self._started
        self._print(f"{self._description}: {self._amount(self.n)}{self._of_total()} in {format_duration(seconds)}")
        self._silent = True

    def __enter__(self) -> "LineBar":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _print(self, line: str) -> None:
        if not self._silent:
            print(f"{line}, {self._postfix}" if self._postfix else line, file=sys.stderr, flush=True)


def format_duration(seconds: float) -> str:
    """12.3 s, 4 min 05 s, 3 h 07 min, 2 d 4 h; "unknown" for what isn't a time."""
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 60:
        return f"{seconds:.1f} s"
    total = round(seconds)
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    if total < 48 * 3600:
        return f"{total // 3600} h {total % 3600 // 60:02d} min"
    return f"{total // 86400} d {total % 86400 // 3600} h"


def format_count(number: float) -> str:
    """950, 12.3K, 124.4M, 10.0B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}" if float(number).is_integer() else f"{number:.1f}"


def format_bytes(number: float) -> str:
    """512 B, 1.5 MiB, 14.7 GiB."""
    for size, unit in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if abs(number) >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f} B"
