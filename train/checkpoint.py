"""Saving and loading a run: each rank writes the tensors it owns, then the manifest, then the folder gets its name.

Tensors are keyed by parameter name in safetensors files, weights apart from optimizer state, so that any number of
ranks reads what any other number wrote, and an evaluation reads the weights alone.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from common.checkpoint_files import (
    CHECKPOINT_MANIFEST,
    FORMAT_VERSION,
    BadCheckpoint,
    checkpoint_name,
    read_checkpoint_manifest,
    verify_checkpoint,
)
from common.errors import UserError
from common.publish import TEMPORARY_SUFFIX, publish_folder, sha256_file, write_json_whole
from model.ranks import Ranks
from model.weights import save_tensors

WEIGHTS, OPTIMIZER = "weights", "optimizer"


@dataclass(frozen=True)
class Progress:
    """How far a run has come. Enough to go on: everything random is a function of these and the seed."""

    step: int = 0
    tokens: int = 0
    sequences: int = 0


def owners(sizes: dict[str, int], world_size: int) -> dict[str, int]:
    """The rank that owns each named tensor: largest first, always to the rank with the least so far."""
    loads = [0] * world_size
    owner = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = loads.index(min(loads))
        owner[name] = rank
        loads[rank] += sizes[name]
    return owner


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What training changes, by name: not what is frozen beside adapters. A tied tensor stands once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as `parameter name/state key`."""
    return {
        f"{name}/{key}": value
        for name, parameter in named_parameters(model).items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


class CheckpointWriter:
    """Saves one run's checkpoints into `folder`. Every method is called by all ranks together."""

    def __init__(self, folder: Path, ranks: Ranks, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._folder = folder
        self.ranks = ranks
        self.model = model
        self._optimizer = optimizer
        sizes = {name: parameter.numel() for name, parameter in named_parameters(model).items()}
        self._mine = {name for name, rank in owners(sizes, ranks.world_size).items() if rank == ranks.rank}

    def save(self, progress: Progress, facts: dict[str, Any]) -> Path:
        """Write and publish a checkpoint; return its folder.

        Args:
            facts: what else the manifest says (model, tokenizer, data, configuration, …).

        Raises UserError on all ranks, naming the first failure, if any rank could not write: nothing is published then.
        """
        final = self._folder / checkpoint_name(progress.step)
        temporary = self._folder / f".{final.name}{TEMPORARY_SUFFIX}"
        failures = self.ranks.from_first(_make_folder(temporary) if self.ranks.is_first else None)
        if not failures:
            shares = self.ranks.gather(self._write_share(temporary))
            failures = [share for share in shares if isinstance(share, str)]
            if not failures and self.ranks.is_first:
                files = {name: entry for share in shares for name, entry in share.items()}
                failures = self._publish(temporary, final, {"files": files, **facts, **vars(progress)})
            failures = self.ranks.from_first(failures)
        if failures:
            raise UserError(f"step {progress.step} could not be saved: {failures[0]} (earlier checkpoints are intact)")
        return final

    def _write_share(self, folder: Path) -> dict[str, dict[str, Any]] | str:
        """Write this rank's files; return their sizes and hashes, or what went wrong."""
        weights = {name: p.detach() for name, p in named_parameters(self.model).items() if name in self._mine}
        state = optimizer_tensors(self.model, self._optimizer)
        state = {name: tensor for name, tensor in state.items() if name.rsplit("/", 1)[0] in self._mine}
        entries = {}
        for kind, tensors in ((WEIGHTS, weights), (OPTIMIZER, state)):
            path = folder / f"{kind}-{self.ranks.rank:05d}-of-{self.ranks.world_size:05d}.safetensors"
            try:
                save_tensors(path, tensors)
                entries[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
            except (OSError, SafetensorError) as error:
                return f"{path}: {error}"
        return entries

    def _publish(self, temporary: Path, final: Path, facts: dict[str, Any]) -> list[str]:
        try:
            write_json_whole(temporary / CHECKPOINT_MANIFEST, {"format_version": FORMAT_VERSION, **facts})
            aside = final.with_name(f".{final.name}.replaced{TEMPORARY_SUFFIX}")
            if final.exists():  # the run went back behind this step, or found it damaged
                os.replace(final, aside if _is_whole(final) else final.with_name(f"{final.name}.damaged-{os.getpid()}"))
            publish_folder(temporary, final)
            shutil.rmtree(aside, ignore_errors=True)
        except OSError as error:
            return [f"{final}: {error}"]
        return []


def _make_folder(temporary: Path) -> list[str]:
    """Make an empty folder for a save; return what went wrong."""
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    except OSError as error:
        return [f"{temporary}: {error.strerror}"]
    return []


def _is_whole(checkpoint: Path) -> bool:
    try:
        verify_checkpoint(checkpoint)
    except BadCheckpoint:
        return False
    return True


def load_training_state(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Fill model and optimizer in place from a verified checkpoint; return how far it was.

    Raises UserError naming the first tensor that is missing, superfluous or of another shape.
    """
    manifest = read_checkpoint_manifest(checkpoint)
    parameters = named_parameters(model)
    _fill_weights(checkpoint, parameters)
    index = {name: number for number, name in enumerate(_names_in_optimizer_order(model, optimizer))}
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _tensors(checkpoint, OPTIMIZER):
        parameter, key = name.rsplit("/", 1)
        if parameter not in index:
            raise UserError(f"{checkpoint} has optimizer state for {parameter}, which this model does not train")
        state.setdefault(index[parameter], {})[key] = tensor
    if manifest["step"] > 0 and len(state) != len(index):
        absent = sorted(name for name, number in index.items() if number not in state)
        raise UserError(f"{checkpoint} has no optimizer state for {absent[0]}")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return Progress(manifest["step"], manifest["tokens"], manifest["sequences"])


def _fill_weights(checkpoint: Path, parameters: dict[str, nn.Parameter]) -> None:
    missing = set(parameters)
    with torch.no_grad():
        for name, tensor in _tensors(checkpoint, WEIGHTS):
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


def _names_in_optimizer_order(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Parameter names as the optimizer's groups list them: the numbers of its state dict."""
    names = {id(parameter): name for name, parameter in named_parameters(model).items()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _tensors(checkpoint: Path, kind: str) -> Iterator[tuple[str, Tensor]]:
    """One tensor at a time, on the CPU."""
    for path in sorted(checkpoint.glob(f"{kind}-*.safetensors")):
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in file.keys():  # noqa: SIM118 (no mapping)
                    yield name, file.get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"{path} can't be read: {error}") from None
