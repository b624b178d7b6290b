"""Cross-entropy of the output layer, without ever holding all logits.

At 50,304 ids the logits of one micro-batch outweigh everything else in memory. The rows are therefore taken a chunk at
a time: logits, loss, and at once the gradients of the hidden states and of the head's weight, so that a chunk's logits
are gone before the next (the idea of Liger Kernel, Hsu et al. 2024, arXiv:2410.10989; here in plain torch). Where each
token's loss is wanted, and only a backward tells what weight it has (preferences, rewards), that backward computes a
chunk's logits again. Where a whole model is compiled the plain formula is used. `model.loss_chunks` has what happens
inside a chunk.

N rows (tokens), n rows of a chunk, C width, V padded vocabulary.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.chunk_kernel import IGNORE_INDEX, ChunkKernel
from model.loss_chunks import Gradient, Head, Rules, cross_entropies, plain_logits, soft_capped, wide_dtype
from model.precision import matmul_dtype

__all__ = ["IGNORE_INDEX", "Reduction", "head_entropies", "head_loss", "head_losses", "soft_capped"]

Reduction = Literal["sum", "none"]


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
        reduction: sum: a scalar; none: one loss per target, its negative log-probability, 0 where ignored; their
            backward computes the logits again.
        scale: (): the gradient that the loss is going to get, as in `loss.backward(scale)`. The result is the same
            without it, and with another one that is got then; but float16's logits are kept where it isn't known.
        kernel: what works on a chunk's logits, where there is a compiled one.
        softcap: bound on the logits, as `soft_capped`; None: none.

    Returns:
        float32 (float64 for float64 input), a scalar or of the targets' shape.
    """
    rows, flat, rules = hidden.flatten(0, -2), targets.flatten(), Rules(vocab_size, softcap, kernel=kernel)
    dtype = matmul_dtype(hidden)
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    if torch.compiler.is_compiling() or (needs_grad and reduction == "sum" and _is_unscaled(dtype, scale)):
        losses = cross_entropies(plain_logits(rows, weight, rules), flat)
    elif needs_grad and reduction == "none":
        losses = _RecomputedLosses.apply(rows, weight, flat, dtype, rules, False)[0]
    elif needs_grad:
        return _ChunkedLoss.apply(rows, weight, flat, dtype, scale, rules)[0]
    else:
        losses = _chunked_losses(rows, weight, flat, dtype, rules)
    return losses.sum() if reduction == "sum" else losses.view(targets.shape)


def head_losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    z_loss: float | None = None,
    *,
    scale: Tensor | None = None,
    kernel: ChunkKernel | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The summed cross-entropy with the z-loss added, (), and what it consists of.

    The z-loss is z_loss·logsumexp(logits)² of each target that is not ignored, over the capped logits of real ids
    (Chowdhery et al. 2022, arXiv:2204.02311, section 5: 1e-4). It keeps the logits' sum of exponentials near 1.

    Args: as `head_loss`; z_loss: None: nothing is added, and sum and gradients are those of `head_loss` to the bit.

    Returns that, the z-loss by itself, (), and the cross-entropies, of the targets' shape; the latter two detached.
    """
    rows, flat, rules = hidden.flatten(0, -2), targets.flatten(), Rules(vocab_size, softcap, z_loss, kernel)
    dtype = matmul_dtype(hidden)
    if torch.compiler.is_compiling() or _is_unscaled(dtype, scale):
        logits = plain_logits(rows, weight, rules)
        losses, z = cross_entropies(logits, flat), logits.new_zeros(())
        total = losses.sum()
        if z_loss is not None:
            z = rules.z_terms(logits.logsumexp(dim=1), flat).sum()
            total = total + z
    else:
        total, z, losses = _ChunkedLoss.apply(rows, weight, flat, dtype, scale, rules)
    return total, z.detach(), losses.detach().view(targets.shape)


def head_entropies(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    temperature: float = 1.0,
    *,
    kernel: ChunkKernel | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Each target's cross-entropy, as `head_loss` without a reduction, and the entropy of what it was chosen from.

    Args: as `head_loss`; temperature: the logits are divided by it, after the soft-cap.

    Returns both of the targets' shape, 0 where ignored, in nats. The entropies have no gradient.
    """
    if temperature != 1:  # c/τ·tanh(h/c) is the soft-cap c/τ of h/τ
        hidden = hidden / temperature
        softcap = None if softcap is None else softcap / temperature
    rows, flat, rules = hidden.flatten(0, -2), targets.flatten(), Rules(vocab_size, softcap, kernel=kernel)
    dtype = matmul_dtype(hidden)
    if torch.compiler.is_compiling():
        logits = plain_logits(rows, weight, rules)
        losses, entropies = cross_entropies(logits, flat), _entropies_of(logits.detach(), flat)
    elif torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        losses, entropies = _RecomputedLosses.apply(rows, weight, flat, dtype, rules, True)
    else:
        losses, entropies = _chunked_entropies(rows, weight, flat, dtype, rules)
    return losses.view(targets.shape), entropies.view(targets.shape)


def _entropies_of(logits: Tensor, targets: Tensor) -> Tensor:
    """(N) of logits (N, V), 0 where the target is ignored."""
    return torch.special.entr(logits.softmax(dim=1)).sum(dim=1).masked_fill(targets == IGNORE_INDEX, 0.0)


def _is_unscaled(dtype: torch.dtype, scale: Tensor | None) -> bool:
    """Gradients made in the forward need a loss scaler's factor: without it float16 rounds most of them to 0."""
    return dtype == torch.float16 and scale is None


def _chunked_losses(rows: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, rules: Rules) -> Tensor:
    """(N) losses and nothing else."""
    with torch.autocast(rows.device.type, enabled=False), torch.no_grad():
        head = Head(rows.to(dtype), weight.to(dtype), targets, rules)
        losses = torch.empty(len(rows), dtype=wide_dtype(dtype), device=rows.device)
        for part in head.parts():
            losses[part] = head.losses(part)
        return losses


def _chunked_entropies(
    rows: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, rules: Rules
) -> tuple[Tensor, Tensor]:
    """(N) losses and (N) entropies, and nothing else."""
    with torch.autocast(rows.device.type, enabled=False), torch.no_grad():
        head = Head(rows.to(dtype), weight.to(dtype), targets, rules._replace(kernel=None))
        losses = torch.empty(len(rows), dtype=wide_dtype(dtype), device=rows.device)
        entropies = torch.empty_like(losses)
        for part in head.parts():
            losses[part], entropies[part] = head.entropies(part)
        return losses, entropies


class _ChunkedLoss(torch.autograd.Function):
    """Summed cross-entropy, with the z-loss where it is wanted, whose gradients the forward works out already.

    Returns it, the z-loss's part of it, (), and the cross-entropies, (N). Only the first has a gradient.

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
        dtype: torch.dtype,
        scale: Tensor | None,
        rules: Rules,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        with torch.autocast(rows.device.type, enabled=False):
            cast_rows, cast_weight = rows.to(dtype), weight.to(dtype)
            head = Head(cast_rows, cast_weight, targets, rules)
            parts = head.parts()
            rows_grad, weight_grad = _gradients_for(ctx, rows, weight, parts)
            losses = torch.empty(len(rows), dtype=wide_dtype(dtype), device=rows.device)
            z_sum = losses.new_zeros(())
            factor = (targets != IGNORE_INDEX).to(losses.dtype).unsqueeze(1)  # (N, 1)
            if scale is not None:
                factor = factor * scale
            for part in parts:
                found = head.gradient(part, factor[part])
                losses[part] = found.losses
                if found.z_losses is not None:
                    z_sum += found.z_losses.sum()
                _add_gradients(found, part, cast_rows, cast_weight, rows_grad, weight_grad)
        ctx.save_for_backward(rows_grad, weight_grad)
        ctx.scale = scale
        ctx.mark_non_differentiable(z_sum, losses)
        return losses.sum() if rules.z_loss is None else losses.sum() + z_sum, z_sum, losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *without: Tensor | None) -> tuple[Tensor | None, ...]:
        grads = ctx.saved_tensors
        if grad_loss is not ctx.scale:  # by itself, not by its value, for which a GPU would have to be waited for
            factor = grad_loss if ctx.scale is None else grad_loss / ctx.scale
            # In place: the copies would be as large as the embedding. A second backward is refused by autograd.
            grads = tuple(None if grad is None else grad.mul_(factor) for grad in grads)
        return *grads, None, None, None, None


class _RecomputedLosses(torch.autograd.Function):
    """Cross-entropies (N), each with a gradient of its own: the backward computes a chunk's logits again.

    That is a fourth matrix product, where `_ChunkedLoss` has three, and no more memory. With `entropy` also the
    entropies (N), without a gradient; else an empty tensor.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, rules: Rules, entropy: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rows, weight, targets)
        ctx.dtype, ctx.rules = dtype, rules
        if entropy:
            losses, entropies = _chunked_entropies(rows, weight, targets, dtype, rules)
        else:
            losses = _chunked_losses(rows, weight, targets, dtype, rules)
            entropies = losses.new_empty(0)
        ctx.mark_non_differentiable(entropies)
        return losses, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor, *without: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, weight, targets = ctx.saved_tensors
        with torch.autocast(rows.device.type, enabled=False):
            cast_rows, cast_weight = rows.to(ctx.dtype), weight.to(ctx.dtype)
            head = Head(cast_rows, cast_weight, targets, ctx.rules)
            rows_grad, weight_grad = _gradients_for(ctx, rows, weight, head.parts())
            factor = grad_losses.masked_fill(targets == IGNORE_INDEX, 0.0).unsqueeze(1)  # (N, 1)
            for part in head.parts():
                found = head.gradient(part, factor[part])
                _add_gradients(found, part, cast_rows, cast_weight, rows_grad, weight_grad)
        return rows_grad, weight_grad, None, None, None, None


def _gradients_for(ctx: Any, rows: Tensor, weight: Tensor, parts: list[slice]) -> tuple[Tensor | None, Tensor | None]:
    """Room for the gradients of rows (N, C) and weight (V, C), where they are wanted."""
    rows_grad = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
    weight_grad = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
    if weight_grad is not None and not parts:
        weight_grad.zero_()
    return rows_grad, weight_grad


def _add_gradients(
    found: Gradient,
    part: slice,
    rows: Tensor,
    weight: Tensor,
    rows_grad: Tensor | None,
    weight_grad: Tensor | None,
) -> None:
    """Turn a chunk's gradient for its logits into those of its rows and of the weight.

    Args: rows, weight: in the dtype of the matrix products.
    """
    grad, left = found.logits, found.left
    if rows_grad is not None:
        product = grad @ weight  # (n, C)
        rows_grad[part] = product if left is None else product * left
    if weight_grad is not None:
        narrow = rows[part] if left is None else (rows[part] * left).to(rows.dtype)  # (n, C)
        _add_product(weight_grad, grad, narrow, first=part.start == 0)


def _add_product(total: Tensor, grad: Tensor, rows: Tensor, *, first: bool) -> None:
    """total += gradᵀ rows, kept in the total's (wider) dtype; the first is written over what stands there."""
    if total.dtype != grad.dtype:
        product = grad.T @ rows
        total.copy_(product) if first else total.add_(product)
    elif first:
        torch.mm(grad.T, rows, out=total)
    else:
        total.addmm_(grad.T, rows)
