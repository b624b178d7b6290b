"""Cross-entropy of the output layer, without ever holding all logits.

At 50,304 ids the logits of one micro-batch outweigh everything else in memory. The rows are therefore taken a chunk at
a time: logits, loss, and at once the gradients of the hidden states and of the head's weight, so that a chunk's logits
are gone before the next (the idea of Liger Kernel, Hsu et al. 2024, arXiv:2410.10989; here in plain torch). Where a
whole model is compiled the plain formula is used.

N rows (tokens), n rows of a chunk, C width, V padded vocabulary.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from model.chunk_kernel import IGNORE_INDEX, ChunkKernel
from model.precision import matmul_dtype

__all__ = ["IGNORE_INDEX", "Reduction", "head_loss", "soft_capped"]

Reduction = Literal["sum", "none"]

CHUNK_ROWS_CPU = 512
CHUNK_ROWS_GPU = 4096
CHUNK_ROWS_KERNEL = 16_384  # on a GPU, where a kernel keeps nothing wide: fewer sums of the head's gradient
BLOCK_ROWS_CPU = 16  # rows that are widened at a time: they stay in a core's cache
SMALLEST_PROBABILITY = 1e-30  # whose logarithm is as exact as any


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    reduction: Reduction = "sum",
    *,
    scale: Tensor | None = None,
    kernel: ChunkKernel | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Cross-entropy of softmax(hidden @ weight.T) against targets; ids from `vocab_size` on get no probability.

    The matrix products run in autocast's dtype where autocast is on, everything else in float32 (float64 for float64
    input).

    Args:
        hidden: (..., C).
        weight: (V, C).
        targets: (...) int64; `IGNORE_INDEX` counts for nothing.
        vocab_size: real ids, at most V.
        reduction: sum: a scalar; none: one loss per target, 0 where ignored.
        scale: (): the gradient that the loss is going to get, as in `loss.backward(scale)`. The result is the same
            without it, and with another one that is got then; but float16's logits are kept where it isn't known.
        kernel: what works on a chunk's logits, where there is a compiled one.
        softcap: bound on the logits, as `soft_capped`; None: none.

    Returns:
        float32 (float64 for float64 input), a scalar or of the targets' shape.
    """
    rows, flat = hidden.flatten(0, -2), targets.flatten()  # (N, C), (N)
    dtype = matmul_dtype(hidden)
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    # Gradients made in the forward pass need a loss scaler's factor: without it float16 rounds most of them to 0.
    unscaled = dtype == torch.float16 and scale is None
    if torch.compiler.is_compiling() or (needs_grad and (reduction == "none" or unscaled)):
        losses = _plain_losses(rows, weight, flat, vocab_size, softcap)
    elif needs_grad:
        return _ChunkedLoss.apply(rows, weight, flat, vocab_size, dtype, scale, kernel, softcap)
    else:
        losses = _chunked_losses(rows, weight, flat, vocab_size, dtype, kernel, softcap)
    return losses.sum() if reduction == "sum" else losses.view(targets.shape)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def soft_capped(logits: Tensor, cap: float) -> Tensor:
    """cap·tanh(logits/cap), of the same shape and dtype, computed in float32 or wider (Gemma Team 2024, section 2)."""
    wide = logits.to(_wide(logits.dtype))
    return (cap * torch.tanh(wide / cap)).to(logits.dtype)


def _plain_losses(
    rows: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, softcap: float | None = None
) -> Tensor:
    logits = F.linear(rows, weight)
    logits = logits.to(_wide(logits.dtype))
    if softcap is not None:
        logits = soft_capped(logits, softcap)
    padding = torch.arange(weight.shape[0], device=weight.device) >= vocab_size
    return F.cross_entropy(
        logits.masked_fill(padding, float("-inf")), targets, reduction="none", ignore_index=IGNORE_INDEX
    )


def chunk_rows(device_type: str, *, compiled: bool) -> int:
    """Rows of a chunk. Args: compiled: there is a kernel."""
    if device_type == "cpu":
        return CHUNK_ROWS_CPU
    return CHUNK_ROWS_KERNEL if compiled else CHUNK_ROWS_GPU


def _chunked_losses(
    rows: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    dtype: torch.dtype,
    kernel: ChunkKernel | None,
    softcap: float | None,
) -> Tensor:
    """(N) losses and nothing else."""
    with torch.autocast(rows.device.type, enabled=False), torch.no_grad():
        head = _Head(rows.to(dtype), weight.to(dtype), targets, vocab_size, kernel, softcap)
        losses = torch.empty(len(rows), dtype=_wide(dtype), device=rows.device)
        for part in head.parts():
            losses[part] = head.losses(part)
        return losses


class _Head:
    """The output layer over its rows, a chunk at a time.

    There is room for one chunk's logits, taken once: fresh memory, page by page, costs a CPU a fifth more time.
    """

    def __init__(
        self,
        rows: Tensor,
        weight: Tensor,
        targets: Tensor,
        vocab_size: int,
        kernel: ChunkKernel | None,
        softcap: float | None,
    ) -> None:
        self._rows, self._weight, self._targets, self._vocab_size = rows, weight, targets, vocab_size
        self._kernel, self._softcap = kernel, softcap
        self._size = min(len(rows), chunk_rows(rows.device.type, compiled=kernel is not None))
        self._logits = rows.new_empty(self._size, len(weight))  # (n, V) in the dtype of the matrix products
        in_cache = rows.device.type == "cpu" and (softcap is not None or rows.dtype != _wide(rows.dtype))
        self._block = min(self._size, BLOCK_ROWS_CPU) if in_cache and kernel is None else self._size
        self._wide = self._logits  # where they are widened, a block after another; the same memory where they are wide
        if (wide := _wide(rows.dtype)) != rows.dtype and kernel is None:
            self._wide = rows.new_empty(self._block, len(weight), dtype=wide)
        self._slopes: Tensor | None = None  # of the soft-cap, for the gradient of a block

    def parts(self) -> list[slice]:
        """The chunks."""
        return _slices(len(self._rows), self._size)

    def losses(self, part: slice) -> Tensor:
        """(n) of a chunk."""
        if self._kernel is not None:
            return self.gradient(part, self._wide.new_ones(part.stop - part.start, 1, dtype=_wide(self._rows.dtype)))[0]
        return torch.cat([self._exponentials(part, block)[1] for block in self._multiply(part)])

    def gradient(self, part: slice, factor: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Losses (n) of a chunk, their gradient for its logits (n, V), and what is left to multiply that by (n, 1).

        The latter is left to the C-wide factors of the matrix products, where the dtype's range allows it.

        Args:
            factor: (n, 1) the gradient that each loss gets.
        """
        blocks = self._multiply(part)
        grad = self._logits[: part.stop - part.start]
        if self._kernel is not None:
            return self._kernel(grad, self._targets[part], factor, self._vocab_size, self._softcap), grad, None
        losses, left = [], []
        if self._softcap is not None and self._slopes is None:
            self._slopes = torch.empty_like(self._wide[: self._block])
        for block in blocks:
            exponentials, of_block, total = self._exponentials(part, block)
            exponentials.scatter_add_(1, _index(self._targets[part][block]), -total)
            if self._slopes is not None:
                exponentials.mul_(self._slopes[: len(exponentials)])
            share = factor[block] / total  # (., 1)
            if self._logits.dtype == torch.float16:
                exponentials.mul_(share)
            if self._wide is not self._logits:
                self._logits[block].copy_(exponentials)
            losses.append(of_block)
            left.append(share)
        return torch.cat(losses), grad, None if grad.dtype == torch.float16 else torch.cat(left)

    def _multiply(self, part: slice) -> list[slice]:
        """Fill the logits of a chunk; return the blocks in which they are widened."""
        count = part.stop - part.start
        torch.mm(self._rows[part], self._weight.T, out=self._logits[:count])
        if self._kernel is None and self._softcap is None:
            self._logits[:count, self._vocab_size :] = float("-inf")
        return _slices(count, self._block)

    def _exponentials(self, part: slice, block: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Of a block of b rows: exponentials of its logits (b, V), the losses (b), the exponentials' sums (b, 1)."""
        targets = self._targets[part][block]
        logits = self._logits[block]  # (b, V)
        if self._wide is not self._logits:
            logits = self._wide[: len(logits)].copy_(logits)
        if self._softcap is not None:
            self._cap(logits, self._softcap)
        if logits.device.type == "cpu":
            # one pass over the logits, all the rest is in cache; the sums are 1
            exponentials = torch.softmax(logits, dim=1, out=logits)
            total = exponentials.new_ones(len(logits), 1)
            chosen = exponentials.gather(1, _index(targets)).squeeze(1)  # (b)
            losses = -chosen.log()
            if bool((chosen < SMALLEST_PROBABILITY).any()):
                self._mend(losses, chosen, slice(part.start + block.start, part.start + block.stop))
        else:
            largest = logits.amax(dim=1, keepdim=True)  # (b, 1)
            shifted = logits.gather(1, _index(targets)).sub_(largest)  # (b, 1)
            exponentials = logits.sub_(largest).exp_()
            total = exponentials.sum(dim=1, keepdim=True)  # (b, 1)
            losses = (total.log() - shifted).squeeze(1)
        return exponentials, losses.masked_fill_(targets == IGNORE_INDEX, 0.0), total

    def _cap(self, logits: Tensor, cap: float) -> None:
        """Cap a block's logits (b, V) in place, then mask the padding; keep the slopes where a gradient is wanted."""
        logits.div_(cap).tanh_()
        if self._slopes is not None:
            torch.mul(logits, logits, out=self._slopes[: len(logits)]).neg_().add_(1)
        logits.mul_(cap)
        logits[:, self._vocab_size :] = float("-inf")

    def _mend(self, losses: Tensor, chosen: Tensor, where: slice) -> None:
        """Work out again, a few rows at a time, the losses of probabilities that are too small for their logarithm."""
        for few in (chosen < SMALLEST_PROBABILITY).nonzero().squeeze(1).split(BLOCK_ROWS_CPU):
            rows, targets = self._rows[where][few], self._targets[where][few]
            losses[few] = _plain_losses(rows, self._weight, targets, self._vocab_size, self._softcap)


class _ChunkedLoss(torch.autograd.Function):
    """Summed cross-entropy whose gradients the forward works out already.

    Measured on one CPU thread in float32, N = 2048, C = 256, V = 50,304, forward and backward: 1.04 of the time of the
    three matrix products by themselves and 0.7 of F.cross_entropy(F.linear(...)). 256, 512 and 1,024 rows a chunk are
    within 3 % of each other.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        targets: Tensor,
        vocab_size: int,
        dtype: torch.dtype,
        scale: Tensor | None,
        kernel: ChunkKernel | None,
        softcap: float | None,
    ) -> Tensor:
        with torch.autocast(rows.device.type, enabled=False):
            cast_rows, cast_weight = rows.to(dtype), weight.to(dtype)
            head = _Head(cast_rows, cast_weight, targets, vocab_size, kernel, softcap)
            parts = head.parts()
            rows_grad = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
            weight_grad = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
            if weight_grad is not None and not parts:
                weight_grad.zero_()
            losses = torch.empty(len(rows), dtype=_wide(dtype), device=rows.device)
            factor = (targets != IGNORE_INDEX).to(losses.dtype).unsqueeze(1)  # (N, 1)
            if scale is not None:
                factor = factor * scale
            for part in parts:
                losses[part], grad, left = head.gradient(part, factor[part])
                if rows_grad is not None:
                    product = grad @ cast_weight  # (n, C)
                    rows_grad[part] = product if left is None else product * left
                if weight_grad is not None:
                    narrow = cast_rows[part] if left is None else (cast_rows[part] * left).to(dtype)  # (n, C)
                    _add_product(weight_grad, grad, narrow, first=part.start == 0)
        ctx.save_for_backward(rows_grad, weight_grad)
        ctx.scale = scale
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.saved_tensors
        if grad_loss is not ctx.scale:  # by itself, not by its value, for which a GPU would have to be waited for
            factor = grad_loss if ctx.scale is None else grad_loss / ctx.scale
            # In place: the copies would be as large as the embedding. A second backward is refused by autograd.
            grads = tuple(None if grad is None else grad.mul_(factor) for grad in grads)
        return *grads, None, None, None, None, None, None


def _slices(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size or 1)]


def _index(targets: Tensor) -> Tensor:
    """(n, 1) columns to pick; any where the target is ignored."""
    return targets.masked_fill(targets == IGNORE_INDEX, 0).unsqueeze(1)


def _add_product(total: Tensor, grad: Tensor, rows: Tensor, *, first: bool) -> None:
    """total += gradᵀ rows, kept in the total's (wider) dtype; the first is written over what stands there."""
    if total.dtype != grad.dtype:
        product = grad.T @ rows
        total.copy_(product) if first else total.add_(product)
    elif first:
        torch.mm(grad.T, rows, out=total)
    else:
        total.addmm_(grad.T, rows)
