"""What a model's blocks make of a small fixed sample, from an uncompiled twin that shares its weights.

The twin has the hooks, so compiled blocks have none, activation checkpointing counts nothing twice, and the figures do
not depend on ranks, micro-batch or accumulation. B sequences, T tokens, H heads, K key/value heads, D head size.
"""

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from common.layer_figures import ACTIVATIONS
from model.attention import Attention
from model.attention_masks import Visibility, in_reach
from model.gpt import GPT
from model.mlp import MLP
from model.number_formats import Dtype
from model.precision import autocast

DEAD = 0.01  # times the layer's RMS: a hidden unit that no token brings beyond it does nothing


class ActivationProbe:
    """Measures blocks on one sample of tokens."""

    def __init__(self, model: GPT, sample: Tensor, dtype: Dtype) -> None:
        """Args: sample: (B, T) int64 on the model's device. dtype: of the run's autocast."""
        self._sample = sample
        self._dtype = dtype
        self._twin = twin_of(model)
        self._found: dict[str, list[Tensor]] = {}
        for block in self._twin.h:
            assert isinstance(block, nn.Module)
            self._watch(block)

    @torch.no_grad()
    def measure(self) -> Tensor:
        """(len(ACTIVATIONS), L) float32, on the model's device: a row a figure, a column a block, without dropout.

        activation_rms and activation_max: of the residual stream after the block. attention_logit: the largest score of
        a query and a key that it sees, of the first sequence. dead_units: the fraction of the MLP's hidden units that
        stay within DEAD times the layer's RMS for every token.
        """
        self._found = {figure: [] for figure in ACTIVATIONS}
        with autocast(self._dtype, self._sample.device):
            self._twin.hidden(self._sample)
        return torch.stack([torch.stack(self._found[figure]) for figure in ACTIVATIONS])

    def _watch(self, block: nn.Module) -> None:
        attention, mlp = block.attn, block.mlp
        assert isinstance(attention, Attention)
        assert isinstance(mlp, MLP)
        block.register_forward_hook(self._see_block)
        mlp.c_proj.register_forward_pre_hook(self._see_hidden_units)
        attention.attend = partial(self._see_attention, attention, attention.attend)  # type: ignore[method-assign]

    def _see_block(self, block: nn.Module, inputs: Any, out: Any) -> None:
        stream = stream_of(out).float()  # (B, T, C)
        self._found["activation_rms"].append(stream.square().mean().sqrt())
        self._found["activation_max"].append(stream.abs().max())

    def _see_hidden_units(self, projection: nn.Module, inputs: tuple[Tensor]) -> None:
        hidden = inputs[0].float()  # (B, T, F)
        rms = hidden.square().mean().sqrt()
        self._found["dead_units"].append((hidden.abs().amax((0, 1)) <= DEAD * rms).float().mean())

    def _see_attention(
        self, attention: Attention, attend: Any, q: Tensor, k: Tensor, v: Tensor, visibility: Visibility
    ) -> Tensor:
        """The scores by an explicit product: fused kernels keep theirs to themselves."""
        self._found["attention_logit"].append(largest_logit(q[0], k[0], attention.score_size, attention.window))
        out: Tensor = attend(q, k, v, visibility)
        return out


def stream_of(out: Any) -> Tensor:
    """The residual stream (B, T, C) of what a block returns, perhaps beside its values."""
    stream: Tensor = out[0] if isinstance(out, tuple) else out
    return stream


def largest_logit(q: Tensor, k: Tensor, score_size: int, window: int | None) -> Tensor:
    """The largest q·k/√S over heads and the pairs that see each other: (H, T, D) and (K, T, D) to ().

    Args: score_size: S, features of a score; a head with D = 2S has two.
    """
    queries = q.float().unflatten(-1, (-1, score_size)).transpose(1, 2).flatten(0, 1)  # (H·D/S, T, S)
    keys = k.float().repeat_interleave(len(q) // len(k), 0).unflatten(-1, (-1, score_size))  # (H, T, D/S, S)
    scores = queries @ keys.transpose(1, 2).flatten(0, 1).mT * score_size**-0.5  # (H·D/S, T, T)
    index = torch.arange(q.shape[1], device=q.device)
    return scores.masked_fill(~in_reach(index[:, None], index[None, :], window), float("-inf")).max()


def twin_of(model: GPT) -> GPT:
    """The same model with the same parameters (no copies), in evaluation mode and not compiled."""
    shared = {id(parameter): parameter for parameter in model.parameters()}
    twin = copy.deepcopy(model, shared).eval()  # what was compiled is not copied
    twin.chunk_kernel = None
    return twin
