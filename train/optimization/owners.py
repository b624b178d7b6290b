"""Which rank owns which tensor: one map, from names and sizes, for sharded updates and every save; without torch."""

import math
from collections.abc import Mapping

from model.counts import Shape
from train.optimization.declared_state import OptimizerState

Size = tuple[int, int]  # bytes of state, elements

# Of a sharded update, in which every rank sends the weights that it owns
BUCKET_BYTES = 32 << 20  # of small tensors that travel together
IN_FLIGHT = 2  # buckets that are under way at a time: one is unpacked while the next arrives
BUFFER_BYTES = BUCKET_BYTES * IN_FLIGHT


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


def owners_of(shapes: Mapping[str, Shape], declared: OptimizerState, world_size: int) -> dict[str, int]:
    """The owner of each trained parameter and of what an optimizer keeps of it."""
    sizes = {name: (declared.nbytes({name: shape}), math.prod(shape)) for name, shape in shapes.items()}
    return owners(sizes, world_size)
