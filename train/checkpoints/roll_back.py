"""A run goes back to a checkpoint from before a spike, and continues past the data that it has read since.

The acts, in this order: a pending save is published (one from before the spike) or given up; checkpoints after the
chosen one are moved aside, the newest first; it is loaded; the roll-back is recorded; its manifest is published again,
with the position in the data as it is now. A run that is killed before the last of these resumes from a checkpoint of
before, comes to the same decision and does the same again.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.checkpoint_files import (
    BadCheckpoint,
    list_checkpoints,
    read_checkpoint_manifest,
    verify_checkpoint,
    write_checkpoint_manifest,
)
from common.checkpoint_manifest import CheckpointManifest
from common.os_errors import refusal
from common.version import VERSION
from model.ranks import agreed
from train.checkpoints.reader import load_loss_scale, load_on_all_ranks
from train.checkpoints.retention import set_aside_rolled_back
from train.checkpoints.saver import CheckpointKeeper
from train.errors import LockLost, StorageFailed, TooManySpikes
from train.progress import Progress
from train.run.lock import why_lost
from train.run.spikes import Spikes, Sustained

AS_SAVED = ("world_size",)  # of what a manifest records: what its loss scale belongs to


def roll_back(
    keeper: CheckpointKeeper, spikes: Spikes, found: Sustained, progress: Progress, *, earliest: int
) -> Progress:
    """Go back to the newest checkpoint from before the spike; return where the run continues. All ranks call.

    Args:
        spikes: has the checkpoint's trend when this returns, and one roll-back more.
        progress: of the step after which this was decided.
        earliest: step of the first checkpoint that will do: the schedule started again there.

    Raises TooManySpikes on all ranks where there is no such checkpoint, LockLost where the run is another trainer's,
    StorageFailed where its files can't be changed.
    """
    ranks, model, optimizer = keeper.writer.ranks, keeper.writer.model, keeper.writer.optimizer
    keeper.settle_before(found.first_step)
    checkpoint = agreed(ranks, lambda: newest_before(keeper.folder, found.first_step, earliest))
    if checkpoint is None:
        raise TooManySpikes(
            f"step {progress.step}: {found.why}, and no whole checkpoint is from before step {found.first_step}: lower "
            "optim.lr (--allow-change optim.lr), or save more often (checkpoint.every_steps)"
        )
    _require_lock(keeper)
    manifest = read_checkpoint_manifest(checkpoint)
    number = len(spikes.rollbacks) + 1
    agreed(ranks, lambda: _move_aside(keeper.folder, manifest["step"], number), StorageFailed)
    before = load_on_all_ranks(ranks, checkpoint, model, optimizer, keeper.writer.average)
    load_loss_scale(keeper.scaler, manifest, ranks.world_size)

    facts = {
        "rollback": number,
        "why": found.why,
        "first_step": found.first_step,
        "from_step": progress.step,
        "to_step": before.step,
        "sequences_from": before.sequences,
        "sequences_to": progress.sequences,
    }
    spikes.rollbacks.append(facts)
    spikes.look_back(manifest.get("spikes"))
    keeper.recorder.note({"kind": "rollback", "step": before.step, **facts, "time": time.time()})
    recorded = {key: value for key, value in keeper.facts.items() if key not in AS_SAVED} | spikes.facts()
    _require_lock(keeper)
    agreed(ranks, lambda: publish_again(keeper, checkpoint, manifest, recorded, progress.sequences), StorageFailed)
    return Progress(before.step, before.tokens, progress.sequences)


def newest_before(folder: Path, step: int, earliest: int) -> Path | None:
    """The newest whole checkpoint of a step before `step`, from `earliest` on."""
    for saved, path in list_checkpoints(folder):
        if earliest <= saved < step:
            try:
                verify_checkpoint(path)
            except BadCheckpoint:
                continue
            return path
    return None


def publish_again(
    keeper: CheckpointKeeper, checkpoint: Path, manifest: CheckpointManifest, facts: Mapping[str, Any], sequences: int
) -> None:
    """Replace a checkpoint's manifest, in one step: its tensors stay. One rank calls. Raises StorageFailed."""
    try:
        keeper.recorder.sync()  # the checkpoint must not outlive the record of the roll-back
        write_checkpoint_manifest(checkpoint, {**manifest, **facts, "version": VERSION, "sequences": sequences})
    except OSError as error:
        raise StorageFailed(refusal("written", error, error.filename or checkpoint)) from None


def _move_aside(folder: Path, step: int, number: int) -> None:
    """Raises StorageFailed."""
    try:
        set_aside_rolled_back(folder, step, number)
    except OSError as error:
        raise StorageFailed(refusal("moved", error, error.filename or folder)) from None


def _require_lock(keeper: CheckpointKeeper) -> None:
    """Raises LockLost on all ranks where the run is another trainer's by now."""
    if not agreed(keeper.writer.ranks, keeper.writer.still_mine):
        raise LockLost(f"the run is not rolled back: {why_lost(keeper.folder.parent)}")
