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


def _chunked_losses(rows: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, dtype: torch.dtype) -> Tensor:
    """(N) losses and nothing else."""
    with torch.autocast(rows.device.type, enabled=False), torch.no_grad():
        rows, weight = rows.to(dtype), weight.to(dtype)
        scratch = _Scratch(rows, weight)
        losses = torch.empty(len(rows), dtype=_wide(dtype), device=rows.device)
        for part in scratch.parts():
            losses[part] = scratch.exponentials(rows[part], weight, targets[part], vocab_size)[1]
        return losses


class _Scratch:
    """Room for one chunk's logits, taken once: fresh memory, page by page, costs a CPU a fifth more time."""

    def __init__(self, rows: Tensor, weight: Tensor) -> None:
        self.rows = len(rows)
        self.size = min(len(rows), _chunk_rows(rows.device))
        self.narrow = rows.new_empty(self.size, len(weight))  # in the dtype of the matrix products
        wide = _wide(rows.dtype)
        self.wide = self.narrow if wide == rows.dtype else self.narrow.new_empty(self.narrow.shape, dtype=wide)

    def parts(self) -> list[slice]:
        return [slice(start, min(start + self.size, self.rows)) for start in range(0, self.rows, self.size or 1)]

    def exponentials(
        self, rows: Tensor, weight: Tensor, targets: Tensor, vocab_size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """exp(logits - their maximum) (n, V), the losses (n) and the sums of those exponentials (n, 1)."""
        product, logits = self.narrow[: len(rows)], self.wide[: len(rows)]
        torch.mm(rows, weight.T, out=product)
        if logits.dtype != product.dtype:
            logits.copy_(product)
        logits[:, vocab_size:] = float("-inf")
        largest = logits.amax(dim=1, keepdim=True)  # (n, 1)
        chosen = logits.gather(1, _index(targets)).sub_(largest)  # (n, 1)
        exponentials = logits.sub_(largest).exp_()
        total = exponentials.sum(dim=1, keepdim=True)  # (n, 1)
        losses = (total.log() - chosen).squeeze(1).masked_fill(targets == IGNORE_INDEX, 0.0)
        return exponentials, losses, total


class _ChunkedLoss(torch.autograd.Function):
    """Summed cross-entropy whose backward only scales what the forward has already worked out.

    The gradient of the logits is (e - s·[target]) / s for exponentials e that sum to s. Dividing by s is left to the
    narrow factors (C wide instead of V wide), so that the logits are passed over three times and no more.

    Measured on one CPU thread in float32, N = 2048, C = 256, V = 50,304, forward and backward: 0.7 of the time of
    F.cross_entropy(F.linear(...)), half of `_plain_losses`, and 1.1 of only the three matrix products. 256, 512 and
    1,024 rows a chunk are alike; 64 rows cost 1.2 times as much.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, dtype: torch.dtype) -> Tensor:
        with torch.autocast(rows.device.type, enabled=False):
            cast_rows, cast_weight = rows.to(dtype), weight.to(dtype)
            rows_grad = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
            weight_grad = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
            losses = torch.empty(len(rows), dtype=_wide(dtype), device=rows.device)
            scratch = _Scratch(cast_rows, cast_weight)
            for part in scratch.parts():
                grad, losses[part], total = scratch.exponentials(
                    cast_rows[part], cast_weight, targets[part], vocab_size
                )
                grad.scatter_add_(1, _index(targets[part]), -total)
                if grad.dtype != dtype:
                    grad = scratch.narrow[: len(grad)].copy_(grad)
                share = (targets[part] != IGNORE_INDEX).unsqueeze(1) / total  # (n, 1)
                if rows_grad is not None:
                    rows_grad[part] = (grad @ cast_weight) * share
                if weight_grad is not None:
                    _add_product(weight_grad, grad, (cast_rows[part] * share).to(dtype))
        ctx.save_for_backward(rows_grad, weight_grad)
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        # Scaled in place: the copies would be as large as the embedding. A second backward is refused by autograd.
        rows_grad, weight_grad = (None if grad is None else grad.mul_(grad_loss) for grad in ctx.saved_tensors)
        return rows_grad, weight_grad, None, None, None


def _index(targets: Tensor) -> Tensor:
    """(n, 1) columns to pick; any where the target is ignored."""
    return targets.masked_fill(targets == IGNORE_INDEX, 0).unsqueeze(1)


def _add_product(total: Tensor, grad: Tensor, rows: Tensor) -> None:
    """total += gradᵀ rows, kept in the total's (wider) dtype."""
    if total.dtype == grad.dtype:
        total.addmm_(grad.T, rows)
    else:
        total += grad.T @ rows
