"""Something small, repeated in the background."""

import threading
from collections.abc import Callable


class Periodic:
    """A daemon thread that calls `action` every `seconds` (and `at_once`), until `stop`.

    `action` must not raise: nobody would see it.
    """

    def __init__(self, name: str, seconds: float, action: Callable[[], None], *, at_once: bool = False) -> None:
        self._seconds = seconds
        self._action = action
        self._at_once = at_once
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread; the action does not run any more once this has returned."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        if self._at_once:
            self._action()
        while not self._ended.wait(self._seconds):
            self._action()
