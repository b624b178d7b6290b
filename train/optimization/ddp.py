"""The one place that knows DistributedDataParallel: wrapping, and when gradients are added up over ranks.

Everybody else holds the plain model: its parameters are the ones trained, and their names carry no prefix.
"""

import contextlib

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model.precision import Dtype, autocast
from model.ranks import Ranks


class Parallel:
    """A model on this rank that learns together with its copies on the others."""

    def __init__(self, model: nn.Module, ranks: Ranks, *, dtype: Dtype) -> None:
        self.model = model
        self._device = ranks.device
        self._dtype = dtype
        self._world_size = ranks.world_size
        self._ddp: DistributedDataParallel | None = None
        if ranks.world_size > 1:
            self._ddp = DistributedDataParallel(
                model,
                device_ids=[ranks.device.index] if ranks.device.type == "cuda" else None,
                gradient_as_bucket_view=True,  # else the buckets hold a second copy of all gradients
            )

    def backward(
        self, tokens: Tensor, targets: Tensor, document_ids: Tensor | None, *, scale: float | Tensor, last: bool
    ) -> Tensor:
        """Forward and backward of one micro-batch; return its summed loss (), detached.

        Gradients accumulate; with `last` they are added up over all ranks. Whether to is settled before the forward:
        DDP reads it there, and settling it later makes the copies drift apart without an error.

        Args:
            tokens, targets, document_ids: (M, T) int64.
            scale: what the summed loss is multiplied by, so that the gradients of all micro-batches of all ranks add
                up to the gradient of the mean.
        """
        ddp = self._ddp
        quiet = ddp.no_sync() if ddp is not None and not last else contextlib.nullcontext()
        with quiet:
            with autocast(self._dtype, self._device):
                loss = (ddp or self.model)(tokens, targets, document_ids=document_ids)
            # DDP divides the sum over ranks by their number
            (loss * (scale * self._world_size)).backward()
        return loss.detach()

    def zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        """Forget the gradients. Under DDP they are views into its buckets and stay in place."""
        optimizer.zero_grad(set_to_none=self._ddp is None)

    def warm_up(self, tokens: Tensor, document_ids: Tensor | None, optimizer: torch.optim.Optimizer) -> None:
        """One forward and backward whose gradients are thrown away.

        DDP lays out its buckets anew after the first backward, which changes the order of its sums from 3 ranks on: a
        resumed run would differ from the undisturbed one in its first step. Compilation happens here as well.

        Args:
            tokens, document_ids: (M, T) int64, of a micro-batch's shape.
        """
        self.backward(tokens, tokens, document_ids, scale=0.0, last=False)
        self.backward(tokens, tokens, document_ids, scale=0.0, last=True)
        self.zero_grad(optimizer)
        if tokens.device.type == "cuda":
            torch.cuda.synchronize(tokens.device)
