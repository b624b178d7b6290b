"""The declarations (`train.optimization.declared_state`) of torch's optimizers, and tensors that are made from them.

A new optimizer adds its declaration to `DECLARED`, or has one of its own as `declared`, where that depends on the roles
of its parameters; nothing else in the project names what one keeps.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from model.counts import Shape
from train.optimization.adamw import AdamW
from train.optimization.declared_state import ADAMW, OptimizerState, StateTensor

DECLARED: dict[type[torch.optim.Optimizer], OptimizerState] = {AdamW: ADAMW, torch.optim.AdamW: ADAMW}


def state_of(optimizer: torch.optim.Optimizer) -> OptimizerState:
    """An optimizer's declaration.

    Raises TypeError for one that has none: its checkpoints could not be read.
    """
    declared = getattr(optimizer, "declared", None) or DECLARED.get(type(optimizer))
    if not isinstance(declared, OptimizerState):
        raise TypeError(
            f"{type(optimizer).__name__} declares no state: add it to train/optimization/optimizer_state.py"
        )
    return declared


def dtype_of(kept: StateTensor) -> torch.dtype:
    dtype = getattr(torch, kept.dtype)
    assert isinstance(dtype, torch.dtype), kept.dtype
    return dtype


def empty_state(kept: StateTensor, parameter: nn.Parameter, group: Mapping[str, Any]) -> Tensor:
    """An uninitialised tensor as declared, where `Optimizer.load_state_dict` would put it.

    Args:
        group: the optimizer's parameter group that the parameter is in.
    """
    dtype = dtype_of(kept)
    if kept.shape == tuple(parameter.shape) and not kept.is_count:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    on_device = not kept.is_count or group.get("fused") or group.get("capturable")
    return torch.empty(kept.shape, dtype=dtype, device=parameter.device if on_device else "cpu")


def shapes_of(parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Shape]:
    return {name: tuple(parameter.shape) for name, parameter in parameters}
