"""Names a worker that stands still where no other rank can: a single one, and all before they have met.

Once several ranks have met they watch each other (`train/run/hang_watch.py`), until they part. What is looked at here
is the process itself: stopped, or waiting for a disk, without any processor time in between.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from common.errors import UserError
from common.hang_record import append_last_hang
from common.metric_fields import is_step
from common.plain_text import one_line
from common.processes import node_name
from common.rewritten_file import read_record
from common.run_folder import RunFolder
from common.run_note import RunNote, read_note

LOOK_SECONDS = 5.0
STILL_SECONDS = 30.0
LIMIT_SECONDS = 600.0  # of a worker that has not read its configuration, and its `run.hang_limit_seconds`, yet
STANDING = {
    psutil.STATUS_STOPPED: "stopped",
    psutil.STATUS_TRACING_STOP: "stopped by a debugger",
    psutil.STATUS_DISK_SLEEP: "waiting for a disk",
}


@dataclass
class Standing:
    """A worker that has been found standing still: how, since when, at what processor time; whether it was named."""

    how: str
    since: float
    processor_seconds: float
    named: bool = False


class RankWatch:
    """Args: notes: the folder in which workers leave notes."""

    def __init__(self, notes: Path) -> None:
        self._notes = notes
        self._looked = time.monotonic()
        self._standing: dict[int, Standing] = {}  # by pid
        self._ended: set[int] = set()  # pids; one that waits for a disk dies only once it has got what it waits for

    def look(self, workers: Iterable[psutil.Process]) -> None:
        """Look at the workers, every few seconds; to be called more often."""
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        for worker in (worker for worker in workers if worker.pid not in self._ended):
            with contextlib.suppress(psutil.Error):  # it has ended since
                self._look_at(worker, now)

    def _look_at(self, worker: psutil.Process, now: float) -> None:
        note = read_note(self._notes, worker.pid)
        if note is not None and note["run"] is not None and note["world_size"] > 1:
            self._standing.pop(worker.pid, None)
            return
        how, times = STANDING.get(worker.status()), worker.cpu_times()
        used = times.user + times.system
        before = self._standing.get(worker.pid)
        if how is None or (before is not None and before.processor_seconds != used):
            if before is not None and before.named:
                self._tell(note, "the rank moves again")
                self._name(note, "")
            self._standing.pop(worker.pid, None)
        elif before is None:
            self._standing[worker.pid] = Standing(how, now, used)
        elif now - before.since >= STILL_SECONDS:
            self._report(worker, note, before, now - before.since)

    def _report(self, worker: psutil.Process, note: RunNote | None, standing: Standing, seconds: float) -> None:
        rank = note["rank"] if note else worker.environ().get("RANK", "?")
        who = f"rank {rank} on {os.uname().nodename} (pid {worker.pid}), {standing.how} for {seconds:.0f} s"
        if not standing.named:
            self._tell(note, f"WARNING: training hangs, and waits for: {who}")
        standing.named = True
        self._name(note, who)
        if seconds > (note["limit_seconds"] if note else LIMIT_SECONDS):
            self._end(worker, note, f"hung for {seconds:.0f} s: {who}", seconds)

    def _tell(self, note: RunNote | None, text: str) -> None:
        """A line on the terminal, and in the run's log once there is one."""
        print(text, file=sys.stderr, flush=True)
        if (folder := _run_of(note)) is not None:
            line = f"{time.strftime('%Y-%m-%d %H:%M:%S%z')} {one_line(text)}\n"
            with (
                contextlib.suppress(OSError),
                open(folder.log, "a", encoding="utf-8", errors="backslashreplace") as file,
            ):
                file.write(line)

    def _name(self, note: RunNote | None, suspect: str) -> None:
        if (folder := _run_of(note)) is not None:
            with contextlib.suppress(OSError, UserError):
                folder.name_suspect(suspect)

    def _record(self, note: RunNote | None, seconds: float) -> None:
        if note is not None and (folder := _run_of(note)) is not None:
            beat = read_record(folder.rank_file(note["rank"])) or {}
            step: Any = beat.get("step")
            if is_step(step):
                append_last_hang(folder, step, str(beat.get("phase")), seconds)

    def _end(self, worker: psutil.Process, note: RunNote | None, why: str, seconds: float) -> None:
        """Write into `state` that the run has hung, and kill the worker, which can't do so."""
        if (folder := _run_of(note)) is not None:
            with contextlib.suppress(OSError, UserError):
                folder.note_hang(why, node_name())
        self._tell(note, f"failed: {why}")
        self._record(note, seconds)
        self._ended.add(worker.pid)
        worker.kill()


def _run_of(note: RunNote | None) -> RunFolder | None:
    """The run that is the worker's own; None before and after that, when another trainer may have it."""
    return None if note is None or note["run"] is None else RunFolder(Path(note["run"]))
