"""An entry of the project on one terminal that is its own, as a person has it: what is typed, and what is shown."""

import fcntl
import multiprocessing
import os
import pty
import select
import struct
import termios
import time
from pathlib import Path
from types import TracebackType

from tests.helpers.ranks import _CONTEXT, _PRELOADED
from tests.helpers.terminal import COLUMNS, PATIENCE_SECONDS, ROWS, be_the_entry

CTRL_C, CTRL_D, UP = b"\x03", b"\x04", b"\x1b[A"


class TerminalSession:
    """`python ARGUMENTS` from `folder`; its terminal sends it SIGINT for Ctrl-C, as it controls it."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        _CONTEXT.set_forkserver_preload(_PRELOADED)
        self._outer, self._inner = pty.openpty()
        fcntl.ioctl(self._inner, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        name = os.ttyname(self._inner)
        self._process: multiprocessing.process.BaseProcess = _CONTEXT.Process(
            target=_on_its_terminal, args=(arguments, folder, name)
        )
        self._process.start()
        self.shown = b""
        self._place = 0  # up to where `until` has looked

    def __enter__(self) -> "TerminalSession":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.join()
        os.close(self._outer)
        os.close(self._inner)

    def type(self, keys: str | bytes) -> None:
        os.write(self._outer, keys.encode() if isinstance(keys, str) else keys)

    def until(self, text: str) -> str:
        """What is shown from here up to and with this text. Raises AssertionError where it does not come."""
        wanted, until = text.encode(), time.monotonic() + PATIENCE_SECONDS
        while (found := self.shown.find(wanted, self._place)) < 0:
            assert time.monotonic() < until, f"{text!r} does not come: {self.shown[-200:]!r}"
            self._read(self.shown[self._place :])
        start, self._place = self._place, found + len(wanted)
        return self.shown[start : self._place].decode(errors="replace")

    def until_it_waits(self) -> None:
        """Until its main thread sleeps, as it does at a prompt.

        GNU readline under Python loses a signal that comes between what it shows and its wait for a key; nobody types
        as fast, but a test does.
        """
        stat = Path(f"/proc/{self._process.pid}/stat")
        while stat.read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "S":
            time.sleep(0.005)

    def status(self) -> int:
        """How it ended. Raises AssertionError where it does not."""
        while self._process.is_alive():
            self._read(b"its end")
        assert self._process.exitcode is not None
        return self._process.exitcode

    def _read(self, what: bytes) -> None:
        until = time.monotonic() + PATIENCE_SECONDS
        ready, _, _ = select.select([self._outer, self._process.sentinel], [], [], until - time.monotonic())
        assert ready, f"nothing more is shown: {what!r}"
        if self._outer in ready:
            self.shown += os.read(self._outer, 1 << 16)
        else:
            assert what == b"its end", f"it ended after: {what!r}"
            self._process.join()


def _on_its_terminal(arguments: list[str], folder: Path, name: str) -> None:
    os.setsid()
    os.dup2(os.open(name, os.O_RDWR), 0)  # the first terminal that a session's leader opens controls it
    be_the_entry(arguments, folder, [name, name])
