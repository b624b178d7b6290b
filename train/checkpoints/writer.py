"""Saving a run: each rank writes the tensors it owns, then comes the manifest, then the folder gets its name.

Tensors are keyed by parameter name in safetensors files, weights apart from optimizer state, so that any number of
ranks reads what any other number wrote, and an evaluation reads only the weights.
"""

import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.checkpoint_files import (
    BadCheckpoint,
    checkpoint_name,
    verify_checkpoint,
    write_checkpoint_manifest,
)
from common.checkpoint_manifest import optimizer_facts
from common.publish import TEMPORARY_SUFFIX, fsync_folder, publish_folder
from common.version import VERSION
from model.ranks import Ranks
from train.checkpoints import snapshot
from train.checkpoints.background_write import BackgroundSave, ShareWritten, WriteFailure, write_failure
from train.checkpoints.ownership import OPTIMIZER, checkpoint_bytes, expected_names, owned_by, share_of
from train.errors import LockLost, SaveFailed
from train.optimization.optimizer_state import state_of
from train.optimization.weight_average import WeightAverage
from train.progress import Progress
from train.run.lock import why_lost
from train.run.storage import RETRY_DELAYS


@dataclass(frozen=True)
class Saved:
    """A published checkpoint. save_seconds: from the snapshot to the rename, without waiting for a step's end.

    hiccups: why some of it was tried more than once.
    """

    path: Path
    step: int
    save_seconds: float
    save_bytes: int
    hiccups: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Pending:
    """A save whose snapshot is taken. hiccups: of publishing it, which is not tried again before `not_before`."""

    step: int
    temporary: Path
    facts: dict[str, Any]
    snapshot_seconds: float
    writing: BackgroundSave
    hiccups: tuple[str, ...] = ()
    not_before: float = 0.0  # time.monotonic()


class CheckpointWriter:
    """Saves one run's checkpoints into `folder`, one at a time. All ranks call `begin`, `finish` and `save` together.

    A save is a snapshot (`begin`), which training waits for, then a thread on every rank that writes its share, then
    `finish`: the manifest and the rename, once all ranks know that all shares are there.
    """

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        still_mine: Callable[[], bool] = lambda: True,
        sync_record: Callable[[], None] = lambda: None,
        retry_delays: Sequence[float] = RETRY_DELAYS,
        average: WeightAverage | None = None,
    ) -> None:
        """Made on every rank.

        Args:
            still_mine: called on rank 0 before every publishing: whether the run is still this trainer's.
            sync_record: called on rank 0 before that: syncs records that a checkpoint must not outlive.
            retry_delays: seconds until each further try, of a file or of publishing, where the file system fails for a
                moment. An OSError of the two above counts as the file system's.
        """
        self._folder = folder
        self.ranks = ranks
        self.model = model
        self.optimizer = optimizer
        self.average = average
        self.still_mine = still_mine
        self._sync_record = sync_record
        self._retry_delays = retry_delays
        self._mine = owned_by(ranks.rank, ranks.world_size, model, optimizer)
        self._buffers: snapshot.Buffers = {}
        self._pending: _Pending | None = None

    @property
    def pending_step(self) -> int | None:
        """The step whose checkpoint is being written."""
        return self._pending.step if self._pending else None

    def flags(self) -> list[int]:
        """[share not written yet, or publishing has to wait; share failed], this rank's for the agreed vector."""
        if self._pending is None:
            return [0, 0]
        writing = self._pending.writing
        return [int(not writing.done or time.monotonic() < self._pending.not_before), int(writing.failed)]

    def begin(self, progress: Progress, facts: dict[str, Any]) -> None:
        """Take the snapshot and start to write it. An earlier save must be finished.

        Args:
            facts: what else the manifest records (model, tokenizer, data, configuration, …), as of now.
        """
        assert self._pending is None, "a save is still being written"
        started = time.monotonic()
        # a name unique to this save, whoever else believes to own the run; the threads make the folder
        token = self.ranks.from_first(uuid.uuid4().hex[:8])
        folder = self._folder / f".{checkpoint_name(progress.step)}.{token}{TEMPORARY_SUFFIX}"
        snapshot.take(share_of(self._mine, self.model, self.optimizer, self.average), self._buffers)
        suffix = f"{self.ranks.rank:05d}-of-{self.ranks.world_size:05d}.safetensors"
        files = {f"{kind}-{suffix}": tensors for kind, tensors in self._buffers.items()}
        writing = BackgroundSave(folder, files, self._retry_delays)
        facts = {**facts, **vars(progress), **(self.average.facts() if self.average is not None else {})}
        self._pending = _Pending(progress.step, folder, facts, time.monotonic() - started, writing)

    def wait(self) -> None:
        """Until this rank's share is written, has failed, or has to wait for the file system."""
        if self._pending is not None:
            self._pending.writing.wait()

    def finish(self, *, last_try: bool = True) -> Saved | None:
        """Wait for this rank's share, then for all; publish.

        Args:
            last_try: the save can't stay pending any longer.

        Returns None (on all ranks) where the file system failed for a moment: the save stays pending, and `flags` shows
        when to try again.

        Raises SaveFailed or LockLost on all ranks, with the first reason: nothing is published then.
        """
        pending = self._pending
        assert pending is not None, "nothing is being saved"
        shares: list[ShareWritten] = self.ranks.gather(pending.writing.result(), ShareWritten, WriteFailure)
        outcome: Saved | WriteFailure | SaveFailed | LockLost | None = None
        if self.ranks.is_first:
            failures = [share.failure for share in shares if share.failure is not None]
            # a share that was given up because of another's failure is not the reason
            failures.sort(key=lambda failure: failure.given_up)
            outcome = failures[0] if failures else self._publish(pending, shares)
            tries_left = not failures and not last_try and len(pending.hiccups) < len(self._retry_delays)
            if isinstance(outcome, WriteFailure) and not (tries_left and outcome.transient):
                outcome = self._give_up(pending, outcome)
        outcome = self.ranks.from_first(outcome, Saved, WriteFailure, SaveFailed, LockLost)
        self._pending = None
        if isinstance(outcome, WriteFailure):
            delay = self._retry_delays[len(pending.hiccups)]
            hiccups = (*pending.hiccups, outcome.message)
            self._pending = replace(pending, hiccups=hiccups, not_before=time.monotonic() + delay)
            return None
        if isinstance(outcome, Exception):
            raise outcome
        assert outcome is not None
        return outcome

    @property
    def hiccup(self) -> str:
        """Why the pending save could not be published yet; "" where nothing is known."""
        return self._pending.hiccups[-1] if self._pending and self._pending.hiccups else ""

    def save(self, progress: Progress, facts: dict[str, Any]) -> Path:
        """`begin` and `finish` in one; return the checkpoint's folder."""
        self.begin(progress, facts)
        saved = self.finish()
        assert saved is not None
        return saved.path

    def abandon(self) -> None:
        """Stop after the current file. Called by a rank that is about to exit."""
        if self._pending is not None:
            self._pending.writing.abandon()

    def discard(self) -> None:
        """Give the pending save up and delete what of it is written. All ranks call."""
        pending = self._pending
        if pending is None:
            return
        pending.writing.abandon()
        pending.writing.result()
        self.ranks.barrier()  # nobody writes into it any more
        if self.ranks.is_first:
            shutil.rmtree(pending.temporary, ignore_errors=True)
        self._pending = None

    def _publish(self, pending: _Pending, shares: list[ShareWritten]) -> Saved | WriteFailure | LockLost:
        """Manifest, then name, if the run is still ours. (Rank 0.)"""
        started = time.monotonic()
        files = {name: entry for share in shares for name, entry in share.files.items()}
        final = self._folder / checkpoint_name(pending.step)
        if problem := self._wrong_names(shares):
            return WriteFailure(problem)
        try:
            self._sync_record()
        except OSError as error:
            return write_failure(Path(error.filename or self._folder.parent), error)
        try:
            if not self.still_mine():
                return LockLost(f"step {pending.step} is not published: {why_lost(self._folder.parent)}")
            if pending.hiccups and not pending.temporary.exists() and _holds(final, files):
                fsync_folder(self._folder)  # the last try did rename it, though it failed
            else:
                own = {**optimizer_facts(state_of(self.optimizer).name), "version": VERSION, "files": files}
                write_checkpoint_manifest(pending.temporary, {**own, **pending.facts})
                _put_in_place(pending.temporary, final)
        except OSError as error:
            return write_failure(final, error)
        seconds = pending.snapshot_seconds + max(share.seconds for share in shares) + time.monotonic() - started
        hiccups = (*(message for share in shares for message in share.hiccups), *pending.hiccups)
        return Saved(final, pending.step, seconds, sum(entry["bytes"] for entry in files.values()), hiccups)

    def _wrong_names(self, shares: list[ShareWritten]) -> str:
        """What is missing from all shares together, or is in two of them: such a checkpoint could never be read."""
        for kind, expected in expected_names(self.model, self.optimizer, self.average).items():
            found = [
                name for share in shares for file in share.names if _is_of(kind, file) for name in share.names[file]
            ]
            if not found and kind == OPTIMIZER:
                continue  # no rank has updated anything yet
            for name in sorted(expected ^ set(found)) or sorted(name for name in found if found.count(name) > 1):
                where = "no rank's" if name not in found else "several ranks'" if name in expected else "a rank's"
                return f"{name} is in {where} share of the {kind}"
        return ""

    def _give_up(self, pending: _Pending, failure: WriteFailure) -> SaveFailed:
        """Delete what was written and explain. (Rank 0.)"""
        shutil.rmtree(pending.temporary, ignore_errors=True)
        return SaveFailed(self._explain(pending.step, failure), transient=failure.transient)

    def _explain(self, step: int, failure: WriteFailure) -> str:
        room = ""
        if failure.no_room:
            needed, _ = checkpoint_bytes(self.model, self.optimizer, self.average)
            try:
                room = f"; a checkpoint needs {needed:,} bytes, and {shutil.disk_usage(self._folder).free:,} are free"
            except OSError:
                room = f"; a checkpoint needs {needed:,} bytes"
        return f"step {step} could not be saved: {failure.message}{room} (earlier checkpoints are intact)"


def _is_of(kind: str, file: str) -> bool:
    return file.startswith(f"{kind}-")


def _put_in_place(temporary: Path, final: Path) -> None:
    """Give a finished checkpoint its name. What has that name (the run went back before this step) is moved away."""
    aside = None
    if final.exists():
        whole = _is_whole(final)
        name = f"{final.name}.{'replaced' if whole else 'damaged'}-{uuid.uuid4().hex[:8]}"
        damaged_or_old = final.rename(final.with_name(name))
        aside = damaged_or_old if whole else None  # what can't be read is kept
    publish_folder(temporary, final)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def _holds(checkpoint: Path, files: dict[str, Any]) -> bool:
    """Whether these very files are published there."""
    try:
        return bool(verify_checkpoint(checkpoint, hashes=False)["files"] == files)
    except BadCheckpoint:
        return False


def _is_whole(checkpoint: Path) -> bool:
    try:
        verify_checkpoint(checkpoint)
    except BadCheckpoint:
        return False
    return True
