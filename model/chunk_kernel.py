"""What happens to a chunk of logits, as one function that torch.compile makes kernels of.

n rows, V padded vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor

IGNORE_INDEX = -100
ChunkKernel = Callable[[Tensor, Tensor, Tensor, int, float | None, float | None], tuple[Tensor, Tensor]]


def losses_and_gradient(
    logits: Tensor,
    targets: Tensor,
    factor: Tensor,
    vocab_size: int,
    softcap: float | None = None,
    z_loss: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropies (n) and logsumexps (n), float32 or wider; the logits are overwritten with the gradient for them.

    Args:
        logits: (n, V). targets: (n) int64. factor: (n, 1) the gradient that each loss gets.
        vocab_size: ids from here on get no probability.
        softcap: as `model.loss.head_loss`. z_loss: as `model.loss.head_losses`; None: not in the gradient.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    columns = torch.arange(logits.shape[1], device=logits.device)  # (V)
    bounded = None
    if softcap is not None:
        bounded = torch.tanh(wide / softcap)  # (n, V)
        wide = softcap * bounded
    wide = wide.masked_fill(columns >= vocab_size, float("-inf"))
    index = targets.masked_fill(targets == IGNORE_INDEX, 0).unsqueeze(1)  # (n, 1)
    largest = wide.amax(dim=1, keepdim=True)  # (n, 1)
    log_total = largest + (wide - largest).exp().sum(dim=1, keepdim=True).log()  # (n, 1)
    losses = log_total - wide.gather(1, index)  # (n, 1)
    # exponentials anew, of another difference: those above, used twice, would be kept in memory, wide
    probabilities = (wide - log_total).exp()
    if z_loss is not None:
        probabilities = probabilities * (1 + 2 * z_loss * log_total)
    gradient = (probabilities - (columns == index).to(wide.dtype)) * factor
    if bounded is not None:
        gradient = gradient * (1 - bounded.square())
    logits.copy_(gradient)
    return losses.squeeze(1).masked_fill(targets == IGNORE_INDEX, 0.0), log_total.squeeze(1)


def compiled_kernel() -> ChunkKernel:
    """`losses_and_gradient`, compiled once for any number of rows; logits are never widened in memory."""
    compiled = torch.compile(losses_and_gradient, fullgraph=True)

    def kernel(
        logits: Tensor,
        targets: Tensor,
        factor: Tensor,
        vocab_size: int,
        softcap: float | None,
        z_loss: float | None,
    ) -> tuple[Tensor, Tensor]:
        for tensor in (logits, targets, factor):  # else the last chunk would be compiled anew
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        found: tuple[Tensor, Tensor] = compiled(logits, targets, factor, vocab_size, softcap, z_loss)
        return found

    return kernel
