"""Self-attention: multi-head, grouped-query or multi-query, optionally with rotary positions, QK-norm and a sliding
window.

Its values may be mixed with those of the first layer (Zhou et al. 2024, arXiv:2410.17897) or of an embedding.

B batch, T sequence, C width, H heads, K key/value heads, D head size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.attention_masks import Visibility, attend
from model.cache import CacheStep
from model.config import ModelConfig
from model.norms import RMSNorm, project_normed
from model.positions import Rotary, rotate
from model.roles import Role, linear_roles


@dataclass(frozen=True)
class AttentionContext:
    """What every layer of one forward shares, worked out once.

    Attributes:
        rotary: angles of the positions, or None where positions are learned.
        visibility: for each window, which keys each query sees.
        cache: keys and values of earlier tokens, or None.
    """

    rotary: Rotary | None
    visibility: dict[int | None, Visibility]
    cache: CacheStep | None = None


class Attention(nn.Module):
    """Softmax attention."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.head_size = config.head_size
        self.score_size = config.score_size
        self.widths = [heads * config.head_size for heads in (config.n_head, config.kv_heads, config.kv_heads)]
        self.dropout = config.dropout
        self.window = config.layer_window(layer)
        self.layer = layer
        self.c_attn = nn.Linear(config.n_embd, sum(self.widths), bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.score_size, config.norm_eps, weight=config.norm_weights)
            self.k_norm = RMSNorm(config.score_size, config.norm_eps, weight=config.norm_weights)
        self.qk_norm = config.qk_norm
        self.hands_values = config.value_residual and layer == 0
        if others := config.other_values(layer):
            self.value_mix = nn.Parameter(torch.empty(1 + others))

    def roles(self) -> dict[str, Role]:
        """Queries, keys and values are matrices of their own, though one product computes them."""
        mixing = {"value_mix": Role("mixing")} if hasattr(self, "value_mix") else {}
        return linear_roles("c_attn", self.c_attn, rows=self.widths) | linear_roles("c_proj", self.c_proj) | mixing

    def forward(
        self, x: Tensor, norm: nn.Module, context: AttentionContext, recompute_norm: bool = False, *others: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What attention adds to the residual stream x, (B, T, C) to (B, T, C), and its own values, (B, T, K, D).

        Args:
            norm: the block's, which comes first. recompute_norm: work it out again in backward (`project_normed`).
            others: (B, T, K, D) each: values that are mixed into its own, as many as the configuration has.
        """
        (qkv,) = project_normed(norm, (self.c_attn,), x, recompute_norm)  # (B, T, (H + 2K)·D)
        q, k, v = (part.unflatten(-1, (-1, self.head_size)) for part in qkv.split(self.widths, dim=-1))  # (B, T, H, D)
        own = v
        if others:
            v = self._mixed(v, *others)
        if self.qk_norm:
            q, k = self._normed(self.q_norm, q), self._normed(self.k_norm, k)
        if context.rotary is not None:
            q, k = rotate(q, context.rotary), rotate(k, context.rotary)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (B, H or K, T, D)
        if context.cache is not None:
            k, v = context.cache.update(self.layer, k, v)  # (B, K, S, D)
        out = self.attend(q, k, v, context.visibility[self.window])  # (B, H, T, D)
        out = out.transpose(1, 2).flatten(2)  # (B, T, C)
        return F.dropout(self.c_proj(out), self.dropout, self.training), own

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visibility: Visibility) -> Tensor:
        """(B, H, T, D) and twice (B, K, S, D) to (B, H, T, D)."""
        return attend(q, k, v, visibility, dropout=self.dropout if self.training else 0.0)

    def _mixed(self, *values: Tensor) -> Tensor:
        """The weighted sum of values (B, T, K, D), the layer's own first."""
        weights = self.value_mix.to(values[0].dtype).unbind()
        mixed = weights[0] * values[0]
        for weight, other in zip(weights[1:], values[1:], strict=True):
            mixed = mixed + weight * other
        return mixed

    def _normed(self, norm: nn.Module, x: Tensor) -> Tensor:
        """QK-norm of heads (B, T, H, D), each score's features by themselves."""
        return norm(x.unflatten(-1, (-1, self.score_size))).flatten(-2)
