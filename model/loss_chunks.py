"""The output layer over its rows, a chunk at a time: logits, losses, and their gradients for the logits.

N rows (tokens), n rows of a chunk, b rows of a block, C width, V padded vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from model.chunk_kernel import IGNORE_INDEX, ChunkKernel
from model.kernel_sizes import BLOCK_ROWS_CPU, chunk_rows

SMALLEST_PROBABILITY = 1e-30  # whose logarithm is as exact as any


class Rules(NamedTuple):
    """What the output layer does beside its product.

    Attributes:
        vocab_size: real ids; those from here on get no probability.
        softcap: bound on the logits, as `soft_capped`; None: none.
        z_loss: coefficient of logsumexp(logits)² in what is learned from; None: not wanted.
        kernel: what works on a chunk's logits, where there is a compiled one.
    """

    vocab_size: int
    softcap: float | None = None
    z_loss: float | None = None
    kernel: ChunkKernel | None = None

    def z_terms(self, log_totals: Tensor, targets: Tensor) -> Tensor:
        """z-losses (n) of rows whose logits have these logsumexps (n); 0 where the target is ignored."""
        assert self.z_loss is not None
        return (self.z_loss * log_totals.square()).masked_fill(targets == IGNORE_INDEX, 0.0)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of sums: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def soft_capped(logits: Tensor, cap: float) -> Tensor:
    """cap·tanh(logits/cap), of the same shape and dtype, computed in float32 or wider (Gemma Team 2024, section 2)."""
    wide = logits.to(wide_dtype(logits.dtype))
    return (cap * torch.tanh(wide / cap)).to(logits.dtype)


def plain_logits(rows: Tensor, weight: Tensor, rules: Rules) -> Tensor:
    """(N, V) of (N, C), widened, capped, the padding at -inf."""
    logits = F.linear(rows, weight)
    logits = logits.to(wide_dtype(logits.dtype))
    if rules.softcap is not None:
        logits = soft_capped(logits, rules.softcap)
    padding = torch.arange(weight.shape[0], device=weight.device) >= rules.vocab_size
    return logits.masked_fill(padding, float("-inf"))


def cross_entropies(logits: Tensor, targets: Tensor) -> Tensor:
    """(N) of logits (N, V); 0 where the target is ignored."""
    return F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORE_INDEX)


class Block(NamedTuple):
    """A block of b rows: exponentials of its logits (b, V) up to a factor a row, their sums (b, 1), the losses (b), and
    the logsumexps (b), where they are wanted.
    """

    exponentials: Tensor
    totals: Tensor
    losses: Tensor
    log_totals: Tensor | None


class Gradient(NamedTuple):
    """Of a chunk of n rows: losses (n), z-losses (n) if wanted, the gradient for the logits (n, V), and what is left to
    multiply that by (n, 1): it is left to the C-wide factors of the matrix products, where the dtype's range allows it.
    """

    losses: Tensor
    z_losses: Tensor | None
    logits: Tensor
    left: Tensor | None


class Head:
    """The output layer over its rows, a chunk at a time.

    There is room for one chunk's logits, taken once: fresh memory, page by page, costs a CPU a fifth more time.
    """

    def __init__(self, rows: Tensor, weight: Tensor, targets: Tensor, rules: Rules) -> None:
        """Args: rows: (N, C). weight: (V, C), both in the dtype of the matrix products. targets: (N)."""
        self._rows, self._weight, self._targets, self._rules = rows, weight, targets, rules
        self._kernel, self._softcap = rules.kernel, rules.softcap
        self._size = min(len(rows), chunk_rows(rows.device.type, compiled=self._kernel is not None))
        self._logits = rows.new_empty(self._size, len(weight))  # (n, V) in the dtype of the matrix products
        in_cache = rows.device.type == "cpu" and (self._softcap is not None or rows.dtype != wide_dtype(rows.dtype))
        self._block = min(self._size, BLOCK_ROWS_CPU) if in_cache and self._kernel is None else self._size
        self._wide = self._logits  # where they are widened, a block after another; the same memory where they are wide
        if (wide := wide_dtype(rows.dtype)) != rows.dtype and self._kernel is None:
            self._wide = rows.new_empty(self._block, len(weight), dtype=wide)
        self._slopes: Tensor | None = None  # of the soft-cap, for the gradient of a block

    def parts(self) -> list[slice]:
        """The chunks."""
        return slices(len(self._rows), self._size)

    def losses(self, part: slice) -> Tensor:
        """(n) of a chunk."""
        if self._kernel is not None:
            ones = self._wide.new_ones(part.stop - part.start, 1, dtype=wide_dtype(self._rows.dtype))
            return self.gradient(part, ones).losses
        return torch.cat([self._exponentials(part, block).losses for block in self._multiply(part)])

    def entropies(self, part: slice) -> tuple[Tensor, Tensor]:
        """Losses and entropies of a chunk, (n) each; the head has no compiled kernel, which keeps no exponentials."""
        found = []
        for block in self._multiply(part):
            of_block = self._exponentials(part, block)
            # with e the exponentials and Z their sum: -Σ e/Z log(e/Z) = log Z - Σ e log e / Z
            totals, exponentials = of_block.totals.squeeze(1), of_block.exponentials  # (b), (b, V)
            surprises = torch.special.entr(exponentials, out=exponentials).sum(dim=1)  # (b)
            entropies = totals.log() + surprises / totals  # (b)
            found.append((of_block.losses, entropies.masked_fill(self._targets[part][block] == IGNORE_INDEX, 0.0)))
        losses, entropies = zip(*found, strict=True)
        return torch.cat(losses), torch.cat(entropies)

    def gradient(self, part: slice, factor: Tensor) -> Gradient:
        """Losses of a chunk and their gradient.

        Args:
            factor: (n, 1) the gradient that each loss gets.
        """
        blocks = self._multiply(part)
        grad, targets, rules = self._logits[: part.stop - part.start], self._targets[part], self._rules
        if self._kernel is not None:
            losses, log_totals = self._kernel(grad, targets, factor, rules.vocab_size, self._softcap, rules.z_loss)
            z_losses = None if rules.z_loss is None else rules.z_terms(log_totals, targets)
            return Gradient(losses, z_losses, grad, None)
        found, left = [], []
        if self._softcap is not None and self._slopes is None:
            self._slopes = torch.empty_like(self._wide[: self._block])
        for block in blocks:
            of_block = self._exponentials(part, block)
            exponentials, totals = of_block.exponentials, of_block.totals
            if rules.z_loss is not None and of_block.log_totals is not None:
                exponentials.mul_((1 + 2 * rules.z_loss * of_block.log_totals).unsqueeze(1))
            exponentials.scatter_add_(1, _index(targets[block]), -totals)
            if self._slopes is not None:
                exponentials.mul_(self._slopes[: len(exponentials)])
            share = factor[block] / totals  # (b, 1)
            if self._logits.dtype == torch.float16:
                exponentials.mul_(share)
            if self._wide is not self._logits:
                self._logits[block].copy_(exponentials)
            found.append(of_block)
            left.append(share)
        losses, z_losses = torch.cat([each.losses for each in found]), None
        if rules.z_loss is not None:
            log_totals = torch.cat([each.log_totals for each in found if each.log_totals is not None])
            z_losses = rules.z_terms(log_totals, targets)
        return Gradient(losses, z_losses, grad, None if grad.dtype == torch.float16 else torch.cat(left))

    def _multiply(self, part: slice) -> list[slice]:
        """Fill the logits of a chunk; return the blocks in which they are widened."""
        count = part.stop - part.start
        torch.mm(self._rows[part], self._weight.T, out=self._logits[:count])
        if self._kernel is None and self._softcap is None:
            self._logits[:count, self._rules.vocab_size :] = float("-inf")
        return slices(count, self._block)

    def _exponentials(self, part: slice, block: slice) -> Block:
        targets = self._targets[part][block]
        logits, log_totals = self._logits[block], None  # (b, V)
        if self._wide is not self._logits:
            logits = self._wide[: len(logits)].copy_(logits)
        if self._softcap is not None:
            self._cap(logits, self._softcap)
        if logits.device.type == "cpu":
            # one pass over the logits, all the rest is in cache; the sums are 1
            own = None if self._rules.z_loss is None else logits.gather(1, _index(targets)).squeeze(1)  # (b)
            exponentials = torch.softmax(logits, dim=1, out=logits)
            totals = exponentials.new_ones(len(logits), 1)
            chosen = exponentials.gather(1, _index(targets)).squeeze(1)  # (b)
            losses = -chosen.log()
            if bool((chosen < SMALLEST_PROBABILITY).any()):
                self._mend(losses, chosen, slice(part.start + block.start, part.start + block.stop))
            if own is not None:
                log_totals = own + losses
        else:
            largest = logits.amax(dim=1, keepdim=True)  # (b, 1)
            shifted = logits.gather(1, _index(targets)).sub_(largest)  # (b, 1)
            exponentials = logits.sub_(largest).exp_()
            totals = exponentials.sum(dim=1, keepdim=True)  # (b, 1)
            losses = (totals.log() - shifted).squeeze(1)
            if self._rules.z_loss is not None:
                log_totals = (totals.log() + largest).squeeze(1)
        return Block(exponentials, totals, losses.masked_fill(targets == IGNORE_INDEX, 0.0), log_totals)

    def _cap(self, logits: Tensor, cap: float) -> None:
        """Cap a block's logits (b, V) in place, then mask the padding; keep the slopes where a gradient is wanted."""
        logits.div_(cap).tanh_()
        if self._slopes is not None:
            torch.mul(logits, logits, out=self._slopes[: len(logits)]).neg_().add_(1)
        logits.mul_(cap)
        logits[:, self._rules.vocab_size :] = float("-inf")

    def _mend(self, losses: Tensor, chosen: Tensor, where: slice) -> None:
        """Work out again, a few rows at a time, the losses of probabilities that are too small for their logarithm."""
        for few in (chosen < SMALLEST_PROBABILITY).nonzero().squeeze(1).split(BLOCK_ROWS_CPU):
            logits = plain_logits(self._rows[where][few], self._weight, self._rules)
            losses[few] = cross_entropies(logits, self._targets[where][few])


def slices(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size or 1)]


def _index(targets: Tensor) -> Tensor:
    """(n, 1) columns to pick; any where the target is ignored."""
    return targets.masked_fill(targets == IGNORE_INDEX, 0).unsqueeze(1)
