"""Which checkpoints a run keeps and deletes. What can't be parsed is never deleted."""

import contextlib
import math
import os
import re
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.checkpoint_files import (
    CHECKPOINT_MANIFEST,
    BadCheckpoint,
    list_checkpoints,
    read_checkpoint_manifest,
    verify_checkpoint,
    write_checkpoint_manifest,
)
from common.curves import VALIDATION
from common.measured import measured_alike, validation_of
from common.publish import TEMPORARY_SUFFIX, fsync_file, fsync_folder, publish_folder
from train.settings.sections import CheckpointConfig

KEPT = ("weights-", "ema-")  # of a checkpoint's files, those without which it can't be evaluated
_PUBLISHED = re.compile(r"(?:step|weights)-([0-9]{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """What retention needs to know of a checkpoint.

    Attributes:
        val_loss: only if it was measured with these very weights. validation: what it was measured on.
    """

    step: int
    val_loss: float | None = None
    validation: Mapping[str, Any] = field(default_factory=dict)


def expendable(
    checkpoints: Sequence[Checkpoint], config: CheckpointConfig, never: int | None, suspected: Sequence[int] = ()
) -> set[int]:
    """Steps of those that are due: neither among the newest, nor at a multiple, nor the best, nor `never` (resumed
    from), nor the newest from before a step that is `suspected` to start a spike.

    The best is chosen among losses that were measured as the newest one was.
    """
    newest = sorted((checkpoint.step for checkpoint in checkpoints), reverse=True)
    kept = {*newest[: config.keep_last], never}
    kept.update(next((step for step in newest if step < first), None) for first in suspected)
    if config.keep_every_steps > 0:
        kept.update(step for step in newest if step % config.keep_every_steps == 0)
    measured = sorted((c for c in checkpoints if c.val_loss is not None), key=lambda checkpoint: checkpoint.step)
    alike = [c for c in measured if measured_alike(VALIDATION, c.validation, measured[-1].validation)]
    if config.keep_best and alike:
        kept.add(min((checkpoint.val_loss, checkpoint.step) for checkpoint in alike)[1])
    return {step for step in newest if step not in kept}


def read_checkpoint(step: int, path: Path) -> Checkpoint | None:
    """A checkpoint's facts; None for anything but a checkpoint of a format that this version knows."""
    try:
        manifest = read_checkpoint_manifest(path)
    except BadCheckpoint:
        return None
    loss = manifest.get("val_loss")
    measured = isinstance(loss, float) and math.isfinite(loss) and manifest.get("val_step") == step
    return Checkpoint(step, loss if measured else None, validation_of(manifest))


def set_aside_expendable(
    folder: Path, config: CheckpointConfig, *, last: int, resumed_from: Path | None, suspected: Sequence[int] = ()
) -> list[Path]:
    """Take the names of checkpoints that are due for deletion; return where they are now, for `delete` to remove later.

    An interrupted deletion leaves nothing that looks like a checkpoint. Weights that are kept for good, and of
    which there is no copy (the run was killed, or had no room, before it), are copied first.

    Args:
        last: the step just saved. What is newer was skipped when the run was resumed, and is left alone.
        resumed_from: never deleted. It may be another run's, and gone by now.
        suspected: first steps of spikes: what the run may be rolled back to is not deleted either.
    """
    found = {
        step: path for step, path in list_checkpoints(folder) if step <= last and (path / CHECKPOINT_MANIFEST).is_file()
    }
    checkpoints = [checkpoint for item in found.items() if (checkpoint := read_checkpoint(*item)) is not None]
    kept = resumed_from and resumed_from.resolve()
    never = next((step for step, path in found.items() if path.resolve() == kept), None)
    aside = []
    for step in sorted(expendable(checkpoints, config, never, suspected)):
        every = config.weights_every_steps
        if every > 0 and step % every == 0 and not _weights_folder(found[step], step).exists():
            with contextlib.suppress(BadCheckpoint):  # one that has lost files has nothing to keep
                verify_checkpoint(found[step], hashes=False)
                keep_weights(found[step], step)
        target = folder / f".{found[step].name}.{uuid.uuid4().hex[:8]}{TEMPORARY_SUFFIX}"
        aside.append(found[step].rename(target))
    return aside


def set_aside_rolled_back(folder: Path, step: int, number: int) -> None:
    """Take the names of all checkpoints, and weights kept for good, after a step that the run is rolled back to.

    The newest comes first: a resume after a kill in between finds the newest of those that are left.

    Args:
        number: of the roll-back, which their new names have.
    """
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _PUBLISHED.fullmatch(path.name))]
    for after, path in sorted(found, reverse=True):
        if after > step:
            path.rename(path.with_name(f"{path.name}.rolled-back-{number}-{uuid.uuid4().hex[:8]}"))
    fsync_folder(folder)


def set_aside_passed(folder: Path, step: int) -> list[Path]:
    """What roll-backs have moved aside up to a step that the run has reached again, renamed, for `delete`.

    What is not whole is kept.
    """
    aside = []
    for path in folder.glob("*.rolled-back-*"):
        match = _PUBLISHED.fullmatch(path.name.partition(".")[0])
        if match is None or int(match[1]) > step:
            continue
        with contextlib.suppress(BadCheckpoint):
            verify_checkpoint(path, hashes=False)
            aside.append(path.rename(path.with_name(f".{path.name}{TEMPORARY_SUFFIX}")))
    return aside


def delete(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def sweep_leftovers(folder: Path) -> None:
    """Delete what interrupted saves and deletions left under their temporary names.

    The caller holds the run's lock: a running save has such a name as well.
    """
    delete([path for kind in ("step", "weights") for path in folder.glob(f".{kind}-*{TEMPORARY_SUFFIX}")])
    for path in folder.glob(f".space-*{TEMPORARY_SUFFIX}"):
        path.unlink(missing_ok=True)
    # whole ones that were replaced by what now has their name
    delete([path for path in folder.glob("*.replaced-*") if path.with_name(path.name.partition(".")[0]).exists()])


def _weights_folder(checkpoint: Path, step: int) -> Path:
    return checkpoint.with_name(f"weights-{step:08d}")


def keep_weights(checkpoint: Path, step: int) -> Path:
    """Give a checkpoint's weights, averaged ones too, a small checkpoint of their own beside it, without optimizer
    state; return it.

    The files are shared with the checkpoint (hard links) and outlive it; where the file system knows no hard links
    they are copied. Such a folder can be evaluated and exported, and never resumed from.
    """
    final, replaced = _weights_folder(checkpoint, step), None
    temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}{TEMPORARY_SUFFIX}")
    manifest = read_checkpoint_manifest(checkpoint)
    manifest["files"] = {name: entry for name, entry in manifest["files"].items() if name.startswith(KEPT)}
    try:
        temporary.mkdir()
        for name in manifest["files"]:
            try:
                os.link(checkpoint / name, temporary / name)
            except OSError:
                shutil.copyfile(checkpoint / name, temporary / name)
                fsync_file(temporary / name)  # it will be the only copy of these weights
        write_checkpoint_manifest(temporary, {**manifest, "weights_only": True})
        if final.exists():  # the run went back behind this step
            replaced = final.rename(temporary.with_name(f"{final.name}.replaced-{uuid.uuid4().hex[:8]}"))
        publish_folder(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if replaced is not None:
        delete([replaced])
    return final
