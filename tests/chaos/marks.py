"""Finding every process of one start, wherever it went: a variable in its environment, read from /proc."""

import ctypes
import os
import signal
import time
from pathlib import Path

from tests.chaos.phases import MARK_VARIABLE, NO_MARK

POLL_SECONDS = 0.05


def marked(mark: str) -> dict[int, str]:
    """Process ids and command lines of all living processes with this mark. Zombies have no environment."""
    wanted = f"{MARK_VARIABLE}={mark}".encode()
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found[int(folder.name)] = command.strip()
        except OSError:  # gone, or another user's
            continue
    return found


def wait_until_gone(mark: str, seconds: float) -> dict[int, str]:
    """Wait for the end of all processes with this mark; return those that are left."""
    deadline = time.monotonic() + seconds
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return left


def kill_marked(mark: str) -> None:
    """End everything with this mark at once."""
    while left := marked(mark):
        for pid in left:
            send(pid, signal.SIGKILL)
        time.sleep(POLL_SECONDS)


def send(pid: int, number: int) -> bool:
    """Send a signal; False if the process is gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


class OwnMark:
    """This process's mark as /proc shows it: the bytes that the kernel laid down at exec.

    A forked child keeps its parent's environment there, whatever it puts into os.environ; so it writes over them. The
    harness must have been started with `CHAOS_MARK` set to `NO_MARK`.
    """

    def __init__(self) -> None:
        libc = ctypes.CDLL(None)
        libc.getenv.restype = ctypes.c_void_p
        self._address = libc.getenv(MARK_VARIABLE.encode())
        assert self._address and ctypes.string_at(self._address).decode() == NO_MARK

    def write(self, mark: str) -> None:
        assert len(mark) == len(NO_MARK)
        ctypes.memmove(self._address, mark.encode(), len(mark))
