"""GPT-2 and Llama as a textbook writes them down, to measure Longhaul's step against: nothing here is clever.

The parameters have Longhaul's names, so that its weights load as they are.

B batch, T sequence, C width, H heads, D head size, V rows of the vocabulary's table.
"""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import UserError
from model.config import ModelConfig
from model.number_formats import Dtype
from model.precision import autocast
from train.batches.loader import StepBatch


class PlainGPT(nn.Module):
    """Embeddings, blocks, norm, and the logits of every token at once."""

    def __init__(self, config: ModelConfig, vocab_rows: int) -> None:
        """Args: vocab_rows: V, the tokenizer's size or more. Rows beyond it take part in the softmax as all others do.

        Raises UserError for an option that is neither GPT-2's nor Llama's.
        """
        super().__init__()
        check_plain(config)
        self.wte = nn.Embedding(vocab_rows, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd) if config.position == "learned" else None
        self.h = nn.ModuleList(PlainBlock(config) for _ in range(config.n_layer))
        self.ln_f = plain_norm(config)
        self.lm_head = nn.Linear(config.n_embd, vocab_rows, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.wte.weight
        self.angles = PlainAngles(config) if config.position == "rope" else None

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy of (B, T) targets after (B, T) tokens: ()."""
        length = tokens.shape[1]
        x = self.wte(tokens)  # (B, T, C)
        if self.wpe is not None:
            x = x + self.wpe(torch.arange(length, device=tokens.device))
        angles = None if self.angles is None else self.angles(length)
        for block in self.h:
            x = block(x, angles)
        logits = self.lm_head(self.ln_f(x))  # (B, T, V)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))


class PlainAngles(nn.Module):
    """Cosines and sines of rotary positions, worked out once."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        exponents = torch.arange(0, config.head_size, 2) / config.head_size  # (D/2)
        angles = torch.arange(config.block_size)[:, None] * config.rope_base**-exponents  # (T, D/2)
        self.cos = nn.Buffer(angles.cos().repeat(1, 2), persistent=False)  # (T, D)
        self.sin = nn.Buffer(angles.sin().repeat(1, 2), persistent=False)  # (T, D)

    def forward(self, length: int) -> tuple[Tensor, Tensor]:
        return self.cos[:length], self.sin[:length]


class PlainBlock(nn.Module):
    """Attention and MLP, each behind a norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ln_1 = plain_norm(config)
        self.attn = PlainAttention(config)
        self.ln_2 = plain_norm(config)
        self.mlp = PlainMLP(config)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor] | None) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        x = x + self.attn(self.ln_1(x), angles)
        return x + self.mlp(self.ln_2(x))


class PlainAttention(nn.Module):
    """Causal attention by torch's own kernel."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor] | None) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        batch, length, width = x.shape
        q, k, v = self.c_attn(x).split(width, dim=2)
        q, k, v = (part.view(batch, length, self.heads, -1).transpose(1, 2) for part in (q, k, v))  # (B, H, T, D)
        if angles is not None:
            q, k = turned(q, *angles), turned(k, *angles)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(out.transpose(1, 2).reshape(batch, length, width))


class PlainMLP(nn.Module):
    """Two matrices, or Llama's three."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kind = config.mlp
        self.c_fc = nn.Linear(config.n_embd, config.hidden_size, bias=config.bias)
        if self.kind == "swiglu":
            self.c_gate = nn.Linear(config.n_embd, config.hidden_size, bias=config.bias)
        self.c_proj = nn.Linear(config.hidden_size, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        if self.kind == "swiglu":
            return self.c_proj(F.silu(self.c_gate(x)) * self.c_fc(x))
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh" if self.kind == "gelu" else "none"))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: (B, H, T, D) by (T, D) cosines and sines."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def plain_norm(config: ModelConfig) -> nn.Module:
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.n_embd, eps=config.norm_eps)
    return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)


def check_plain(config: ModelConfig) -> None:
    """Raises UserError naming what a plain GPT has not got."""
    lacks = {
        f"model.attention {config.attention}": config.attention != "softmax",
        "model.qk_norm": config.qk_norm,
        f"model.n_kv_head {config.kv_heads}": config.kv_heads != config.n_head,
        f"model.window {config.window}": any(window is not None for window in config.windows),
        f"model.mlp {config.mlp}": config.mlp == "relu2",
        f"model.rope_scaling {config.rope_scaling}": config.rope_scaling != "none",
        f"model.dropout {config.dropout}": config.dropout > 0,
        f"model.norm_weights {config.norm_weights}": not config.norm_weights,
        f"model.embedding {config.embedding}": config.embedding != "plain",
        "model.value_residual": config.value_residual,
        f"model.value_embeddings {config.value_embeddings}": config.value_embeddings > 0,
        f"model.logit_softcap {config.logit_softcap}": config.logit_softcap is not None,
    }
    if missing := [option for option, asked in lacks.items() if asked]:
        raise UserError(f"a plain GPT has no {missing[0]}")


class MeanLoss(Protocol):
    """The mean cross-entropy of (B, T) targets after (B, T) tokens: ()."""

    def __call__(self, tokens: Tensor, targets: Tensor) -> Tensor: ...


class PlainStep:
    """One optimizer step as everybody writes it: accumulate, clip, update."""

    def __init__(
        self,
        loss: MeanLoss,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        *,
        dtype: Dtype,
        grad_clip: float,
    ) -> None:
        self._loss = loss
        self._optimizer = optimizer
        self._device = device
        self._dtype = dtype
        self._grad_clip = grad_clip
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._scaler = torch.amp.GradScaler(device.type, enabled=dtype == "fp16")

    def __call__(self, batch: StepBatch, step: int) -> float:
        """Learn from a batch; return its mean loss in nats before the update."""
        if batch.document_ids is not None:
            raise UserError("a plain step keeps no attention inside documents (data.document_mask)")
        total = torch.zeros((), device=self._device)
        for micro_batch in batch.micro_batches(self._device):
            with autocast(self._dtype, self._device):
                loss = self._loss(micro_batch.tokens, micro_batch.targets) / len(batch.tokens)
            self._scaler.scale(loss).backward()
            total += loss.detach()
        self._scaler.unscale_(self._optimizer)
        if self._grad_clip:
            torch.nn.utils.clip_grad_norm_(self._parameters, self._grad_clip)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        return total.item()
