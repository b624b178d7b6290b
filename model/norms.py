"""Normalisation over the features of one token, never over positions (which would leak the future)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from model.config import ModelConfig
from model.roles import Role


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension, (..., C) to (..., C) (Zhang and Sennrich 2019), computed in float32
    or wider.

    Half-precision input comes back in its own dtype; the weight is applied in the input's dtype, as in Llama.

    Args:
        weight: whether there is one; without, x / rms(x).
    """

    def __init__(self, size: int, eps: float, *, weight: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size)) if weight else None
        self.eps = eps

    def roles(self) -> dict[str, Role]:
        return {} if self.weight is None else {"weight": Role("norm")}

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.to(x.dtype)
        if torch.compiler.is_compiling():  # inductor fuses the formula, and decides itself what to keep
            plain = _normalised(x, _scale(x, self.eps))
            return plain if weight is None else plain * weight
        normed: Tensor = _RecomputedRMSNorm.apply(x, weight, self.eps)
        return normed


def _scale(x: Tensor, eps: float) -> Tensor:
    """1 / rms(x): (..., C) to (..., 1)."""
    return torch.rsqrt(_wide(x).square().mean(-1, keepdim=True) + eps)


def _normalised(x: Tensor, scale: Tensor) -> Tensor:
    """x · scale, (..., C) and (..., 1) to (..., C), in the dtype of x."""
    return (_wide(x) * scale).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class _RecomputedRMSNorm(torch.autograd.Function):
    """Keeps only its input and normalises again in backward; autograd would keep the normalised input as well.

    For n = x·s with s = 1/rms(x) and gradient g of n·w:  dw = Σ g·n,  dx = s·(g·w - n·mean(g·w·n)). Without w it is 1.
    On a CPU thread, float32, forward and backward, it takes half the time of the formula and of F.rms_norm.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        scale = _scale(x, eps)
        ctx.save_for_backward(x, weight, scale)
        normed = _normalised(x, scale)
        return normed if weight is None else normed.mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        grad, normed = _wide(grad), _wide(x) * scale
        product = grad * normed
        if weight is None:
            overlap = product.sum(-1, keepdim=True) / x.shape[-1]  # (..., 1)
            return torch.addcmul(grad, normed, overlap, value=-1).mul_(scale).to(x.dtype), None, None
        weight_wide = _wide(weight)
        grad_weight = product.flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        overlap = (product @ weight_wide).unsqueeze(-1) / x.shape[-1]  # (..., 1)
        grad_x = torch.mul(grad, weight_wide, out=product).addcmul_(normed, overlap, value=-1).mul_(scale)
        return grad_x.to(x.dtype), grad_weight, None


def project_normed(norm: nn.Module, projections: Sequence[nn.Module], x: Tensor, recompute: bool) -> tuple[Tensor, ...]:
    """norm(x) through each of the linear layers: (B, T, C) to (B, T, its outputs) each.

    With `recompute`, backward computes norm and projections again from x. They go together: a norm recomputed by
    itself saves nothing, as the projection keeps the norm's output for its own gradient.
    """

    def project(x: Tensor) -> tuple[Tensor, ...]:
        normed = norm(x)
        return tuple(projection(normed) for projection in projections)

    if not recompute:
        return project(x)
    drops = any(getattr(projection, "dropout", 0) > 0 for projection in projections)  # an adapter's, by the same mask
    projected: tuple[Tensor, ...] = checkpoint(project, x, use_reentrant=False, preserve_rng_state=drops)
    return projected


def build_norm(config: ModelConfig) -> nn.Module:
    """The norm over the width C that the configuration names."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.n_embd, config.norm_eps, weight=config.norm_weights)
    weights = config.norm_weights
    return nn.LayerNorm(config.n_embd, config.norm_eps, elementwise_affine=weights, bias=config.bias and weights)
