"""Filling model and optimizer from a checkpoint, whatever number of ranks wrote it, one tensor at a time."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from common.checkpoint_files import read_checkpoint_manifest
from common.checkpoint_manifest import CheckpointManifest
from common.errors import UserError
from model.weights import SUFFIX, read_shapes, reading_tensors
from train.checkpoints.ownership import COUNT, OPTIMIZER, STATE, WEIGHTS, named_parameters
from train.progress import Progress


def check_training_state(checkpoint: Path, model: nn.Module) -> None:
    """Compare a checkpoint's files, by their headers, with what a model and its optimizer take from it.

    Args:
        model: as it will be trained; it may be on the meta device.

    Raises UserError naming the first tensor that is missing, superfluous, of another shape or no float.
    """
    manifest = read_checkpoint_manifest(checkpoint)
    parameters = named_parameters(model)
    weights = read_shapes(_files(checkpoint, manifest, WEIGHTS))
    another = f"{checkpoint} is of another model"
    for name, shape in weights.items():
        if name not in parameters:
            raise UserError(f"{another}: it has a tensor {name}, this configuration has none")
        if shape != tuple(parameters[name].shape):
            raise UserError(f"{another}: {name} is {shape} there and {tuple(parameters[name].shape)} here")
    if missing := sorted(parameters.keys() - weights.keys()):
        raise UserError(f"{another}: it has no tensor {missing[0]}")
    state = read_shapes(_files(checkpoint, manifest, OPTIMIZER))
    wanted = {
        f"{name}/{key}": () if key == COUNT else tuple(p.shape) for name, p in parameters.items() for key in STATE
    }
    for name, shape in state.items():
        if name not in wanted:
            raise UserError(f"{checkpoint} has optimizer state {name}, which this model's training does not take")
        if shape != wanted[name]:
            raise UserError(f"{another}: {name} is {shape} there and {wanted[name]} here")
    if (state or manifest["step"] > 0) and (absent := sorted(wanted.keys() - state.keys())):
        raise UserError(f"{checkpoint} has no optimizer state for {absent[0]}")


def load_training_state(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Fill model and optimizer from a verified checkpoint, one tensor at a time; return how far it was.

    Nothing of the checkpoint stays in memory, mapped or copied, beside what training itself holds.

    Raises UserError as `check_training_state` does, and for NaN, infinities, and negative squares and counts.
    """
    check_training_state(checkpoint, model)
    manifest = read_checkpoint_manifest(checkpoint)
    parameters = named_parameters(model)
    with torch.no_grad():
        for name, tensor in _tensors(checkpoint, manifest, WEIGHTS):
            parameters[name].copy_(tensor)
    _fill_optimizer(checkpoint, manifest, parameters, optimizer)
    return Progress(manifest["step"], manifest["tokens"], manifest["sequences"])


def _fill_optimizer(
    checkpoint: Path,
    manifest: CheckpointManifest,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Give every parameter its state, where and as `Optimizer.load_state_dict` would put it.

    That method would need the whole state a second time.
    """
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    for full_name, tensor in _tensors(checkpoint, manifest, OPTIMIZER):
        name, key = full_name.rsplit("/", 1)
        parameter = parameters[name]
        group = groups[id(parameter)]
        if key == COUNT:  # which AdamW keeps on the CPU unless one kernel does everything
            on_device = group.get("fused") or group.get("capturable")
            state = torch.empty((), dtype=torch.float32, device=parameter.device if on_device else "cpu")
        else:
            state = torch.empty_like(parameter, requires_grad=False)
        optimizer.state[parameter][key] = state.copy_(tensor)


def _files(checkpoint: Path, manifest: CheckpointManifest, kind: str) -> list[Path]:
    """Those that the manifest lists: in a copy over another checkpoint lie files of both."""
    names = sorted(name for name in manifest["files"] if name.startswith(f"{kind}-") and name.endswith(SUFFIX))
    return [checkpoint / name for name in names]


def _tensors(checkpoint: Path, manifest: CheckpointManifest, kind: str) -> Iterator[tuple[str, Tensor]]:
    """One tensor at a time, on the CPU, read rather than mapped: mapped pages would count as this process's memory."""
    for path in _files(checkpoint, manifest, kind):
        with reading_tensors(path), safe_open(path, framework="pt", device="cpu", backend="pread") as file:
            for key in file.keys():  # noqa: SIM118 (no mapping)
                tensor = file.get_tensor(key)
                _check_numbers(path, key, tensor)
                yield key, tensor


def _check_numbers(path: Path, name: str, tensor: Tensor) -> None:
    """Raises UserError for what no run saves, and what would spoil all weights at the first step."""
    low, high = (float(value) for value in torch.aminmax(tensor))  # both NaN where one number is
    if not -math.inf < low <= high < math.inf or (name.endswith(("/exp_avg_sq", f"/{COUNT}")) and low < 0):
        raise UserError(f"{path} holds numbers in {name} that no training leaves there: go on from another checkpoint")
