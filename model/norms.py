"""Normalisation over the features of one token, never over positions (which would leak the future)."""

import torch
from torch import Tensor, nn

from model.config import ModelConfig


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension (Zhang and Sennrich 2019), computed in float32 or wider.

    Half-precision input comes back in its own dtype; the weight is applied in the input's dtype, as in Llama.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale).to(x.dtype) * self.weight.to(x.dtype)


def build_norm(config: ModelConfig) -> nn.Module:
    """The norm over the width C that the configuration names."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.n_embd, config.norm_eps)
    return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)
