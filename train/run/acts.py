"""What a rank does at the moment, how much it has done, and how long such things take."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from common.hang_record import hang_record

HANG_SECONDS = 60.0  # without any progress, unless
HANG_TIMES = 5.0  # times the longest phase of this kind so far
FIRST_SECONDS = 1800.0  # are more; nothing is known of the first of a kind, nor of a compilation


class Acts:
    """A rank's own account, which its heartbeat writes down.

    Attributes:
        step: that is under way.
        phase: training, saving, validating …
        act: what is done at the moment, finer than the phase.
        compilations: that have ended.
        count: of acts that have been started, and of meetings within them. All ranks do the same in the same order: who
            has started fewer is behind.
        catch_up: notes a hang that has ended since the watching thread last looked; set by the hang watch.
    """

    def __init__(self, hang_seconds: float | None = None) -> None:
        """Args: hang_seconds: how long without progress is a hang; None: `patience_seconds` follows what was seen."""
        self.step = 0
        self.phase = self.act = "starting"
        self.count = 0
        self._pieces = 0  # of acts: ranks have different numbers of them
        self._hang_seconds = hang_seconds
        self._longest: dict[str, float] = {}  # seconds that a phase, or a step, has taken
        self._entered = time.monotonic()
        self._compiling = False
        self.compilations = 0
        self._hangs: deque[dict[str, Any]] = deque()
        self.catch_up: Callable[[], None] = lambda: None

    def enter(self, phase: str, *, step: int | None = None) -> None:
        """Start another phase, or another step of training."""
        now = time.monotonic()
        if self.count:  # what came before the first phase is of no kind that comes again
            self._longest[self.phase] = max(self._longest.get(self.phase, 0.0), now - self._entered)
        self._entered = now
        self.phase = phase
        self.step = self.step if step is None else step
        self.start(phase)

    def start(self, act: str) -> None:
        """Start another act of the phase, one that all ranks start."""
        self.act = act
        self.count += 1

    def meet(self) -> None:
        """Start to wait for the other ranks, within an act."""
        self.count += 1

    def get_on(self) -> None:
        """A piece of an act is done, such as one forward of a long evaluation."""
        self._pieces += 1

    def compiling(self) -> None:
        """A compilation starts, which may take as long as the first."""
        self._compiling = True

    def compiled(self) -> None:
        self._compiling = False
        self.compilations += 1
        self.get_on()

    def note_hang(self, step: int, phase: str, seconds: float) -> None:
        """All ranks have waited so long for one, and continue. From the thread that watches."""
        self._hangs.append(hang_record(step, phase, seconds, continued=True))

    def take_hangs(self) -> Iterator[dict[str, Any]]:
        """The records of the hangs since the last call."""
        while self._hangs:
            yield self._hangs.popleft()

    @property
    def progress(self) -> int:
        """A number that grows with all that is done."""
        return self.count + self._pieces

    @property
    def patience_seconds(self) -> float:
        """How long nothing may be done before that is a hang, after what such phases have taken so far."""
        if self._hang_seconds is not None:
            return self._hang_seconds
        longest = self._longest.get(self.phase)
        if longest is None or self._compiling:
            return FIRST_SECONDS
        return max(HANG_SECONDS, HANG_TIMES * longest)
