"""FlexAttention (Dong et al. 2024, arXiv:2412.05496): one CUDA kernel that skips blocks no query may see.

Used for training and evaluation on CUDA with a window or documents, without dropout (it has none). Where it does not
compile, the paths of `attention_masks` do the same. The CPU has its forward only, which the tests compare with.

B batch, T sequence, H heads, K key/value heads, D head size.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

SMALLEST_FLEX_HEAD = 16  # the least that its kernels' matrix products need


def flex_mask(length: int, window: int | None, document_ids: Tensor | None, device: torch.device | None) -> BlockMask:
    """Causal, inside the window and inside the document (B, T), as in `attention_masks.see_before`."""

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = query >= key
        if window is not None:
            seen = seen & (query - key < window)
        if document_ids is not None:
            seen = seen & (document_ids[batch, query] == document_ids[batch, key])
        return seen

    batch = None if document_ids is None else len(document_ids)
    return create_block_mask(visible, batch, None, length, length, device=str(device or "cpu"))


def flex_attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float | None) -> Tensor:
    """(B, H, T, D) queries and (B, K, T, D) keys and values to (B, H, T, D)."""
    options: dict[str, Any] = {"block_mask": mask, "scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
    # inside a compiled model the plain function is what inductor turns into the kernel; the CPU's runs as it is
    if q.is_cuda and not torch.compiler.is_compiling():
        out: Tensor = _compiled()(q, k, v, **options)
    else:
        out = flex_attention(q, k, v, **options)
    return out


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention)


def flex_works(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Whether FlexAttention can train here: on CUDA, if a trial of its kernels compiles (once for each kind).

    Args:
        dtype: of queries, keys and values. head_size: D.
    """
    if device.type != "cuda" or head_size < SMALLEST_FLEX_HEAD:
        return False
    return True if torch.compiler.is_compiling() else _trial(device, dtype, head_size)


@functools.cache
def _trial(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    try:
        with torch.enable_grad():
            x = torch.zeros(1, 1, 128, head_size, dtype=dtype, device=device, requires_grad=True)  # (1, 1, T, D)
            flex_attend(x, x, x, flex_mask(128, 32, None, device), None).sum().backward()
    except Exception as error:  # a compiler fails in any way it likes
        warnings.warn(
            f"FlexAttention does not compile here: windows and documents take the slower paths ({error})", stacklevel=2
        )
        return False
    return True
