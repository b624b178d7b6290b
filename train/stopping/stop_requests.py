"""Stop requests: a handler sets a flag, the ranks agree on it at the next step boundary, nothing else happens."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from common.environment import whole_number
from common.periodic import Periodic
from common.run_folder import RunFolder, Stop
from train.stopping.ctrl_c import LAUNCHER_PID, CtrlC

STOP_SIGNALS = [name for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)]
STOP_FILE, DEADLINE, LAUNCHER = (len(STOP_SIGNALS) + number for number in (1, 2, 3))  # the codes after the signals'

LOOK_SECONDS = 1.0


class StopRequest:
    """What has requested a stop of this rank so far, as a code that ranks can compare: 0 is nothing."""

    def __init__(self, folder: RunFolder, *, watch_file: bool, deadline: Callable[[], bool] = lambda: False) -> None:
        """`deadline` answers whether it is time to stop; it is called at every step boundary and must not wait."""
        self._stop_file = folder.stop_file
        self._watch_file = watch_file
        self.deadline = deadline
        self.ctrl_c = CtrlC(speaks=watch_file)
        self._code = 0

    def code(self) -> int:
        """0, or the number that `reason` explains. The rank that watches the folder looks for the STOP file."""
        # os.path's exists is False, not an error, where a network file system fails for a moment
        if self._code == 0 and self._watch_file and os.path.exists(self._stop_file):
            self._code = STOP_FILE
        if self._code == 0 and self.deadline():
            self._code = DEADLINE
        return self._code

    def raise_flag(self, code: int) -> None:
        """Request a stop with this code, unless something else already has."""
        self._code = self._code or code

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the stop signals inside the block. A second Ctrl-C ends the process (`CtrlC`)."""
        before = {name: signal.signal(getattr(signal, name), self._handle) for name in STOP_SIGNALS}
        try:
            with self.ctrl_c.answering():
                yield
        finally:
            for name, handler in before.items():
                signal.signal(getattr(signal, name), handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.raise_flag(1 + STOP_SIGNALS.index(signal.Signals(number).name))


class LauncherWatch:
    """Requests a stop once torchrun, this worker's parent, is gone: nobody would start the other ranks again.

    As long as there is nothing to save (`lead_to` has not been called) the worker ends at once: it may be waiting for
    ranks that will never connect. Afterwards it saves at the next step boundary and exits, and ends at once if it does
    not get there in time.
    """

    def __init__(self) -> None:
        """Start watching; under no launcher there is nothing to watch."""
        self._stop: StopRequest | None = None
        self._seconds_to_leave: Callable[[], float] = lambda: 0.0
        self._gone_since: float | None = None
        self._watch: Periodic | None = None
        if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun's; a shell may exit, and its nohup'ed child continues
            self._parent = whole_number(LAUNCHER_PID, os.getppid())
            self._watch = Periodic("launcher", LOOK_SECONDS, self._look)

    def lead_to(self, stop: StopRequest, seconds_to_leave: Callable[[], float]) -> None:
        """From now on request a clean stop.

        Args:
            seconds_to_leave: how long a step and a save may take.
        """
        self._seconds_to_leave = seconds_to_leave
        self._stop = stop

    def close(self) -> None:
        if self._watch is not None:
            self._watch.stop()

    def _look(self) -> None:
        if os.getppid() == self._parent:
            return
        if self._stop is None:
            line = (
                f"ended before the start: the launcher, process {self._parent}, is gone (from a shell that was under "
                f"one: unset TORCHELASTIC_RUN_ID {LAUNCHER_PID})\n"
            )
            os.write(2, line.encode())
            os._exit(1)
        if self._gone_since is None:
            self._gone_since = time.monotonic()
            self._stop.raise_flag(LAUNCHER)
        if time.monotonic() - self._gone_since > self._seconds_to_leave():
            os._exit(1)  # a rank that hangs is useless, and holds the GPU


def remove_stop_file(path: Path) -> str:
    """Remove a STOP file that has been obeyed, or a folder of that name; return why it stays, or ""."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        try:
            path.rmdir()
        except OSError as why:
            reason = (why if path.is_dir() else error).strerror
            return f"{path} can't be removed ({reason}): as long as it is there, every start stops at once"
    return ""


def reason(code: int) -> str:
    """The reason for a code that ranks agreed on."""
    others = {STOP_FILE: "STOP file", DEADLINE: "deadline", LAUNCHER: "the launcher is gone"}
    return others.get(code) or STOP_SIGNALS[code - 1]


def kind(code: int) -> Stop:
    """The one word for a code that `state` has."""
    others: dict[int, Stop] = {STOP_FILE: "file", DEADLINE: "deadline", LAUNCHER: "launcher"}
    return others.get(code, "signal")
