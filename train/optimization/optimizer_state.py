"""What an optimizer keeps of each parameter, declared: checkpoints, their sizes and the memory estimate ask here.

A new optimizer adds its declaration to `DECLARED`, or has one of its own as `declared`, where that depends on the roles
of its parameters; nothing else in the project names what one keeps.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.checkpoint_manifest import OPTIMIZER_OF_FORMAT_1
from train.optimization.adamw import AdamW

Shape = tuple[int, ...]
MUON = "muon"


@dataclass(frozen=True)
class StateTensor:
    """One tensor that is kept of a parameter.

    non_negative: a count or a mean of squares. is_count: torch's optimizers keep it on the CPU, unless one kernel does
    everything (their options fused and capturable); all else is where the parameter is.
    """

    shape: Shape
    dtype: torch.dtype = torch.float32
    non_negative: bool = False
    is_count: bool = False

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def empty(self, parameter: nn.Parameter, group: Mapping[str, Any]) -> Tensor:
        """An uninitialised tensor of this kind, where `Optimizer.load_state_dict` would put it.

        Args:
            group: the optimizer's parameter group that the parameter is in.
        """
        if self.shape == tuple(parameter.shape) and not self.is_count:
            return torch.empty_like(parameter, dtype=self.dtype, requires_grad=False)
        on_device = not self.is_count or group.get("fused") or group.get("capturable")
        return torch.empty(self.shape, dtype=self.dtype, device=parameter.device if on_device else "cpu")


@dataclass(frozen=True)
class OptimizerState:
    """An optimizer's declaration.

    Attributes:
        name: by which checkpoints name the optimizer; it never changes once released.
        of: a parameter's name and shape to what is kept of it after a step, by state key; {} where that is nothing.
    """

    name: str
    of: Callable[[str, Shape], Mapping[str, StateTensor]]

    def tensors(self, shapes: Mapping[str, Shape]) -> dict[str, StateTensor]:
        """Everything that is kept of these parameters, as `parameter name/state key`."""
        return {f"{name}/{key}": kept for name, shape in shapes.items() for key, kept in self.of(name, shape).items()}

    def nbytes(self, shapes: Mapping[str, Shape]) -> int:
        """Bytes that are kept of these parameters."""
        return sum(kept.nbytes for kept in self.tensors(shapes).values())


def _kept_by_adamw(name: str, shape: Shape) -> dict[str, StateTensor]:
    """The number of steps, the mean of gradients, the mean of their squares."""
    return {
        "step": StateTensor((), non_negative=True, is_count=True),
        "exp_avg": StateTensor(shape),
        "exp_avg_sq": StateTensor(shape, non_negative=True),
    }


def muon_state(matrices: Collection[str]) -> OptimizerState:
    """Of Muon with AdamW's part. Args: matrices: names of the parameters that Muon updates."""

    def kept(name: str, shape: Shape) -> dict[str, StateTensor]:
        return {"momentum_buffer": StateTensor(shape)} if name in matrices else _kept_by_adamw(name, shape)

    return OptimizerState(MUON, kept)


ADAMW = OptimizerState(OPTIMIZER_OF_FORMAT_1, _kept_by_adamw)
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


def shapes_of(parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Shape]:
    return {name: tuple(parameter.shape) for name, parameter in parameters}
