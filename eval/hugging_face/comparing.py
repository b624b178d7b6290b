"""Whether another program gives a model's logits. B batch, T sequence, V vocabulary."""

from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from model.config import ModelConfig
from model.gpt import GPT

TOLERANCE = 1e-5  # of the logits, relative to the largest


def probe_tokens(config: ModelConfig) -> Tensor:
    """Random ids (B, T), the same for every model of these sizes."""
    shape = (2, min(config.block_size, 256))
    return torch.randint(0, config.vocab_size, shape, generator=torch.Generator().manual_seed(0))


def logits_of(theirs: Any, tokens: Tensor) -> Tensor:
    """Logits (B, T, V) of a model of `transformers`, in float32."""
    logits: Tensor = theirs(tokens).logits.float()
    return logits


@torch.no_grad()
def check_logits(got: Tensor, model: GPT, tokens: Tensor, reader: str, tolerance: float = TOLERANCE) -> float:
    """The largest difference of logits (B, T, V) from ours, relative to the largest logit.

    Args:
        reader: the program that gave them, with its version.

    Raises UserError where it is beyond the tolerance.
    """
    expected = model(tokens)[..., : model.config.vocab_size]
    if got.shape != expected.shape:
        raise UserError(f"{reader} gives logits of another shape, {tuple(got.shape)}: the folder was not published")
    difference = float((got - expected).abs().max() / expected.abs().max())
    if not difference <= tolerance:
        raise UserError(f"{reader} gives other logits ({difference:.1e} relative): the folder was not published")
    return difference
