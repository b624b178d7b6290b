"""What a run records in `state` while it holds the run's lock, and how the reports of several ranks are weighed."""

import contextlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from common.checkpoint_files import BadCheckpoint, list_checkpoints, read_checkpoint_manifest
from common.errors import UserError
from common.run_folder import Failure, RunFolder, Status, Stop
from train.errors import StorageFailed
from train.progress import Progress
from train.run.lock import RunLock


@dataclass
class RunState:
    """Writes `state`. Each rank has one: rank 0 writes while all goes well, any rank may report a failure."""

    folder: RunFolder
    lock: RunLock
    world_size: int
    start: Progress  # that at which this launch of the trainer started
    _running: bool = False  # this start has recorded that it runs

    def write(
        self, status: Status, reason: str, progress: Progress, stop: Stop | None = None, trouble: str = ""
    ) -> None:
        """Replace the `state`, unless another trainer has taken over the run: then it is that one's.

        Args:
            trouble: what currently can't be written.

        Raises StorageFailed where a run that has ended can't record it. For a running one that costs no step.
        """
        # rank 0 may be a step behind a rank that has failed since: that report stays, except at a new start
        yields = status == "running" and self._running
        try:
            if self.lock.still_mine():
                wanted = lambda: not (yields and self._has_failed())  # noqa: E731
                self._replace(status, reason, progress, stop=stop, trouble=trouble, wanted=wanted)
                self._running = True
        except OSError as error:
            why = f"{self.folder.state} can't be written: {error.strerror}"
            if status != "running":
                raise StorageFailed(f"{why}: run the same command again to resume from the newest checkpoint") from None
            print(f"WARNING: {why}", file=sys.stderr, flush=True)

    def write_done_before(self) -> None:
        """Record that a run that needs no more steps is done, in case it died after its last save."""
        if self.recorded().get("status") != "done":
            self.write("done", "all steps done", self.start)

    def write_dropped(self) -> str:
        """Record that a person has ended the running run without a save; return what that cost, "" if nothing ran."""
        with contextlib.suppress(OSError, UserError):  # a full disk: the same command resumes all the same
            if self.recorded().get("status") == "running" and self.lock.still_mine():
                saved = self._saved()
                reason = f"{DROPPED}, without a save: the same command resumes from step {saved.step}"
                self._replace("preempted", reason, saved, stop="signal")
                return reason
        return ""

    def name_suspect(self, suspect: str) -> None:
        """Write into the `state` of a running run whom it waits for; "": nobody. Where that fails the log has it."""
        with contextlib.suppress(OSError, UserError):
            if self.lock.still_mine():
                self.folder.name_suspect(suspect)

    def write_failure(self, failure: Failure, reason: str, *, certain: bool = True, culprit_node: str = "") -> bool:
        """Record a failure and where the run would resume; return True if this report was recorded.

        An error of a rank's own explains why its peers saw it vanish, never the other way round; so does a file
        system's, unless another rank's error is there; and who knows which rank vanished (`certain`) knows more than
        who only saw that one has.
        """

        def counts() -> bool:
            said = self.recorded()
            if said.get("status") == "preempted" and failure == "lost_rank":
                return False  # the others have left, as a person has asked them to
            if said.get("status") != "failed":
                return True
            weight, theirs = WEIGHT[failure], WEIGHT.get(str(said.get("failure")), 0)
            return weight > theirs or (weight == theirs == 0 and certain and said["reason"].startswith(UNCERTAIN))

        if self.lock.overtaken() or not counts():
            return False
        written = self._write_failed(failure, reason, culprit_node, counts)
        until = time.monotonic() + SETTLE_SECONDS
        while WEIGHT[failure] > 0 and time.monotonic() < until:
            time.sleep(SETTLE_SECONDS / 10)
            if counts():  # another rank had already asked, and was about to replace what it had found
                self._write_failed(failure, reason, culprit_node, counts)
        return written

    def _has_failed(self) -> bool:
        return self.recorded().get("status") == "failed"

    def recorded(self) -> dict[str, Any]:
        """What `state` holds; empty where it can't be read, as reporting a failure must not fail."""
        try:
            return self.folder.read_state() or {}
        except (OSError, UserError):
            return {}

    def _write_failed(self, failure: Failure, reason: str, culprit_node: str, counts: Callable[[], bool]) -> bool:
        try:
            found = {"failure": failure, "culprit_node": culprit_node}
            return self._replace("failed", reason, self._saved(), **found, wanted=counts)
        except OSError:  # a full disk: only the terminal shows the reason
            return True

    def _replace(self, status: Status, reason: str, progress: Progress, **more: Any) -> bool:
        """Write a `state`, with the keys that all of this start's have; return whether `wanted`. Raises OSError."""
        return self.folder.write_state(
            status,
            reason=reason,
            step=progress.step,
            tokens=progress.tokens,
            started_step=self.start.step,
            world_size=self.world_size,
            **more,
        )

    def _saved(self) -> Progress:
        """The progress of the newest checkpoint, or that at which this launch started."""
        with contextlib.suppress(OSError):
            for step, path in list_checkpoints(self.folder.checkpoints):
                with contextlib.suppress(BadCheckpoint, KeyError):
                    return Progress(step, read_checkpoint_manifest(path)["tokens"])
        return self.start


UNCERTAIN = "a rank vanished"
DROPPED = "SIGINT twice"
WEIGHT = {"exception": 3, "storage": 2, "lost_gpu": 2, "hung": 1, "lost_rank": 0}  # which report counts more
SETTLE_SECONDS = 1.0  # how long another rank may take from its last look at `state` to replacing it
