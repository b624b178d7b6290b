"""Differential attention (Ye et al. 2024, arXiv:2410.05258): the difference of two attention maps cancels noise.

An example of how little a new kind of attention needs: what it projects, caches, masks and rotates is inherited.
B batch, T queries, S keys, H heads, K key/value heads, D head size.
"""

import math

import torch
from torch import Tensor, nn

from model.attention import Attention
from model.attention_masks import Visibility, attend
from model.config import ModelConfig
from model.norms import RMSNorm
from model.roles import Role


class DifferentialAttention(Attention):
    """(softmax(q1 k1ᵀ) - λ softmax(q2 k2ᵀ)) v, where q1, q2 and k1, k2 are the halves of each head.

    The head count is half of what a softmax model of equal head size for its keys would have, as in the paper: each
    half of a head is compared by itself, and the values keep the whole width D.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.lambda_start = 0.8 - 0.6 * math.exp(-0.3 * layer)
        self.lambda_q = nn.Parameter(torch.empty(2, self.score_size))
        self.lambda_k = nn.Parameter(torch.empty(2, self.score_size))
        self.head_norm = RMSNorm(self.head_size, config.norm_eps, weight=config.norm_weights)

    def roles(self) -> dict[str, Role]:
        return super().roles() | {"lambda_q": Role("mixing"), "lambda_k": Role("mixing")}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visibility: Visibility) -> Tensor:
        """(B, H, T, D) and twice (B, K, S, D) to (B, H, T, D)."""
        nothing = torch.zeros_like(q[..., : self.score_size])
        first = torch.cat((q[..., : self.score_size], nothing), dim=-1)  # sees only k1
        second = torch.cat((nothing, q[..., self.score_size :]), dim=-1)  # sees only k2
        both = torch.stack((first, second), dim=2).flatten(1, 2)  # (B, 2H, T, D), the two maps of a head side by side
        dropout = self.dropout if self.training else 0.0
        out = attend(both, k, v, visibility, dropout=dropout, scale=self.score_size**-0.5).unflatten(1, (-1, 2))
        mixed = out[:, :, 0] - self._lambda().to(out.dtype) * out[:, :, 1]  # (B, H, T, D)
        return self.head_norm(mixed) * (1 - self.lambda_start)

    def _lambda(self) -> Tensor:
        """(): the weight of the second map."""
        with torch.autocast(self.lambda_q.device.type, enabled=False):
            first, second = (self.lambda_q.float() * self.lambda_k.float()).sum(-1).exp().unbind()
        return first - second + self.lambda_start
