"""Saving during a run: when a save is finished, what a failed one means, and which checkpoints are deleted."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from common.checkpoint_files import BadCheckpoint
from common.progress import format_bytes, format_duration
from train.checkpoints.background_write import write_failure
from train.checkpoints.check_weights import check_weights
from train.checkpoints.retention import delete, keep_weights, set_aside_expendable, set_aside_passed
from train.checkpoints.writer import CheckpointWriter, Saved
from train.errors import SaveFailed
from train.progress import Progress
from train.run.recorder import Recorder
from train.run.storage import RETRY_DELAYS
from train.settings.sections import CheckpointConfig


@dataclass
class CheckpointKeeper:
    """Saves a run's checkpoints and deletes those that are due. All ranks call its methods together."""

    folder: Path
    writer: CheckpointWriter
    config: CheckpointConfig
    facts: dict[str, Any]  # what every manifest records: model, tokenizer, data, configuration
    measured: Callable[[], dict[str, Any]]  # what it records besides: the latest validation loss
    recorder: Recorder
    resumed_from: Path | None
    scaler: torch.amp.GradScaler
    deletes: bool  # one rank's task
    suspected: Callable[[], list[int]] = list  # steps before which a checkpoint may soon be needed
    patience: Callable[[], float] = lambda: 60.0  # seconds that a last save may take with all its tries
    retry_delays: Sequence[float] = RETRY_DELAYS  # between the tries of a last save
    last_saved: Saved | None = None
    trouble: str = ""  # why the run's newest checkpoint is older than it should be
    _failures: int = 0  # in a row
    _blocked_seconds: float = 0.0
    _deletion: threading.Thread | None = field(default=None, repr=False)

    def flags(self) -> list[int]:
        """[this rank's share is not yet written, it failed]: for the vector that ranks agree on at a step's end."""
        return self.writer.flags()

    def settle(self, unwritten: int, failed: int) -> bool:
        """Publish a save whose shares are all written, by the flags that ranks agreed on; return whether one was.

        Raises SaveFailed if a share could not be written and checkpoint.on_failure is stop, or too many saves in a row
        have failed.
        """
        if self.writer.pending_step is None or (unwritten and not failed):
            return False
        if failed:
            self.writer.abandon()
        return self._finish(last_try=False)

    def save(self, progress: Progress, *, final: bool = False) -> bool:
        """Start to save the state after `progress`; return whether a checkpoint has been published when it returns.

        Args:
            final: the run ends here: wait for the save, which must succeed whatever checkpoint.on_failure is, and is
                tried several times where the file system fails for a moment. Does nothing where it is there already.

        Raises ReplicasDiffer where the ranks' weights are no longer the same, NonFiniteWeights where they are NaN or
        inf (nothing of this step is written then), and SaveFailed as `settle`.
        """
        if final:
            return self._save_last(progress)
        published = self.writer.pending_step is not None and self._finish(last_try=True)  # one at a time
        self._begin(progress)
        if not self.config.asynchronous:
            self.writer.wait()
            unwritten, failed = self.writer.ranks.agree(self.writer.flags())
            published = self.settle(unwritten, failed) or published
        return published

    def finish(self) -> None:
        """Publish what is still being written, if anything: the run ends for another reason."""
        if self.writer.pending_step is not None:
            self._finish(last_try=True, must_go_on=True)
        self._wait_for_deletion()

    def settle_before(self, step: int) -> None:
        """The run goes back behind `step`: publish a pending save from before it, and give up a later one."""
        pending = self.writer.pending_step
        if pending is not None and pending < step:
            self._finish(last_try=True, must_go_on=True)
        self.writer.discard()
        self._wait_for_deletion()
        self.last_saved = None

    def abandon(self) -> None:
        """Only this rank exits: leave a running save to be deleted by the next start."""
        self.writer.abandon()

    def _begin(self, progress: Progress) -> None:
        started = time.monotonic()
        check_weights(self.writer.ranks, self.writer.model)
        facts = {**self.facts, **self.measured(), "scaler": self.scaler.state_dict()}
        self._wait_for_deletion()  # which frees the space that was planned with
        self.writer.begin(progress, facts)
        self._blocked_seconds = time.monotonic() - started

    def _save_last(self, progress: Progress) -> bool:
        """Save and wait, in several tries; see `save`."""
        if self.last_saved is not None and self.last_saved.step == progress.step:
            self._wait_for_deletion()
            return False
        published = False
        if self.writer.pending_step not in (None, progress.step):
            published = self._finish(last_try=True, must_go_on=True)
        until = time.monotonic() + self.patience()
        for delay in (*self.retry_delays, None):
            if self.writer.pending_step is None:
                self._begin(progress)
            try:
                saved = self.writer.finish()
            except SaveFailed as failure:
                again = delay is not None and failure.transient and time.monotonic() + delay < until
                if not self.writer.ranks.from_first(again):
                    self._note_failure(failure, progress.step, "nothing is left to try")
                    raise
                assert delay is not None
                self._note_failure(failure, progress.step, f"trying again in {format_duration(delay)}")
                time.sleep(delay)
            else:
                assert saved is not None
                self._note_saved(saved)
                self._wait_for_deletion()
                return True
        return published

    def _finish(self, *, last_try: bool, must_go_on: bool = False) -> bool:
        """Publish the pending save if possible; return whether it was published."""
        started, step = time.monotonic(), self.writer.pending_step
        assert step is not None
        try:
            saved = self.writer.finish(last_try=last_try)
        except SaveFailed as failure:
            self._failures += 1
            may_fail = self.config.on_failure == "continue" and self._failures < self.config.max_failures
            if may_fail or must_go_on:
                tries = f"failed save {self._failures} of {self.config.max_failures} in a row"
                self._note_failure(failure, step, f"{tries}: training continues, the next save that is due tries again")
                return False
            self._note_failure(failure, step, "the run ends")
            raise SaveFailed(f"{failure}; {self._failures} saves in a row have failed") from None
        if saved is None:
            self.trouble = f"step {step} is not published yet: {self.writer.hiccup}"
            self.recorder.log(f"WARNING: {self.trouble}: trying again in a moment")
            return False
        self._blocked_seconds += time.monotonic() - started
        self._note_saved(saved)
        return True

    def _note_saved(self, saved: Saved) -> None:
        """Record a published checkpoint, and delete those that are due to go."""
        started = time.monotonic()
        self.last_saved, self.trouble, self._failures = saved, "", 0
        if self.deletes:
            self._tidy_up(saved)
        self._blocked_seconds += time.monotonic() - started
        record = {
            "kind": "save",
            "step": saved.step,
            "save_blocked_seconds": self._blocked_seconds,
            "save_seconds": saved.save_seconds,
            "save_bytes": saved.save_bytes,
            "time": time.time(),
        }
        self.recorder.note(record | ({"save_hiccups": len(saved.hiccups)} if saved.hiccups else {}))
        for hiccup in saved.hiccups:
            self.recorder.log(f"WARNING: step {saved.step} was saved only after another try: {hiccup}")
        self.recorder.log(
            f"saved {saved.path} ({format_bytes(saved.save_bytes)}, {format_duration(saved.save_seconds)}, training "
            f"waited {format_duration(self._blocked_seconds)})"
        )

    def _note_failure(self, failure: SaveFailed, step: int, what_now: str) -> None:
        """Report a failed save: in log and terminal, metrics, and (by `trouble`) `state`."""
        self.trouble = str(failure)
        record = {"kind": "save_failed", "step": step, "save_failure": str(failure), "time": time.time()}
        self.recorder.note(record)
        self.recorder.log(f"WARNING: {failure}; {what_now}")

    def _tidy_up(self, saved: Saved) -> None:
        """Keep weights for good, and delete checkpoints that are due. Failures here cost disk space, not training."""
        weights_every = self.config.weights_every_steps
        try:
            if weights_every > 0 and saved.step % weights_every == 0:
                keep_weights(saved.path, saved.step)
            due = set_aside_passed(self.folder, saved.step)
            due += set_aside_expendable(
                self.folder, self.config, last=saved.step, resumed_from=self.resumed_from, suspected=self.suspected()
            )
        except (OSError, BadCheckpoint) as error:
            why = write_failure(self.folder, error).message if isinstance(error, OSError) else error
            self.recorder.log(f"WARNING: {why}: old checkpoints are not deleted")
            return
        if due:  # removing large files takes a while on some file systems
            self._deletion = threading.Thread(target=delete, args=(due,), name="checkpoint deletion")
            self._deletion.start()

    def _wait_for_deletion(self) -> None:
        if self._deletion is not None:
            self._deletion.join()
            self._deletion = None
