"""Being asked to stop: a handler sets a flag, the ranks agree on it at the next step boundary, nothing else happens."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from common.run_folder import RunFolder

STOP_SIGNALS = [name for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)]
STOP_FILE = len(STOP_SIGNALS) + 1  # the code after the signals'


class StopRequest:
    """What has asked this rank to stop so far, as a code that ranks can compare: 0 is nothing."""

    def __init__(self, folder: RunFolder, *, watch_file: bool) -> None:
        self._stop_file = folder.stop_file
        self._watch_file = watch_file
        self._code = 0

    def code(self) -> int:
        """0, or the number that `reason` explains. The rank that watches the folder looks for the STOP file."""
        if self._code == 0 and self._watch_file and self._stop_file.exists():
            self._code = STOP_FILE
        return self._code

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the stop signals inside the block. A second Ctrl-C interrupts at once."""
        before = {name: signal.signal(getattr(signal, name), self._handle) for name in STOP_SIGNALS}
        try:
            yield
        finally:
            for name, handler in before.items():
                signal.signal(getattr(signal, name), handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._code:
            raise KeyboardInterrupt
        self._code = self._code or 1 + STOP_SIGNALS.index(signal.Signals(number).name)


def reason(code: int) -> str:
    """The words for a code that ranks agreed on."""
    return "STOP file" if code == STOP_FILE else STOP_SIGNALS[code - 1]
