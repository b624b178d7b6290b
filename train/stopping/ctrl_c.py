"""Ctrl-C: an answer at once, and with a second one an end without a save.

A handler sets a flag and does nothing else, and Python calls it only between two of the main thread's instructions: not
during a long backward, nor while a rank waits for another. The words come from a thread, which Python wakes through a
file descriptor (`signal.set_wakeup_fd`) whatever the main thread does.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from common.errors import INTERRUPTED_STATUS

LAUNCHER_PID = "LONGHAUL_LAUNCHER_PID"  # set by train/launching/torchrun_agent.py for its workers
SAME_SECONDS = 0.5  # one Ctrl-C may come twice: from the launcher, and from a scheduler that signals the whole tree
AGAIN_SECONDS = 10.0  # a later Ctrl-C is another first one
AGAIN = f"again within {AGAIN_SECONDS:.0f} s"


class CtrlC:
    """Answers Ctrl-C on behalf of one rank.

    Attributes:
        doing: what the rank does about the first one, in words.
        drop: records that a second one has ended the run.
    """

    def __init__(self, *, speaks: bool) -> None:
        """Args: speaks: whether this rank is the one that prints."""
        self.doing: Callable[[], str] = lambda: "stopping before the first step"
        self.drop: Callable[[], object] = lambda: None
        self._speaks = speaks
        self._launched = LAUNCHER_PID in os.environ  # the launcher offers, counts and forwards a second one
        self._first: float | None = None

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Answer inside the block, where SIGINT has a handler. The main thread only."""
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        thread = threading.Thread(target=self._read, args=(reader,), name="ctrl-c", daemon=True)
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            writer.close()  # which ends the thread
            thread.join()
            reader.close()

    def _read(self, reader: socket.socket) -> None:
        while numbers := reader.recv(64):
            if signal.SIGINT in numbers and self.ends(time.monotonic()):
                self.drop()
                sys.stdout.flush()
                os._exit(INTERRUPTED_STATUS)  # the main thread may be inside anything

    def ends(self, now: float) -> bool:
        """Answer a Ctrl-C; return whether it ends the run at once. Args: now: in seconds, by any clock."""
        since = None if self._first is None else now - self._first
        if since is not None and since <= SAME_SECONDS:
            return False
        if since is not None and (self._launched or since <= AGAIN_SECONDS):
            return True
        self._first = now
        self._say(self.doing() if self._launched else f"{self.doing()}; Ctrl-C {AGAIN} drops it")
        return False

    def _say(self, text: str) -> None:
        if self._speaks:
            print(f"\n{text}", file=sys.stderr, flush=True)


def what_is_awaited(phase: str) -> str:
    """What a rank does about a first Ctrl-C. Args: phase: that it is in, as its heartbeat records it."""
    if phase == "training":
        return "saving at the end of this step"
    if phase == "saving":
        return "stopping when this save is complete"
    if phase in BEFORE_STEPS:
        return "stopping before the next step"
    return f"stopping, with what is trained saved, as soon as this is done: {phase}"


BEFORE_STEPS = ("starting", "warming up", "checking the machines")  # phases of a start
