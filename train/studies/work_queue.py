"""Trains what a study lacks: runs as processes, so many at a time, each to its result file.

Nothing of it is kept in memory only. A run is done if it has a result file; if its folder says that it is done, that
file is made; if another process trains it, that one is waited for; otherwise it is started, and resumes. So the queue
may be killed at any moment and started again, and several queues may work on one study.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Protocol

from common.checkpoint_files import list_checkpoints
from common.errors import UserError
from common.liveness import look_at
from common.paths import PROJECT
from common.plain_text import one_line
from common.processes import ProcessIdentity
from common.rewritten_file import read_record
from common.run_folder import RunFolder
from eval.comparison.measured_runs import MeasuredRun
from train.studies.planning import PlannedRun, Planner, Waiting, plan
from train.studies.study_folder import StudyFolder

LOOK_SECONDS = 0.1
LOOK_ELSEWHERE_SECONDS = 2.0
MOST_RESTARTS = 2  # of a run that was killed and has saved nothing since
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, *((signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()))
LAST_BYTES = 4_000  # of a run's output, in which its error stands

Command = Callable[[PlannedRun, StudyFolder], list[str]]


@dataclass
class Slot:
    """Where one run is trained at a time: `environment` beside this process's own."""

    environment: dict[str, str]
    run: PlannedRun | None = None
    process: "subprocess.Popen[bytes] | None" = None  # None of a run that another queue has left behind
    claim: ExitStack = field(default_factory=ExitStack)
    saved_step: int = 0  # when it was started
    started: float = 0.0


class View(Protocol):
    """Shows how far the queue is."""

    def event(self, text: str) -> None: ...
    def show(self, queue: "WorkQueue") -> None: ...


def training_command(run: PlannedRun, folder: StudyFolder) -> list[str]:
    """train/pretrain.py, as a user would call it."""
    return [sys.executable, str(PROJECT / "train" / "pretrain.py"), *options_of(run, folder)]


def options_of(run: PlannedRun, folder: StudyFolder) -> list[str]:
    """A run's options of train/pretrain.py, its folder included."""
    return [*run.options, f"--run.root={folder.runs.resolve()}", f"--run.name={run.name}"]


@dataclass
class WorkQueue:
    """One study's. `work` returns when nothing is left to do, or a signal has stopped it."""

    planner: Planner
    folder: StudyFolder
    slots: Sequence[Slot]
    view: View
    keep_checkpoints: bool = False
    command: Command = training_command
    results: dict[str, MeasuredRun] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)  # in this start
    elsewhere: dict[str, float] = field(default_factory=dict)  # what others train, and when to look again
    runs: list[PlannedRun] = field(default_factory=list)
    waiting: list[Waiting] = field(default_factory=list)
    stopped_by: int = 0
    _restarts: dict[str, int] = field(default_factory=dict)

    def work(self) -> int:
        """Return the exit status: 0 if all runs are done, 1 if some have failed, 128 + the signal that stopped it."""
        before = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        try:
            self._replan()
            while self._turn():
                self.view.show(self)
                time.sleep(LOOK_SECONDS)
            self.view.show(self)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            for slot in self.slots:
                slot.claim.close()
        if self.stopped_by:
            return 128 + self.stopped_by
        return 1 if self.failed or self.waiting else 0

    @property
    def missing(self) -> list[PlannedRun]:
        """What has no result yet, being trained or not."""
        return [run for run in self.runs if run.name not in self.results and run.name not in self.failed]

    def _turn(self) -> bool:
        """One look at everything; whether there is anything left."""
        for slot in self.slots:
            if slot.run is not None and self._has_ended(slot):
                self._end(slot, slot.run)
        if self.stopped_by:
            return any(slot.process is not None for slot in self.slots)
        for slot in self.slots:
            if slot.run is None:
                self._fill(slot)
        return bool(self.missing)

    def _replan(self) -> None:
        """Find out what there is to do, now that there are other results."""
        while True:
            planned, self.waiting = plan(self.planner, self.results, self.failed)
            self.runs = in_turn(planned)
            new = {run.name: found for run in self.runs if run.name not in self.results
                   if (found := self.folder.read_result(run.name)) is not None}  # fmt: skip
            if not new:
                return
            self.results |= new
            for name in new:  # of a queue that was killed in between
                self.folder.clear(name, keep_checkpoints=self.keep_checkpoints)

    def _fill(self, slot: Slot) -> None:
        """Give a slot something to do, if there is anything."""
        taken = {other.run.name for other in self.slots if other.run is not None}
        for run in self.missing:
            if run.name in taken or self.elsewhere.get(run.name, 0.0) > time.monotonic():
                continue
            claim = ExitStack()
            if not claim.enter_context(self.folder.claim(run.name)):
                self._look_later(run.name)
            elif self._is_done_already(run):
                claim.close()
            else:
                slot.claim = claim
                self._start(slot, run)
                return
            claim.close()

    def _look_later(self, name: str) -> None:
        if name not in self.elsewhere:
            self.view.event(f"{name} is trained by another process: waiting for it")
        self.elsewhere[name] = time.monotonic() + LOOK_ELSEWHERE_SECONDS

    def _is_done_already(self, run: PlannedRun) -> bool:
        """Whether a run has ended meanwhile, as far as files show; its result is kept then."""
        if (found := self.folder.read_result(run.name)) is None:
            if self.folder.status(run.name) != "done":
                return False
            found = self.folder.harvest(run.name, keep_checkpoints=self.keep_checkpoints)
        self._keep(run, found)
        return True

    def _keep(self, run: PlannedRun, found: MeasuredRun) -> None:
        self.results[run.name] = found
        self.elsewhere.pop(run.name, None)
        if run.trial:
            self._replan()

    def _start(self, slot: Slot, run: PlannedRun) -> None:
        """Train a run in a slot, or wait there for the process that trains it already."""
        slot.run, slot.started = run, time.monotonic()
        if owner_of(self.folder.run(run.name)) is not None:
            self.view.event(f"{run.name} is still being trained by an earlier start: waiting for it")
            return
        self.folder.forget_failure(run.name)
        slot.saved_step = _saved_step(self.folder.run(run.name))
        output = self.folder.output_file(run.name)
        output.parent.mkdir(parents=True, exist_ok=True)
        with open(output, "ab") as file:
            slot.process = subprocess.Popen(
                self.command(run, self.folder),
                env=os.environ | slot.environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C is this process's, which passes it on
            )
        self.view.event(f"{run.name} started" + (f" from step {slot.saved_step:,}" if slot.saved_step else ""))

    def _has_ended(self, slot: Slot) -> bool:
        assert slot.run is not None
        if slot.process is not None:
            return slot.process.poll() is not None
        return owner_of(self.folder.run(slot.run.name)) is None

    def _end(self, slot: Slot, run: PlannedRun) -> None:
        """What became of a run whose process has ended."""
        process, folder = slot.process, self.folder.run(run.name)
        slot.run = slot.process = None
        try:
            status = self.folder.status(run.name)
            code = None if process is None else process.returncode
            if status == "done" and code in (None, 0):
                took = time.monotonic() - slot.started
                self._keep(run, self.folder.harvest(run.name, keep_checkpoints=self.keep_checkpoints))
                self.view.event(f"{run.name} done in {took:.0f} s")
            elif process is None or self.stopped_by:
                return  # it is missing, and will be started
            elif code and owner_of(folder) is not None:
                self._look_later(run.name)
            elif (status == "preempted" or (code is not None and code < 0)) and self._may_restart(run, slot):
                self.view.event(f"{run.name} was stopped from outside: it resumes")
            else:
                self._fail(run, self._why(run, status, code))
        except UserError as error:
            self._fail(run, str(error))
        finally:
            slot.claim.close()

    def _may_restart(self, run: PlannedRun, slot: Slot) -> bool:
        """A run that got on may be stopped as often as anyone likes."""
        if _saved_step(self.folder.run(run.name)) > slot.saved_step:
            self._restarts[run.name] = 0
        self._restarts[run.name] = self._restarts.get(run.name, 0) + 1
        return self._restarts[run.name] <= MOST_RESTARTS

    def _fail(self, run: PlannedRun, why: str) -> None:
        self.failed[run.name] = why
        self.folder.record_failure(run.name, why)
        self.view.event(f"{run.name} FAILED: {why}")
        if run.trial:
            self._replan()

    def _why(self, run: PlannedRun, status: str, code: int | None) -> str:
        if status == "failed":
            with suppress(UserError):
                return str((self.folder.run(run.name).read_state() or {}).get("reason") or "unknown")
        lines = _last_lines(self.folder.output_file(run.name))
        ended = f"killed by signal {-code}" if code is not None and code < 0 else f"it ended with status {code}"
        return one_line(f"{ended}: {lines[-1]}" if lines else ended)[:500]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Ask all runs to save and exit; again if it comes again."""
        self.stopped_by = number
        for slot in self.slots:
            if slot.process is not None and slot.process.poll() is None:
                slot.process.send_signal(signal.SIGTERM)
            elif slot.run is not None and (owner := owner_of(self.folder.run(slot.run.name))) is not None:
                with suppress(OSError):
                    os.kill(owner.pid, signal.SIGTERM)


def in_turn(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """Each once, trials first; then seed by seed, so that what is there early compares all variants."""
    order: dict[str, int] = {}
    once: dict[str, PlannedRun] = {}
    for run in runs:
        once.setdefault(run.name, run)
        order.setdefault(str(run.seed), len(order))
    return sorted(once.values(), key=lambda run: (not run.trial, order[str(run.seed)]))


def owner_of(folder: RunFolder) -> ProcessIdentity | None:
    """The living process that trains a run; None where there is none.

    One that can't be seen from here counts while it shows signs of life.
    """
    try:
        owner = ProcessIdentity.from_record(read_record(folder.lock) or {})
    except KeyError:
        return None
    if owner.is_here():
        return None if owner.is_gone() else owner
    return owner if look_at(folder, time.time()).verdict in ("running", "silent") else None


def _saved_step(folder: RunFolder) -> int:
    checkpoints = list_checkpoints(folder.checkpoints)
    return checkpoints[0][0] if checkpoints else 0


def _last_lines(path: os.PathLike[str]) -> list[str]:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - LAST_BYTES))
            return [line for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    except OSError:
        return []
