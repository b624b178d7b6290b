"""Who owns which tensor of the training state, and how many bytes they are."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

WEIGHTS, OPTIMIZER = "weights", "optimizer"
COUNT = "step"  # of the optimizer's state of a parameter: a scalar
STATE = (COUNT, "exp_avg", "exp_avg_sq")  # all of it: AdamW's

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


def share_of(mine: set[str], model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Weights and optimizer state of the parameters in `mine`, by kind of file."""
    weights = {name: p.detach() for name, p in named_parameters(model).items() if name in mine}
    state = optimizer_tensors(model, optimizer)
    return {WEIGHTS: weights, OPTIMIZER: {name: t for name, t in state.items() if name.rsplit("/", 1)[0] in mine}}


def checkpoint_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """(bytes of a whole checkpoint, bytes of one of the weights alone), of all ranks together, after any step.

    The tensors exactly, and a little more than their files' headers and the manifest take. AdamW holds two moments as
    large as the parameter and its step count.
    """
    weights = _bytes_on_disk({name: p.nbytes for name, p in named_parameters(model).items()})
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = {(index, key): size for index, p in enumerate(trained) for key, size in enumerate((p.nbytes, p.nbytes, 4))}
    return weights + _bytes_on_disk(states) + _MANIFEST_BYTES, weights + _MANIFEST_BYTES


def _bytes_on_disk(sizes: Mapping[Any, int]) -> int:
    return sum(sizes.values()) + _HEADER_BYTES * len(sizes)
