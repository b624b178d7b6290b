"""Where a token stands: rotary angles, and positions that restart with every document.

B batch, T sequence, H heads, D head size, R features that are rotated together.
"""

import torch
from torch import Tensor

Rotary = tuple[Tensor, Tensor]  # cosines and sines


def rotary_angles(positions: Tensor, size: int, base: float) -> Rotary:
    """Cosines and sines of RoPE (Su et al. 2021), in float32, for any positions.

    Computed anew in each forward: it costs less than one layer's bias and keeps the model free of buffers, so that a
    model built on the meta device has nothing to lose.

    Args:
        positions: (T,) or (B, T) integers.
        size: R, even.
        base: the base of the wavelengths.

    Returns:
        Two tensors of shape (1 or B, T, 1, R/2).
    """
    exponents = torch.arange(0, size, 2, device=positions.device, dtype=torch.float32) / size  # (R/2)
    angles = positions.float().unsqueeze(-1) * base**-exponents  # (..., T, R/2)
    if angles.dim() == 2:
        angles = angles.unsqueeze(0)  # (1, T, R/2)
    angles = angles.unsqueeze(2)  # (1 or B, T, 1, R/2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn feature i with feature i + R/2 by its angle ("rotate half", the pairing that Llama checkpoints use).

    Args:
        x: (B, T, H, D), where D is R or a multiple of it (each R features are turned on their own).
        rotary: what `rotary_angles` returned.

    Returns:
        The same shape and dtype; the turning itself is done in float32 or wider.
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
