"""What each rank writes of the training state, and its size in bytes."""

import torch
from torch import Tensor, nn

from train.checkpoints.disk_space import bytes_of_checkpoint
from train.optimization.optimizer import trained_parameters
from train.optimization.optimizer_state import dtype_of, shapes_of, state_of
from train.optimization.owners import owners_of
from train.optimization.weight_average import EMA, WeightAverage

WEIGHTS, OPTIMIZER = "weights", "optimizer"


def owned_by(rank: int, world_size: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> set[str]:
    """Names of the parameters that a rank owns: it writes them, and updates them where the optimizer is sharded."""
    owner = owners_of(shapes_of(trained_parameters(model).items()), state_of(optimizer), world_size)
    return {name for name, other in owner.items() if other == rank}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as `parameter name/state key`: all that is declared, once a parameter has had a step."""
    declared = state_of(optimizer)
    tensors: dict[str, Tensor] = {}
    for name, parameter in trained_parameters(model).items():
        kept = {key: value for key, value in optimizer.state.get(parameter, {}).items() if isinstance(value, Tensor)}
        shapes = {key: item.shape for key, item in declared.of(name, tuple(parameter.shape)).items()}
        assert not kept or shapes == shapes_of(kept.items()), "an optimizer keeps other state than it declares"
        tensors |= {f"{name}/{key}": value for key, value in kept.items()}
    return tensors


def expected_names(
    model: nn.Module, optimizer: torch.optim.Optimizer, average: WeightAverage | None = None
) -> dict[str, set[str]]:
    """What all ranks together write after a step, by kind of file."""
    parameters = trained_parameters(model)
    names = {WEIGHTS: set(parameters), OPTIMIZER: set(state_of(optimizer).tensors(shapes_of(parameters.items())))}
    return names | ({} if average is None else {EMA: set(parameters)})


def share_of(
    mine: set[str], model: nn.Module, optimizer: torch.optim.Optimizer, average: WeightAverage | None = None
) -> dict[str, dict[str, Tensor]]:
    """Weights, optimizer state and averaged weights of the parameters in `mine`, by kind of file.

    Where all steps so far were skipped, an optimizer may have no state yet: the zeros that it starts with are written.
    """
    weights = {name: p.detach() for name, p in trained_parameters(model).items() if name in mine}
    kept = {name: t for name, t in optimizer_tensors(model, optimizer).items() if name.rsplit("/", 1)[0] in mine}
    if not kept:
        declared = state_of(optimizer).tensors(shapes_of(weights.items()))
        kept = {name: torch.zeros(item.shape, dtype=dtype_of(item)) for name, item in declared.items()}
    return {WEIGHTS: weights, OPTIMIZER: kept} | ({} if average is None else {EMA: average.tensors})


def checkpoint_bytes(
    model: nn.Module, optimizer: torch.optim.Optimizer, average: WeightAverage | None = None
) -> tuple[int, int]:
    """(bytes of a whole checkpoint, bytes of one with only weights), of all ranks together, after any step.

    The tensors exactly, and a little more than their files' headers and the manifest take. Averaged weights are among
    the weights.
    """
    shapes = shapes_of(trained_parameters(model).items())
    return bytes_of_checkpoint(shapes, state_of(optimizer), averaged=average is not None)
