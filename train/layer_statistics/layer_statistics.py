"""Every so many steps: how large each layer's gradients, weights, updates and activations are.

Weights and losses are the same to the bit with and without: nothing here writes what a step reads.
"""

import math
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from common.layer_figures import ACTIVATIONS, KIND, NORMS
from data_prep.token_sets.sequences import Windows
from model.gpt import GPT
from model.number_formats import Dtype
from model.ranks import Ranks
from train.layer_statistics.activations import ActivationProbe
from train.layer_statistics.parts import part_of, parts_of
from train.run.recorder import Recorder

if TYPE_CHECKING:
    from data_prep.token_sets.token_set import TokenSet

SAMPLE_SEQUENCES = 2
SAMPLE_TOKENS = 1024  # of a sequence, at most: attention's scores take its square


class LayerStatistics:
    """All ranks call all methods in every step: two around the update, one after it.

    Norms of a parameter are computed by one rank, so that on each rank the weights of its share are copied, and
    figures don't depend on how many ranks there are.
    """

    def __init__(
        self, model: GPT, ranks: Ranks, recorder: Recorder, sample: Tensor, *, every_steps: int, dtype: Dtype
    ) -> None:
        """Args: sample: (B, T) int64: what activations are measured on."""
        self._ranks = ranks
        self._recorder = recorder
        self._every = every_steps
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._names = list(trained)
        self._own = list(enumerate(trained.values()))[ranks.rank :: ranks.world_size]
        self._norms = torch.zeros((len(NORMS), len(trained)), device=ranks.device)  # (3, parameters)
        self._before: list[Tensor] = []
        self._probe = ActivationProbe(model, sample.to(ranks.device), dtype) if ranks.is_first else None

    @torch.no_grad()
    def before_update(self, step: int) -> None:
        """Gradients are there: averaged over ranks, free of fp16's loss scale, not yet clipped."""
        if step % self._every:
            return
        self._norms.zero_()
        if not self._own:
            return
        own = [index for index, _ in self._own]
        weights: list[Tensor] = [parameter for _, parameter in self._own]
        gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
        self._norms[0, own] = torch.stack(torch._foreach_norm(gradients)).float()
        self._norms[1, own] = torch.stack(torch._foreach_norm(weights)).float()
        self._before = [weight.clone() for weight in weights]

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        """Measure what has changed: nothing where the step was refused."""
        if step % self._every:
            return
        if self._own:
            torch._foreach_sub_(self._before, [parameter for _, parameter in self._own])
            self._norms[2, [index for index, _ in self._own]] = torch.stack(torch._foreach_norm(self._before)).float()
            self._before = []
        self._ranks.sum_tensor(self._norms)  # each from the rank that has it; exact, as all others are zero

    def record(self, step: int) -> None:
        """Measure activations, with the new weights, and record all: after the record of the step itself."""
        if step % self._every or self._probe is None:
            return
        norms, blocks = self._norms, self._probe.measure()  # (len(NORMS), parameters), (len(ACTIVATIONS), L)
        values = iter(torch.cat([norms.flatten(), blocks.flatten()]).tolist())  # the only time that the host waits
        record: dict[str, Any] = {"kind": KIND, "step": step, "parts": parts_of(self._names)}
        for figure in NORMS:
            record[figure] = self._by_part(list(islice(values, norms.shape[1])))
        for figure in ACTIVATIONS:
            record[figure] = list(islice(values, blocks.shape[1]))
        self._recorder.note(record)

    def _by_part(self, norms: Sequence[float]) -> list[float]:
        """Norms by parameter to norms by part."""
        squares = dict.fromkeys(parts_of(self._names), 0.0)
        for name, norm in zip(self._names, norms, strict=True):
            squares[part_of(name)] += norm * norm
        return [math.sqrt(square) for square in squares.values()]


def build_layer_statistics(
    every_steps: int, dtype: Dtype, tokens: "TokenSet", model: GPT, ranks: Ranks, recorder: Recorder
) -> LayerStatistics:
    """Those that `log.statistics_every` asks for.

    The sample is the first sequences of the training split as it lies on the disk, whatever order they are read in.
    """
    windows = Windows(tokens.split("train"), min(model.config.block_size, SAMPLE_TOKENS))
    sample = torch.from_numpy(windows.read(np.arange(min(SAMPLE_SEQUENCES, windows.count))))[:, :-1]  # (B, T)
    return LayerStatistics(model, ranks, recorder, sample, every_steps=every_steps, dtype=dtype)
