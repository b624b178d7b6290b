"""One start of a trainer: its processes, what its ranks report, and how it ended."""

import json
import os
import select
import shlex
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.chaos import preloaded
from tests.chaos.marks import OwnMark, kill_marked, marked, send
from tests.chaos.phases import BROKEN_HOOK_STATUS, MARK_VARIABLE, SOCKET_VARIABLE, TRAP_VARIABLE, Trap


class HarnessBroken(Exception):
    """The harness itself no longer fits the trainer."""


@dataclass(frozen=True)
class Event:
    """kind: hello and reached (a rank tells), left (a rank's connection ended), ended (the launcher has)."""

    kind: str
    rank: int = -1
    step: int = 0
    phase: str = ""


class Trainer:
    """Processes started by one command, until all of them are gone."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        mark: str,
        output: Path,
        trap: Trap | None = None,
        environment: dict[str, str] | None = None,
        forked: OwnMark | None,
    ) -> None:
        """Start `python arguments…`: by fork where `forked` is given, else by exec."""
        self.mark = mark
        self.output = output
        self.pids: dict[int, int] = {}  # of ranks
        self.status: int | None = None  # the launcher's, negative for a signal, as subprocess counts
        self.started, self.started_time = time.monotonic(), time.time()
        self._events: deque[Event] = deque()
        self._ranks: dict[socket.socket, int] = {}
        self._buffers: dict[socket.socket, bytes] = {}
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(f"\0longhaul-chaos-{os.getpid()}-{mark}")
        self._listener.listen()
        variables = {
            **os.environ,
            MARK_VARIABLE: mark,
            TRAP_VARIABLE: trap.to_json() if trap else "",
            SOCKET_VARIABLE: f"longhaul-chaos-{os.getpid()}-{mark}",
            "PYTHONFAULTHANDLER": "",
            **(environment or {}),
        }
        output.write_text(f"$ {shlex.join(['python', *arguments])}\n")
        if forked is not None:
            self.pid = preloaded.start(arguments, variables, output, forked)
        else:
            self.pid = _execute(arguments, variables, output)
        self._launcher = os.pidfd_open(self.pid)

    def next_event(self, seconds: float) -> Event | None:
        """The next thing that happens, or None if nothing does for so long."""
        deadline = time.monotonic() + seconds
        while not self._events:
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            waiting: list[Any] = [self._listener, *self._ranks_open]
            if self.status is None:
                waiting.append(self._launcher)
            for ready in select.select(waiting, [], [], left)[0]:
                self._take(ready)
        return self._events.popleft()

    @property
    def _ranks_open(self) -> list[socket.socket]:
        return list(self._buffers)

    def _take(self, ready: Any) -> None:
        if ready is self._listener:
            connection, _ = self._listener.accept()
            self._buffers[connection] = b""
        elif ready == self._launcher:
            self._reap()
        else:
            try:
                data = ready.recv(4096)
            except ConnectionResetError:
                data = b""
            if not data:
                del self._buffers[ready]
                self._events.append(Event("left", self._ranks.get(ready, -1)))
                return
            *lines, self._buffers[ready] = (self._buffers[ready] + data).split(b"\n")
            for line in lines:
                self._hear(ready, json.loads(line))

    def _hear(self, connection: socket.socket, message: dict[str, Any]) -> None:
        rank = message["rank"]
        self._ranks[connection] = rank
        self.pids[rank] = message["pid"]
        self._events.append(Event(message["event"], rank, message.get("step", 0), message.get("phase", "")))

    def _reap(self) -> None:
        _, status = os.waitpid(self.pid, 0)
        self.status = os.waitstatus_to_exitcode(status)
        os.close(self._launcher)
        self._events.append(Event("ended"))
        if self.status == BROKEN_HOOK_STATUS or "a trap can't be laid any more" in self.said():
            raise HarnessBroken(self.said().splitlines()[-1])

    def go_on(self) -> None:
        """Let every rank that waits at its trap go on."""
        for connection in self._buffers:
            try:
                connection.sendall(b"go\n")
            except OSError:  # it was killed while it waited
                continue

    def wait_until_gone(self, seconds: float) -> dict[int, str]:
        """Wait for the end of launcher and all descendants; return those still alive after so long."""
        deadline = time.monotonic() + seconds
        while self.status is None and (left := deadline - time.monotonic()) > 0:
            self.next_event(left)
        while (alive := marked(self.mark)) and time.monotonic() < deadline:
            self.next_event(0.05)
        return alive

    def kill(self, targets: Sequence[int] | None = None) -> None:
        """SIGKILL some processes, or everything that belongs to this start."""
        if targets is None:
            kill_marked(self.mark)
        else:
            for pid in targets:
                send(pid, signal.SIGKILL)

    def agent(self) -> int:
        """The process id of torchrun, which may be a child of the launcher or the launcher itself."""
        for pid in marked(self.mark):
            try:
                if _parent(pid) == self.pid and pid not in self.pids.values():
                    return pid
            except OSError:
                continue
        return self.pid

    def said(self) -> str:
        """Everything on standard output and error so far."""
        return self.output.read_text(errors="replace")

    def close(self) -> None:
        """End what is left, quietly."""
        kill_marked(self.mark)
        while self.status is None:
            self.next_event(1.0)
        for connection in [self._listener, *self._buffers]:
            connection.close()
        self._buffers.clear()


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _execute(arguments: Sequence[str], environment: dict[str, str], output: Path) -> int:
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDONLY)
    actions = [(os.POSIX_SPAWN_DUP2, null, 0), *((os.POSIX_SPAWN_DUP2, descriptor, number) for number in (1, 2))]
    try:
        command = [sys.executable, *arguments]
        return os.posix_spawn(sys.executable, command, environment, file_actions=actions, setsid=True)
    finally:
        os.close(descriptor)
        os.close(null)
