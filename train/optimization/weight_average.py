"""An exponential moving average of the weights, kept in training and never trained on (Polyak & Juditsky 1992).

Its decay is stated in tokens: what is a half-life H older counts half. With N_i tokens after step i since the average
started, and w_i the weights then, the average after step t is

    sum over i of w_i (2^-((N_t - N_i) / H) - 2^-((N_t - N_(i-1)) / H)),  divided by 1 - 2^-(N_t / H):

a mean of the weights after each step, in which the first ones, before any step, have no part. No correction is left to
the reader, and what a step's weights count is a closed form of tokens, whatever the batch.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from model.ranks import Ranks
from train.optimization.optimizer import trained_parameters
from train.optimization.optimizer_state import shapes_of, state_of
from train.optimization.owners import owners_of
from train.optimization.sharded import buckets, send_to_all

EMA = "ema"  # the kind of its files in a checkpoint, and its facts in the manifest
EXCHANGED = 1 << 22  # elements that are exchanged at a time: beside the two there is room for so many


def share_of_step(before: int, after: int, half_life: int) -> float:
    """How far the average moves towards the weights after a step; 1 after the first.

    Args:
        before, after: tokens since the average started, before and after the step. half_life: tokens.
    """
    return math.expm1((before - after) * math.log(2) / half_life) / math.expm1(-after * math.log(2) / half_life)


class WeightAverage:
    """Of every trained weight, in float32 as the weights are. Each rank keeps and updates what it owns, about 1/N.

    Ranks have the same weights after each step, so that updates need no message. Adapters are averaged one by one.

    Attributes:
        tensors: by parameter name, those of this rank. start_tokens: that the run had seen when the average started.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        owner: Mapping[str, int],
        ranks: Ranks,
        half_life: int,
        start_tokens: int,
    ) -> None:
        """Start with the weights as they are. Args: owner: the rank of each; half_life: tokens."""
        self.half_life, self._ranks = half_life, ranks
        self._weights = {name: p.detach() for name, p in parameters.items() if owner[name] == ranks.rank}
        self.tensors = {name: weight.clone() for name, weight in self._weights.items()}
        self.start_tokens = start_tokens
        self._buckets = buckets(parameters, owner, ranks.world_size)

    def start(self, tokens: int) -> None:
        """Start again, with the weights as they are. Args: tokens: that the run has seen."""
        self.start_tokens = tokens
        for name, average in self.tensors.items():
            average.copy_(self._weights[name])

    @torch.no_grad()
    def update(self, before: int, after: int) -> None:
        """Take in the weights after a step that has learned. Args: before, after: the run's tokens."""
        share = share_of_step(before - self.start_tokens, after - self.start_tokens, self.half_life)
        for name, average in self.tensors.items():
            average.lerp_(self._weights[name], share)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the model has the averaged weights, on all ranks, which call together; then its own to the bit.

        After an error it keeps the averaged ones: what ends one rank must not leave the others waiting here.
        """
        self._exchange()
        yield
        self._exchange()

    def facts(self) -> dict[str, Any]:
        """What a checkpoint's manifest records of it."""
        return {EMA: {"half_life_tokens": self.half_life, "start_tokens": self.start_tokens}}

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, average in self.tensors.items():
            parts = (tensor.view(-1).split(EXCHANGED) for tensor in (self._weights[name], average))
            for weight, other in zip(*parts, strict=True):
                kept = weight.clone()
                weight.copy_(other)
                other.copy_(kept)
        if self._ranks.world_size > 1:
            send_to_all(self._buckets, self._ranks)


def build_weight_average(
    model: nn.Module, optimizer: torch.optim.Optimizer, half_life: int, ranks: Ranks, tokens: int
) -> WeightAverage:
    """Of a model whose weights have their first values. Args: half_life: tokens. tokens: that the run has seen."""
    parameters = trained_parameters(model)
    owner = owners_of(shapes_of(parameters.items()), state_of(optimizer), ranks.world_size)
    return WeightAverage(parameters, owner, ranks, half_life, tokens)
