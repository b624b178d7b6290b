"""The one place that knows DistributedDataParallel: wrapping, and when gradients are averaged over ranks.

Everybody else holds the plain model: its parameters are the ones trained, and their names carry no prefix.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function, Variable
from torch.nn.parallel import DistributedDataParallel

from model.ranks import Ranks

BUCKET_MIB = 100  # torch's 25 are more messages than fast links need; several are still under way while backward runs


class Parallel:
    """A model on this rank that learns together with its replicas on the others."""

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        self.model = model
        self._ddp: DistributedDataParallel | None = None
        if ranks.world_size > 1:
            self._ddp = DistributedDataParallel(
                model,
                device_ids=[ranks.device.index] if ranks.device.type == "cuda" else None,
                bucket_cap_mb=BUCKET_MIB,
                gradient_as_bucket_view=True,  # else the buckets hold a second copy of all gradients
            )

    @property
    def replica(self) -> nn.Module:
        """What a forward in training calls."""
        return self._ddp or self.model

    def backward_of(self, *, last: bool) -> contextlib.AbstractContextManager[object]:
        """Around forward and backward of a micro-batch: gradients accumulate; the last average them over ranks.

        DDP reads this in the forward, so it must be set before it: set later, the replicas would drift apart without an
        error.
        """
        return contextlib.nullcontext() if self._ddp is None or last else self._ddp.no_sync()

    def backward(self, loss: Tensor, factor: Tensor, on_reduction: Callable[[], None]) -> None:
        """Gradients of a loss () times a factor ().

        Args:
            on_reduction: called when this rank's own gradients are done, and it may have to wait for other ranks.
        """
        # The engine calls what was queued first first, and DDP queues its wait at the first parameter's gradient.
        loss.register_hook(lambda _: Variable._execution_engine.queue_callback(on_reduction))
        _Weighted.apply(loss, factor).backward()

    def zero_grad(self, optimizer: torch.optim.Optimizer, *, accumulating: bool) -> None:
        """Forget the gradients. Under DDP they are views into its buckets, in which they accumulate.

        Args:
            accumulating: whether a step has several micro-batches. A single one's gradients are copied into the
                buckets, each as it comes, which takes less than half as long as to zero them and add.
        """
        optimizer.zero_grad(set_to_none=self._ddp is None or not accumulating)


class _Weighted(Function):
    """A loss whose gradient is a factor, the very tensor, whatever its own is.

    `loss.backward(factor)` comes to the same, but checks the factor's shape by code that imports sympy: about
    0.5 s of processor time in every process.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, factor: Tensor) -> Tensor:
        ctx.factor = factor
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.factor, None
