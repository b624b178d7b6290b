"""Filling model and optimizer from a checkpoint, whatever number of ranks wrote it, one tensor at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from common.checkpoint_files import read_checkpoint_manifest
from common.errors import UserError
from train.checkpoint import Progress
from train.shares import OPTIMIZER, WEIGHTS, named_parameters


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
