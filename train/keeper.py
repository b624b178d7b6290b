"""Saving in the course of a run: when a save is settled, what a failed one means, and what goes to make room."""

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from common.progress import format_bytes, format_duration
from train.background_save import write_failure
from train.between import Validator
from train.checkpoint import CheckpointWriter, Progress, Saved, SaveFailed
from train.parallel import check_weights
from train.recorder import Recorder
from train.retention import delete, keep_weights, set_aside_expendable
from train.run_config import CheckpointConfig


@dataclass
class CheckpointKeeper:
    """Saves a run's checkpoints and deletes those that are due. All ranks call its methods together."""

    folder: Path
    writer: CheckpointWriter
    config: CheckpointConfig
    facts: dict[str, Any]  # what every manifest says: model, tokenizer, data, configuration
    validator: Validator
    recorder: Recorder
    resumed_from: Path | None
    scaler: torch.amp.GradScaler
    deletes: bool  # one rank's task
    last_saved: Saved | None = None
    _blocked_seconds: float = 0.0
    _deletion: threading.Thread | None = field(default=None, repr=False)

    def flags(self) -> list[int]:
        """[my share is not yet written, my share failed]: for the vector that ranks agree on at a step's end."""
        return self.writer.flags()

    def settle(self, unwritten: int, failed: int) -> bool:
        """Publish a save whose shares are all written, by the flags that ranks agreed on; return whether one was.

        Raises SaveFailed if a share could not be written and checkpoint.on_failure is stop.
        """
        if self.writer.pending_step is None or (unwritten and not failed):
            return False
        if failed:
            self.writer.abandon()
        return self._finish(must_succeed=False)

    def save(self, progress: Progress, *, final: bool = False) -> bool:
        """Begin to save the state after `progress`; return whether a checkpoint has been published by the end of it.

        Args:
            final: the run ends here: wait for the save, which must succeed whatever checkpoint.on_failure says.

        Raises:
            ReplicasDiffer, NonFiniteWeights: the ranks' weights are no longer the same, or no numbers; nothing of this
                step is written.
            SaveFailed: see `settle`.
        """
        if self.last_saved is not None and self.last_saved.step == progress.step:
            return False  # it is there
        if self.writer.pending_step == progress.step:
            return self._finish(must_succeed=final)
        published = self.writer.pending_step is not None and self._finish(must_succeed=False)
        started = time.monotonic()
        check_weights(self.writer.ranks, self.writer.model)
        facts = {**self.facts, **self.validator.facts(), "scaler": self.scaler.state_dict()}
        self._wait_for_deletion()  # which makes the room that was planned with
        try:
            self.writer.begin(progress, facts)
        except SaveFailed as failure:
            self._failed(failure, must_succeed=final)
            return published
        self._blocked_seconds = time.monotonic() - started
        if final or not self.config.asynchronous:
            published = self._finish(must_succeed=final)
        return published

    def finish(self) -> None:
        """Publish what is still being written, if anything: the run ends for another reason."""
        if self.writer.pending_step is not None:
            self._finish(must_succeed=False)
        self._wait_for_deletion()

    def abandon(self) -> None:
        """This rank goes, alone: leave a save that is under way to be swept by the next start."""
        self.writer.abandon()

    def _finish(self, *, must_succeed: bool) -> bool:
        started = time.monotonic()
        self.recorder.sync()
        try:
            saved = self.writer.finish()
        except SaveFailed as failure:
            self._failed(failure, must_succeed=must_succeed)
            return False
        self.last_saved = saved
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
        self.recorder.note(record)
        self.recorder.say(
            f"saved {saved.path} ({format_bytes(saved.save_bytes)}, {format_duration(saved.save_seconds)}, training "
            f"waited {format_duration(self._blocked_seconds)})"
        )
        if must_succeed:
            self._wait_for_deletion()
        return True

    def _failed(self, failure: SaveFailed, *, must_succeed: bool) -> None:
        if must_succeed or self.config.on_failure == "stop":
            raise failure
        self.recorder.say(f"WARNING: {failure}; training goes on, the next save that is due tries again")

    def _tidy_up(self, saved: Saved) -> None:
        """Weights for good, and checkpoints that are due to go. What fails here costs disk space and no training."""
        weights_every = self.config.weights_every_steps
        try:
            if weights_every > 0 and saved.step % weights_every == 0:
                keep_weights(saved.path, saved.step)
            due = set_aside_expendable(self.folder, self.config, last=saved.step, resumed_from=self.resumed_from)
        except OSError as error:
            self.recorder.say(f"WARNING: {write_failure(self.folder, error).message}: checkpoints are not tidied up")
            return
        if due:  # removing large files takes a while on some file systems
            self._deletion = threading.Thread(target=delete, args=(due,), name="checkpoint deletion")
            self._deletion.start()

    def _wait_for_deletion(self) -> None:
        if self._deletion is not None:
            self._deletion.join()
            self._deletion = None
