"""An optimizer of which every rank keeps and updates only its part (Rajbhandari et al. 2020, stage 1 of ZeRO).

Gradients are whole on every rank: they are zeroed, unscaled, checked and measured there as without sharding. After the
update each rank sends the weights that it owns to all others.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from model.ranks import Ranks
from train.optimization.muon import passing_on
from train.optimization.optimizer_state import state_of
from train.optimization.owners import BUCKET_BYTES, IN_FLIGHT


@dataclass(frozen=True)
class Bucket:
    """Tensors that their owner sends together."""

    owner: int
    tensors: tuple[Tensor, ...]

    def packed(self, rank: int) -> Tensor:
        """What is sent, flat (n,): a single tensor is its own buffer; room for several on ranks that receive them."""
        if len(self.tensors) == 1 and self.tensors[0].is_contiguous():
            return self.tensors[0].view(-1)
        if rank == self.owner:
            return torch.cat([tensor.reshape(-1) for tensor in self.tensors])
        return self.tensors[0].new_empty(sum(tensor.numel() for tensor in self.tensors))

    def unpack(self, buffer: Tensor, rank: int) -> None:
        if rank != self.owner and buffer.data_ptr() != self.tensors[0].data_ptr():
            parts = buffer.split([tensor.numel() for tensor in self.tensors])
            for tensor, part in zip(self.tensors, parts, strict=True):
                tensor.copy_(part.view_as(tensor))


class Sharded(torch.optim.Optimizer):
    """Presents every parameter, as the whole optimizer would; the state is that of this rank's part.

    Attributes:
        own: the optimizer of this rank's part. declared: what it keeps of each parameter, on whatever rank.
    """

    def __init__(
        self,
        own: torch.optim.Optimizer,
        parameters: Mapping[str, nn.Parameter],
        owner: Mapping[str, int],
        ranks: Ranks,
    ) -> None:
        """All ranks make it together, for the same parameters and owners."""
        theirs = [parameter for name, parameter in parameters.items() if owner[name] != ranks.rank]
        super().__init__([{"params": theirs}], {})
        self.own, self.declared, self._ranks = own, state_of(own), ranks
        self.param_groups = [*own.param_groups, *self.param_groups]
        self.state = own.state
        self._buckets = buckets(parameters, owner, ranks.world_size)
        if getattr(own, "_step_supports_amp_scaling", False):
            self._step_supports_amp_scaling = True

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update this rank's part, then get the others'. All ranks call; what they send depends on no gradient."""
        if (found := vars(self).get("found_inf")) is not None:
            vars(self)["found_inf"] = self._ranks.max_tensor(found.clone())  # (): one verdict for all parts
        with passing_on(self, self.own):
            self.own.step()
        send_to_all(self._buckets, self._ranks)


def send_to_all(these: Sequence[Bucket], ranks: Ranks) -> None:
    """Give every rank the tensors of each bucket as its owner has them. All ranks, of several, call."""
    rank, under_way = ranks.rank, deque[tuple[Bucket, Tensor, Any]]()
    for bucket in these:
        if len(under_way) == IN_FLIGHT:
            _receive(rank, *under_way.popleft())
        buffer = bucket.packed(rank)  # is held until it has arrived
        under_way.append((bucket, buffer, ranks.start_broadcast(buffer, bucket.owner)))
    for sent in under_way:
        _receive(rank, *sent)


def _receive(rank: int, bucket: Bucket, buffer: Tensor, work: Any) -> None:
    work.wait()
    bucket.unpack(buffer, rank)


def own_part(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """What updates parameters on this rank: the optimizer itself, unless it is sharded."""
    return optimizer.own if isinstance(optimizer, Sharded) else optimizer


def buckets(parameters: Mapping[str, nn.Parameter], owner: Mapping[str, int], world_size: int) -> list[Bucket]:
    """The same list on all ranks: every owner's tensors in the model's order, the owners in turn."""
    each = []
    for rank in range(world_size):
        tensors = [parameter.detach() for name, parameter in parameters.items() if owner[name] == rank]
        each.append([Bucket(rank, tuple(group)) for group in _grouped(tensors)])
    return [bucket for bucket in chain.from_iterable(zip_longest(*each)) if bucket is not None]


def _grouped(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Tensors of one dtype, together up to a bucket's size; a larger one by itself."""
    groups: list[list[Tensor]] = []
    for tensor in tensors:
        last = groups[-1] if groups else []
        fits = sum(other.nbytes for other in last) + tensor.nbytes <= BUCKET_BYTES
        if last and fits and last[0].dtype == tensor.dtype:
            last.append(tensor)
        else:
            groups.append([tensor])
    return groups
