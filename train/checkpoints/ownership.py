"""Which rank owns which tensor of the training state, and their sizes in bytes."""

import torch
from torch import Tensor, nn

from train.optimization.optimizer_state import shapes_of, state_of

WEIGHTS, OPTIMIZER = "weights", "optimizer"

# What a checkpoint holds beside its tensors, at most: a line of a file's header for each, and the manifest.
_HEADER_BYTES, _MANIFEST_BYTES = 256, 65_536


def owners(sizes: dict[str, int], world_size: int) -> dict[str, int]:
    """The rank that owns each named tensor: largest first, always to the rank with the least so far."""
    loads = [0] * world_size
    owner = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = loads.index(min(loads))
        owner[name] = rank
        loads[rank] += sizes[name]
    return owner


def owned_by(rank: int, world_size: int, model: nn.Module) -> set[str]:
    """Names of the parameters that a rank owns, by their number of elements."""
    sizes = {name: parameter.numel() for name, parameter in named_parameters(model).items()}
    return {name for name, owner in owners(sizes, world_size).items() if owner == rank}


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by name, without weights frozen beside adapters. A tied tensor is listed once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as `parameter name/state key`: all that is declared, once a parameter has had a step."""
    declared = state_of(optimizer)
    tensors: dict[str, Tensor] = {}
    for name, parameter in named_parameters(model).items():
        kept = {key: value for key, value in optimizer.state.get(parameter, {}).items() if isinstance(value, Tensor)}
        shapes = {key: item.shape for key, item in declared.of(name, tuple(parameter.shape)).items()}
        assert not kept or shapes == shapes_of(kept.items()), "an optimizer keeps other state than it declares"
        tensors |= {f"{name}/{key}": value for key, value in kept.items()}
    return tensors


def share_of(mine: set[str], model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Weights and optimizer state of the parameters in `mine`, by kind of file."""
    weights = {name: p.detach() for name, p in named_parameters(model).items() if name in mine}
    state = optimizer_tensors(model, optimizer)
    return {WEIGHTS: weights, OPTIMIZER: {name: t for name, t in state.items() if name.rsplit("/", 1)[0] in mine}}


def checkpoint_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """(bytes of a whole checkpoint, bytes of one with only weights), of all ranks together, after any step.

    The tensors exactly, and a little more than their files' headers and the manifest take.
    """
    parameters = named_parameters(model)
    weights = _bytes_on_disk([parameter.nbytes for parameter in parameters.values()])
    kept = state_of(optimizer).tensors(shapes_of(parameters.items()))
    state = _bytes_on_disk([tensor.nbytes for tensor in kept.values()])
    return weights + state + _MANIFEST_BYTES, weights + _MANIFEST_BYTES


def _bytes_on_disk(sizes: list[int]) -> int:
    return sum(sizes) + _HEADER_BYTES * len(sizes)
