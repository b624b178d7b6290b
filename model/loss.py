"""Cross-entropy of the output layer, without ever holding all logits.

At 50,304 ids the logits of one micro-batch outweigh everything else in memory. In eager mode the rows are therefore
taken a chunk at a time: logits, loss, and at once the gradients of the hidden states and of the head's weight, so that
a chunk's logits are gone before the next (the idea of Liger Kernel, Hsu et al. 2024, arXiv:2410.10989; here in plain
torch). Under torch.compile the plain formula is used, because inductor fuses it.

N rows (tokens), C width, V padded vocabulary.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

IGNORE_INDEX = -100
Reduction = Literal["sum", "none"]

CHUNK_ROWS_CPU = 256
CHUNK_ROWS_GPU = 4096


def head_loss(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, reduction: Reduction = "sum") -> Tensor:
    """Cross-entropy of softmax(hidden @ weight.T) against targets; ids from `vocab_size` on get no probability.

    The matrix products run in autocast's dtype where autocast is on, everything else in float32 (float64 for float64
    input).

    Args:
        hidden: (..., C).
        weight: (V, C).
        targets: (...) int64; `IGNORE_INDEX` counts for nothing.
        vocab_size: real ids, at most V.
        reduction: sum: a scalar; none: one loss per target, 0 where ignored.

    Returns:
        float32 (float64 for float64 input), a scalar or of the targets' shape.
    """
    rows, flat = hidden.flatten(0, -2), targets.flatten()  # (N, C), (N)
    dtype = _matmul_dtype(hidden)
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    # Gradients made in the forward pass miss a loss scaler's factor, and without it float16 rounds most of them to 0.
    plain = torch.compiler.is_compiling() or (needs_grad and (reduction == "none" or dtype == torch.float16))
    if plain:
        losses = _plain_losses(rows, weight, flat, vocab_size)
    elif needs_grad:
        return _ChunkedLoss.apply(rows, weight, flat, vocab_size, dtype)
    else:
        losses = _chunked_losses(rows, weight, flat, vocab_size, dtype)
    return losses.sum() if reduction == "sum" else losses.view(targets.shape)


def _matmul_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _plain_losses(rows: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    logits = F.linear(rows, weight)
    logits = logits.to(_wide(logits.dtype))
    padding = torch.arange(weight.shape[0], device=weight.device) >= vocab_size
    return F.cross_entropy(
        logits.masked_fill(padding, float("-inf")), targets, reduction="none", ignore_index=IGNORE_INDEX
    )


def _chunk_rows(device: torch.device) -> int:
    return CHUNK_ROWS_CPU if device.type == "cpu" else CHUNK_ROWS_GPU


def _chunk_losses(rows: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (n), logits (n, V) and their log-sum-exp (n, 1) of one chunk."""
    logits = rows @ weight.T
    logits = logits.to(_wide(logits.dtype))  # (n, V)
    logits[:, vocab_size:] = float("-inf")
    total = torch.logsumexp(logits, dim=1, keepdim=True)  # (n, 1)
    chosen = logits.gather(1, targets.clamp(min=0).unsqueeze(1))  # (n, 1)
    losses = (total - chosen).squeeze(1).masked_fill(targets == IGNORE_INDEX, 0.0)
    return losses, logits, total


def _chunked_losses(rows: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, dtype: torch.dtype) -> Tensor:
    with torch.autocast(rows.device.type, enabled=False), torch.no_grad():
        rows, weight, size = rows.to(dtype), weight.to(dtype), _chunk_rows(rows.device)
        chunks = zip(rows.split(size), targets.split(size), strict=True)
        return torch.cat([_chunk_losses(part, weight, target, vocab_size)[0] for part, target in chunks])


class _ChunkedLoss(torch.autograd.Function):
    """Summed cross-entropy whose backward only scales what the forward has already worked out."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, dtype: torch.dtype) -> Tensor:
        with torch.autocast(rows.device.type, enabled=False):
            cast_rows, cast_weight, size = rows.to(dtype), weight.to(dtype), _chunk_rows(rows.device)
            rows_grad = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
            weight_grad = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
            losses = []
            for start in range(0, len(targets), size):
                part = slice(start, start + size)
                loss, logits, total = _chunk_losses(cast_rows[part], cast_weight, targets[part], vocab_size)
                losses.append(loss)
                grad = _logits_grad(logits, total, targets[part]).to(dtype)  # (n, V)
                if rows_grad is not None:
                    rows_grad[part] = grad @ cast_weight
                if weight_grad is not None:
                    _add_product(weight_grad, grad, cast_rows[part])
                del logits, grad
        ctx.save_for_backward(rows_grad, weight_grad)
        return torch.cat(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        # Scaled in place: the copies would be as large as the embedding. A second backward is refused by autograd.
        rows_grad, weight_grad = (None if grad is None else grad.mul_(grad_loss) for grad in ctx.saved_tensors)
        return rows_grad, weight_grad, None, None, None


def _logits_grad(logits: Tensor, total: Tensor, targets: Tensor) -> Tensor:
    """softmax(logits) minus one at the target, zero in ignored rows; overwrites the logits."""
    grad = logits.sub_(total).exp_()
    index = targets.clamp(min=0).unsqueeze(1)
    grad.scatter_add_(1, index, torch.full_like(total, -1.0))
    return grad.mul_((targets != IGNORE_INDEX).unsqueeze(1))


def _add_product(total: Tensor, grad: Tensor, rows: Tensor) -> None:
    """total += gradᵀ rows, kept in the total's (wider) dtype."""
    if total.dtype == grad.dtype:
        total.addmm_(grad.T, rows)
    else:
        total += grad.T @ rows
