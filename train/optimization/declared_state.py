"""What an optimizer keeps of each parameter, declared: checkpoints, their sizes and the memory estimate ask here.

Without torch: `train.optimization.optimizer_state` says which optimizer has which declaration.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from common.checkpoint_manifest import OPTIMIZER_OF_FORMAT_1
from model.counts import Shape

MUON = "muon"
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "int32": 4, "float64": 8, "uint8": 1, "int8": 1}


@dataclass(frozen=True)
class StateTensor:
    """One tensor that is kept of a parameter.

    dtype: torch's name of it. non_negative: a count or a mean of squares. is_count: torch's optimizers keep it on the
    CPU, unless one kernel does everything (their options fused and capturable); all else is where the parameter is.
    """

    shape: Shape
    dtype: str = "float32"
    non_negative: bool = False
    is_count: bool = False

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


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


def newton_schulz_flops(shape: Sequence[int], rows: Sequence[int], iterations: int) -> int:
    """Of Muon's iterations for the matrices that are stacked in one, with heights `rows` (() for a single one)."""
    sizes = [sorted((height, shape[1])) for height in rows or shape[:1]]
    return sum(iterations * (4 * small**2 * large + 2 * small**3) for small, large in sizes)
