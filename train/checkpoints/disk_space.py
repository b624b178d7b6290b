"""Whether the disk has room for a run's checkpoints, checked before the first step instead of failing at the last."""

import ctypes
import errno
import math
import os
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path

from common.checkpoint_files import list_checkpoints
from common.errors import UserError
from common.os_errors import refusal, what_to_do
from common.publish import TEMPORARY_SUFFIX
from model.counts import Shape
from train.optimization.declared_state import OptimizerState
from train.run.storage import NO_ROOM
from train.settings.sections import CheckpointConfig

# What a checkpoint holds beside its tensors, at most: a line of a file's header for each, and the manifest.
_HEADER_BYTES, _MANIFEST_BYTES = 256, 65_536
_WEIGHT_BYTES = 4  # float32


def bytes_of_checkpoint(
    shapes: Mapping[str, Shape], declared: OptimizerState, *, averaged: bool = False
) -> tuple[int, int]:
    """(bytes of a whole checkpoint, bytes of one with only weights), of all ranks together, after any step.

    The tensors exactly, and a little more than their files' headers and the manifest take. Averaged weights are among
    the weights.

    Args:
        shapes: of the trained parameters by name. declared: what the optimizer keeps of them.
    """
    sizes = [_WEIGHT_BYTES * math.prod(shape) for shape in shapes.values()]
    weights = _bytes_on_disk(sizes * 2 if averaged else sizes)
    state = _bytes_on_disk([tensor.nbytes for tensor in declared.tensors(shapes).values()])
    return weights + state + _MANIFEST_BYTES, weights + _MANIFEST_BYTES


def _bytes_on_disk(sizes: list[int]) -> int:
    return sum(sizes) + _HEADER_BYTES * len(sizes)


def needed_bytes(
    config: CheckpointConfig,
    *,
    existing: Iterable[int],
    first_step: int,
    max_steps: int,
    checkpoint_bytes: int,
    weights_bytes: int,
) -> int:
    """Bytes that a run's checkpoints will take at most beside those that are there, while a new one is being written.

    Args:
        existing: steps of the checkpoints that are there.
        first_step: the one resumed from, which stays; 0 for a new run.
        checkpoint_bytes, weights_bytes: of a whole checkpoint, and of only its weights.
    """
    every = config.every_steps or max_steps
    passed = first_step // every  # saves at multiples before the run (or this part of it)
    count = (max_steps - 1) // every - passed + 1  # of future saves: at multiples, and at the last step
    old = sorted(set(existing))
    before = len(old) * checkpoint_bytes

    def stays(step: int) -> bool:
        return step == first_step or _is_multiple(step, config.keep_every_steps)

    def taken(newest: int) -> int:
        """Bytes once the last step is saved, while so many of the newest checkpoints are whole."""
        aged = max(0, count - newest)
        recent = set(old[len(old) - min(len(old), max(0, newest - count)) :])
        old_whole = {step for step in old if step in recent or stays(step)}

        def aged_at(interval: int) -> int:
            """How many of the aged among the new saves are at multiples of this (and of `every`, as all are)."""
            both = math.lcm(every, interval)
            return (passed + aged) * every // both - first_step // both if interval else 0

        each, kept_each = config.weights_every_steps, config.keep_every_steps
        # the best checkpoint may be any step, so reserve one extra
        whole = len(old_whole) + min(newest, count) + aged_at(kept_each) + config.keep_best
        # weight copies share hard links until the whole checkpoint is deleted
        alone = aged_at(each) - aged_at(math.lcm(each, kept_each))
        alone += sum(_is_multiple(step, each) for step in old if step not in old_whole)
        return min(len(old) + count, whole) * checkpoint_bytes + alone * weights_bytes

    # The first save adds to all that is there. From the second on the total only grows, so the last one decides: beside
    # as many as stay (where it is not the first itself), and after one of these is deleted.
    first = (len(old) + 1) * checkpoint_bytes
    last = taken(config.keep_last + 1) if count > 1 else 0
    return max(first, last, taken(config.keep_last)) - before


def _is_multiple(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def check_space(
    folder: Path, config: CheckpointConfig, *, first_step: int, max_steps: int, sizes: tuple[int, int], more: int = 0
) -> None:
    """Compare a run's checkpoints with the free space of their disk; reserve the bytes of one, and free them again.

    Reserving also finds quotas, which the number of free bytes ignores.

    Args:
        folder: of the checkpoints. sizes: bytes of a checkpoint, and of only its weights.
        more: how many checkpoints beside those that retention keeps may be there for a while.

    Raises UserError naming the folder, the bytes needed and the bytes free.
    """
    existing = [step for step, _ in list_checkpoints(folder) if step <= first_step]
    needed = needed_bytes(
        config,
        existing=existing,
        first_step=first_step,
        max_steps=max_steps,
        checkpoint_bytes=sizes[0],
        weights_bytes=sizes[1],
    )
    needed += more * sizes[0]
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    advice = "free some, lower checkpoint.keep_last, or give a --run.root on another disk"
    if needed > free:
        raise UserError(
            f"{folder}: the run's checkpoints need {needed:,} bytes ({sizes[0]:,} each), but only {free:,} are free: "
            f"{advice}"
        )
    try:
        _reserve(folder, sizes[0])
    except OSError as error:
        if error.errno not in NO_ROOM | {errno.EFBIG}:
            raise UserError(refusal("written", error, folder, otherwise="give another --run.root")) from None
        raise UserError(
            f"{folder}: {error.strerror}: a checkpoint of {sizes[0]:,} bytes can't be written, though {free:,} are "
            f"free: {what_to_do(error) if error.errno == errno.EFBIG else advice}"
        ) from None


def _reserve(folder: Path, size: int) -> None:
    """Allocate `size` bytes for a moment. Raises OSError where that fails.

    Only by the system call: where a file system can't reserve, the C library's posix_fallocate would write a byte into
    each of its blocks.
    """
    path = folder / f".space-{uuid.uuid4().hex[:8]}{TEMPORARY_SUFFIX}"  # the next start deletes it if this one can't
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    with open(path, "wb") as file:
        try:
            if fallocate is not None:
                offset, length = ctypes.c_int64(0), ctypes.c_int64(size)
                if fallocate(file.fileno(), 0, offset, length) != 0:
                    code = ctypes.get_errno()
                    if code not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                        raise OSError(code, os.strerror(code))
        finally:
            path.unlink()
