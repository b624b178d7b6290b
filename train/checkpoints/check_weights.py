"""Whether weights are worth saving: finite, and the same on all ranks."""

import math

import torch
from torch import nn

from model.ranks import Ranks
from train.errors import NonFiniteWeights, ReplicasDiffer


def check_weights(ranks: Ranks, model: nn.Module) -> None:
    """Check that weights are finite and identical on all ranks before saving.

    Raises ReplicasDiffer or NonFiniteWeights on all ranks.
    """
    check_replicas(ranks, model)
    largest = torch.stack([torch.linalg.vector_norm(p.detach(), math.inf) for p in model.parameters()]).tolist()
    for (name, _), value in zip(model.named_parameters(), largest, strict=True):
        if not math.isfinite(value):
            raise NonFiniteWeights(f"{name} has weights that are NaN or inf: they are not saved")


def check_replicas(ranks: Ranks, model: nn.Module) -> None:
    """Compare checksums (sums of the bits, as integers) of all parameters over ranks.

    Raises ReplicasDiffer on all ranks, naming those that differ from rank 0 and the first tensor that does.
    """
    if ranks.world_size == 1:
        return
    sums = torch.stack([p.detach().view(torch.int32).sum(dtype=torch.int64) for p in model.parameters()])
    everyone = ranks.gather(sums.tolist())
    others = [rank for rank, values in enumerate(everyone) if values != everyone[0]]
    if others:
        names = [name for name, _ in model.named_parameters()]
        values = zip(names, everyone[0], everyone[others[0]], strict=True)
        first = next(name for name, ours, theirs in values if ours != theirs)
        raise ReplicasDiffer(
            f"the weights of ranks {others} differ from rank 0's, rank {others[0]}'s first in {first}: a faulty device "
            "or memory is likely"
        )
