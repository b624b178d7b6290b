"""What a run says of itself in `state` while it holds the run's lock, and how the word of several ranks is weighed."""

import contextlib
import sys
import time
from dataclasses import dataclass

from common.checkpoint_files import BadCheckpoint, list_checkpoints, read_checkpoint_manifest
from common.errors import UserError
from common.run_folder import Failure, RunFolder, Status, Stop
from train.checkpoint import Progress
from train.run_lock import RunLock


@dataclass
class RunState:
    """Writes `state`. Each rank has one: rank 0 writes while all goes well, any rank may report a failure."""

    folder: RunFolder
    lock: RunLock
    world_size: int
    start: Progress  # where this start of the trainer began
    _running: bool = False  # this start has said that it runs

    def write(self, status: Status, reason: str, progress: Progress, stop: Stop | None = None) -> None:
        """Replace the `state`, unless another trainer has taken the run over: then it is that one's.

        Raises UserError where a run that has ended can't say so. That a running one can't costs no step.
        """
        if not self.lock.still_mine():
            return
        if status == "running":
            # rank 0 may be a step behind a rank that has failed since: that one's word stays
            if self._running and (self.folder.read_state() or {}).get("status") == "failed":
                return
            self._running = True
        try:
            self.folder.write_state(
                status,
                reason=reason,
                step=progress.step,
                tokens=progress.tokens,
                started_step=self.start.step,
                world_size=self.world_size,
                stop=stop,
            )
        except OSError as error:
            why = f"{self.folder.state} can't be written: {error.strerror}"
            if status != "running":
                raise UserError(f"{why}: the same command goes on from the newest checkpoint") from None
            print(f"WARNING: {why}", file=sys.stderr, flush=True)

    def write_done_before(self) -> None:
        """Say of a run that needs no more steps that it is done, should it have died after its last save."""
        if (self.folder.read_state() or {}).get("status") != "done":
            self.write("done", "all steps done", self.start)

    def write_failure(self, failure: Failure, reason: str, *, certain: bool = True) -> bool:
        """Record a failure and where the run would go on; return whether this was the word that counts.

        An error of a rank's own explains why its peers saw it vanish, never the other way round; and who knows which
        rank vanished (`certain`) knows more than who only saw that one has.
        """
        if self.lock.overtaken():
            return False
        said = self.folder.read_state() or {}
        if said.get("status") == "failed" and (failure == "lost_rank" or said.get("failure") == "exception"):
            better = certain and said.get("failure") == "lost_rank" and said["reason"].startswith(UNCERTAIN)
            if not better:
                return False
        self._write_failed(failure, reason)
        until = time.monotonic() + SETTLE_SECONDS
        while failure == "exception" and time.monotonic() < until:
            time.sleep(SETTLE_SECONDS / 10)
            if (self.folder.read_state() or {}).get("status") == "running":  # rank 0 was in the middle of saying so
                self._write_failed(failure, reason)
        return True

    def _write_failed(self, failure: Failure, reason: str) -> None:
        saved = self._saved()
        with contextlib.suppress(OSError):  # a full disk: the reason is told on the terminal alone
            self.folder.write_state(
                "failed",
                reason=reason,
                step=saved.step,
                tokens=saved.tokens,
                started_step=self.start.step,
                world_size=self.world_size,
                failure=failure,
            )

    def _saved(self) -> Progress:
        """What the newest checkpoint holds, or where this start began."""
        for step, path in list_checkpoints(self.folder.checkpoints):
            try:
                return Progress(step, read_checkpoint_manifest(path)["tokens"])
            except (BadCheckpoint, KeyError, OSError):
                continue
        return self.start


UNCERTAIN = "a rank vanished"
SETTLE_SECONDS = 1.0  # how long a write of `state` that another rank has begun may take to appear
