"""Which rank owns which tensor: one map, from names and sizes, for sharded updates and for every save."""

from collections.abc import Mapping

from torch import nn

from train.optimization.optimizer_state import OptimizerState, shapes_of

Size = tuple[int, int]  # bytes of state, elements


def owners(sizes: Mapping[str, Size], world_size: int) -> dict[str, int]:
    """The rank that owns each named tensor: largest first, always to the rank with the least so far.

    State counts first, so that no rank has more of it than the mean and the largest tensor's; elements decide ties.
    """
    loads = [(0, 0)] * world_size
    owner = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name][0], -sizes[name][1], name)):
        rank = loads.index(min(loads))
        owner[name] = rank
        loads[rank] = (loads[rank][0] + sizes[name][0], loads[rank][1] + sizes[name][1])
    return owner


def owners_of(parameters: Mapping[str, nn.Parameter], declared: OptimizerState, world_size: int) -> dict[str, int]:
    """The owner of each trained parameter and of what an optimizer keeps of it."""
    shapes = shapes_of(parameters.items())
    sizes = {name: (declared.nbytes({name: shape}), parameters[name].numel()) for name, shape in shapes.items()}
    return owners(sizes, world_size)
