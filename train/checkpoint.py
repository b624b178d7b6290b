"""Saving and loading a run: each rank writes the tensors it owns, then the manifest, then the folder gets its name.

Tensors are keyed by parameter name in safetensors files, weights apart from optimizer state, so that any number of
ranks reads what any other number wrote, and an evaluation reads the weights alone.
"""

import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from common.checkpoint_files import (
    BadCheckpoint,
    checkpoint_name,
    read_checkpoint_manifest,
    verify_checkpoint,
    write_checkpoint_manifest,
)
from common.errors import UserError
from common.publish import TEMPORARY_SUFFIX, publish_folder
from model.ranks import Ranks
from train import snapshot
from train.background_save import BackgroundSave, ShareWritten, WriteFailure, write_failure
from train.run_lock import LockLost, why_lost
from train.shares import OPTIMIZER, WEIGHTS, checkpoint_bytes, named_parameters, owned_by, share_of


@dataclass(frozen=True)
class Progress:
    """How far a run has come. Enough to go on: everything random is a function of these and the seed.

    Attributes:
        step, tokens: since the beginning, that of the run this one branched from included.
        sequences: the loader's position in the data at hand; elsewhere it begins with 0 (`train.position`).
    """

    step: int = 0
    tokens: int = 0
    sequences: int = 0


class SaveFailed(UserError):
    """A checkpoint that could not be written; raised on all ranks alike. Earlier ones are intact."""


@dataclass(frozen=True)
class Saved:
    """A published checkpoint. save_seconds: from the snapshot to the rename, without waiting for a step's end."""

    path: Path
    step: int
    save_seconds: float
    save_bytes: int


@dataclass(frozen=True)
class _Pending:
    """A save whose snapshot is taken."""

    step: int
    temporary: Path
    facts: dict[str, Any]
    snapshot_seconds: float
    writing: BackgroundSave


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
    ) -> None:
        """Args: still_mine: asked on rank 0 before every publishing: whether the run is this trainer's yet. An OSError
        of it fails the save."""
        self._folder = folder
        self.ranks = ranks
        self.model = model
        self._optimizer = optimizer
        self._still_mine = still_mine
        self._mine = owned_by(ranks.rank, ranks.world_size, model)
        self._buffers: snapshot.Buffers = {}
        self._pending: _Pending | None = None

    @property
    def pending_step(self) -> int | None:
        """The step whose checkpoint is being written."""
        return self._pending.step if self._pending else None

    def flags(self) -> list[int]:
        """[my share is not yet written, my share failed], for the vector that ranks agree on."""
        if self._pending is None:
            return [0, 0]
        writing = self._pending.writing
        return [int(not writing.done), int(writing.failed)]

    def begin(self, progress: Progress, facts: dict[str, Any]) -> None:
        """Take the snapshot and begin to write it. An earlier save must be finished.

        Args:
            facts: what else the manifest says (model, tokenizer, data, configuration, …), as of now.

        Raises SaveFailed on all ranks if there can be no folder for it.
        """
        assert self._pending is None, "a save is still being written"
        started = time.monotonic()
        made = self.ranks.from_first(self._make_folder(progress.step) if self.ranks.is_first else None)
        if isinstance(made, WriteFailure):
            raise SaveFailed(self._explain(progress.step, made))
        snapshot.take(share_of(self._mine, self.model, self._optimizer), self._buffers)
        suffix = f"{self.ranks.rank:05d}-of-{self.ranks.world_size:05d}.safetensors"
        files = {f"{kind}-{suffix}": tensors for kind, tensors in self._buffers.items()}
        writing = BackgroundSave(made, files)
        facts = {**facts, **vars(progress)}
        self._pending = _Pending(progress.step, made, facts, time.monotonic() - started, writing)

    def finish(self) -> Saved:
        """Wait for this rank's share, then for all; publish.

        Raises SaveFailed or LockLost on all ranks, with the first reason: nothing is published then.
        """
        pending = self._pending
        assert pending is not None, "nothing is being saved"
        shares: list[ShareWritten] = self.ranks.gather(pending.writing.result())
        self._pending = None
        outcome: Saved | SaveFailed | LockLost | None = None
        if self.ranks.is_first:
            failures = [share.failure for share in shares if share.failure is not None]
            # a share that was given up because of another's failure explains nothing
            failures.sort(key=lambda failure: failure.given_up)
            outcome = self._give_up(pending, failures[0]) if failures else self._publish(pending, shares)
        outcome = self.ranks.from_first(outcome)
        if isinstance(outcome, Exception):
            raise outcome
        assert outcome is not None
        return outcome

    def save(self, progress: Progress, facts: dict[str, Any]) -> Path:
        """`begin` and `finish` in one; return the checkpoint's folder."""
        self.begin(progress, facts)
        return self.finish().path

    def abandon(self) -> None:
        """Write no more than what is under way. (Each rank by itself, in what nobody returns from.)"""
        if self._pending is not None:
            self._pending.writing.abandon()

    def _make_folder(self, step: int) -> Path | WriteFailure:
        """A new folder aside; its name is this save's alone, whoever else believes to own the run."""
        folder = self._folder / f".{checkpoint_name(step)}.{uuid.uuid4().hex[:8]}{TEMPORARY_SUFFIX}"
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            return write_failure(folder, error)
        return folder

    def _publish(self, pending: _Pending, shares: list[ShareWritten]) -> Saved | SaveFailed | LockLost:
        """Manifest, then name, if the run is still ours. (Rank 0.)"""
        started = time.monotonic()
        files = {name: entry for share in shares for name, entry in share.files.items()}
        final = self._folder / checkpoint_name(pending.step)
        try:
            if not self._still_mine():
                return LockLost(f"step {pending.step} is not published: {why_lost(self._folder.parent)}")
            write_checkpoint_manifest(pending.temporary, {"files": files, **pending.facts})
            _put_in_place(pending.temporary, final)
        except OSError as error:
            return self._give_up(pending, write_failure(final, error))
        seconds = pending.snapshot_seconds + max(share.seconds for share in shares) + time.monotonic() - started
        return Saved(final, pending.step, seconds, sum(file.stat().st_size for file in final.iterdir()))

    def _give_up(self, pending: _Pending, failure: WriteFailure) -> SaveFailed:
        """Delete what was written and explain. (Rank 0.)"""
        shutil.rmtree(pending.temporary, ignore_errors=True)
        return SaveFailed(self._explain(pending.step, failure))

    def _explain(self, step: int, failure: WriteFailure) -> str:
        room = ""
        if failure.no_room:
            needed, _ = checkpoint_bytes(self.model, self._optimizer)
            try:
                room = f"; a checkpoint needs {needed:,} bytes, {shutil.disk_usage(self._folder).free:,} are free"
            except OSError:
                room = f"; a checkpoint needs {needed:,} bytes"
        return f"step {step} could not be saved: {failure.message}{room} (earlier checkpoints are intact)"


def _put_in_place(temporary: Path, final: Path) -> None:
    """Give a finished checkpoint its name. What has it already (the run went back behind this step) makes room."""
    aside = None
    if final.exists():
        whole = _is_whole(final)
        name = f"{final.name}.{'replaced' if whole else 'damaged'}-{uuid.uuid4().hex[:8]}"
        damaged_or_old = final.rename(final.with_name(name))
        aside = damaged_or_old if whole else None  # what can't be read is kept
    publish_folder(temporary, final)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def _is_whole(checkpoint: Path) -> bool:
    try:
        verify_checkpoint(checkpoint)
    except BadCheckpoint:
        return False
    return True


def load_training_state(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Fill model and optimizer from a verified checkpoint, one tensor at a time; return how far it was.

    Nothing of the checkpoint stays in memory, mapped or copied, beside what training itself holds.

    Raises UserError naming the first tensor that is missing, superfluous or of another shape.
    """
    manifest = read_checkpoint_manifest(checkpoint)
    parameters = named_parameters(model)
    _fill_weights(checkpoint, manifest, parameters)
    filled = _fill_optimizer(checkpoint, manifest, parameters, optimizer)
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    absent = sorted(name for name, p in parameters.items() if id(p) in trained and name not in filled)
    if manifest["step"] > 0 and absent:
        raise UserError(f"{checkpoint} has no optimizer state for {absent[0]}")
    return Progress(manifest["step"], manifest["tokens"], manifest["sequences"])


def _fill_weights(checkpoint: Path, manifest: dict[str, Any], parameters: dict[str, nn.Parameter]) -> None:
    missing = set(parameters)
    with torch.no_grad():
        for name, tensor in _tensors(checkpoint, manifest, WEIGHTS):
            if name not in parameters:
                raise UserError(
                    f"{checkpoint} is of another model: it has a tensor {name}, this configuration has none"
                )
            if tensor.shape != parameters[name].shape:
                raise UserError(
                    f"{checkpoint} is of another model: {name} is {tuple(tensor.shape)} there and "
                    f"{tuple(parameters[name].shape)} here"
                )
            parameters[name].copy_(tensor)
            missing.discard(name)
    if missing:
        raise UserError(f"{checkpoint} is of another model: it has no tensor {sorted(missing)[0]}")


def _fill_optimizer(
    checkpoint: Path,
    manifest: dict[str, Any],
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> set[str]:
    """Give every parameter its state, where and as `Optimizer.load_state_dict` would put it; return their names.

    That method would need the whole state a second time.
    """
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    filled = set()
    for full_name, tensor in _tensors(checkpoint, manifest, OPTIMIZER):
        name, key = full_name.rsplit("/", 1)
        parameter = parameters.get(name)
        if parameter is None or id(parameter) not in groups:
            raise UserError(f"{checkpoint} has optimizer state for {name}, which this model does not train")
        group = groups[id(parameter)]
        if key == "step":  # a count, which AdamW keeps on the CPU unless one kernel does everything
            on_device = group.get("fused") or group.get("capturable")
            state = torch.empty((), dtype=torch.float32, device=parameter.device if on_device else "cpu")
        else:
            state = torch.empty_like(parameter, requires_grad=False)
        if state.shape != tensor.shape:
            raise UserError(f"{checkpoint} is of another model: {full_name} is {tuple(tensor.shape)} there")
        optimizer.state[parameter][key] = state.copy_(tensor)
        filled.add(name)
    return filled


def _tensors(checkpoint: Path, manifest: dict[str, Any], kind: str) -> Iterator[tuple[str, Tensor]]:
    """One tensor at a time, on the CPU, read rather than mapped: mapped pages would count as this process's memory.

    Of the files that the manifest lists alone: in a copy over another one lie files of both.
    """
    for name in sorted(manifest["files"]):
        if not name.startswith(f"{kind}-"):
            continue
        path = checkpoint / name
        try:
            with safe_open(path, framework="pt", device="cpu", backend="pread") as file:
                for key in file.keys():  # noqa: SIM118 (no mapping)
                    yield key, file.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} can't be read: {error}") from None
