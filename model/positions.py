"""Positions of tokens: rotary angles, and positions that restart with every document.

B batch, T sequence, H heads, D head size, R features that are rotated together.
"""

import math

import torch
from torch import Tensor

from model.config import ModelConfig

Rotary = tuple[Tensor, Tensor]  # cosines and sines


def rotary_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """How far each pair of features rotates from one token to the next: (R/2) float32 radians, the fastest first."""
    size = config.score_size  # R
    exponents = torch.arange(0, size, 2, device=device, dtype=torch.float32) / size  # (R/2)
    frequencies = config.rope_base**-exponents  # (R/2)
    if config.rope_scaling == "linear":
        return frequencies / config.rope_factor
    if config.rope_scaling == "llama3":
        return _llama3_frequencies(frequencies, config)
    return frequencies


def _llama3_frequencies(frequencies: Tensor, config: ModelConfig) -> Tensor:
    """(R/2) to (R/2): what rotates often within the original length stays, what rotates seldom is slowed down."""
    turns = config.rope_original_length * frequencies / (2 * math.pi)  # (R/2): full turns within the original length
    low, high = config.rope_low_factor, config.rope_high_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # (R/2): 1 where it stays, 0 where it is divided by the factor
    return kept * frequencies + (1 - kept) * frequencies / config.rope_factor


def rotary_angles(positions: Tensor, frequencies: Tensor) -> Rotary:
    """Cosines and sines of RoPE (Su et al. 2021), in float32, for any positions.

    Recomputed in each forward: it costs less than one layer's bias and keeps the model free of buffers, so that a
    model built on the meta device has nothing to lose.

    Args:
        positions: (T,) or (B, T) integers.
        frequencies: (R/2), as `rotary_frequencies` has them.

    Returns:
        Two tensors of shape (1 or B, T, 1, R/2).
    """
    angles = positions.float().unsqueeze(-1) * frequencies  # (..., T, R/2)
    if angles.dim() == 2:
        angles = angles.unsqueeze(0)  # (1, T, R/2)
    angles = angles.unsqueeze(2)  # (1 or B, T, 1, R/2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate feature i with feature i + R/2 by its angle ("rotate half", the pairing that Llama checkpoints use).

    Args:
        x: (B, T, H, D), where D is R or a multiple of it (each R features are rotated separately).
        rotary: what `rotary_angles` returned.

    Returns:
        The same shape and dtype; the rotation itself is done in float32 or wider.
    """
    cos, sin = rotary
    half = cos.shape[-1]
    first, second = x.unflatten(-1, (-1, 2, half)).unbind(-2)  # each (B, T, H, D/R, R/2)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (1 or B, T, 1, 1, R/2)
    turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-2)
    return turned.flatten(-3).to(x.dtype)  # (B, T, H, D)


def document_positions(document_ids: Tensor) -> Tensor:
    """Positions that restart at 0 where the document changes.

    Args:
        document_ids: (B, T) integers, equal within a document; documents are contiguous.

    Returns:
        (B, T) int64.
    """
    index = torch.arange(document_ids.shape[1], device=document_ids.device)  # (T)
    changed = torch.zeros_like(document_ids, dtype=torch.bool)
    changed[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    starts = torch.where(changed, index, 0).cummax(dim=1).values  # (B, T)
    return index - starts
