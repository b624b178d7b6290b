"""Which keys each query may see, computed once per forward, and the attention that uses it.

Three ways on every device, exact and equal: everything before a query (no mask, the fused causal kernel), a dense mask,
and block-local attention for a sliding window, which skips what the window cannot reach. On CUDA a window or documents
can go through FlexAttention instead, which skips the same blocks in one kernel; on a CPU long documents go through the
causal kernel one by one.

B batch, T queries, S keys, H heads, K key/value heads, D head size, W window, N blocks, P block size.
"""

import contextlib
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask

from model.flex import flex_attend, flex_mask
from model.kernel_sizes import LARGEST_WIDENED, SHORTEST_APART, SMALLEST_BLOCK


@dataclass(frozen=True)
class Visibility:
    """What each query may see. Without a mask: every key up to its own (`causal`), or every key.

    Attributes:
        causal: query i sees keys up to i.
        mask: boolean, True where visible: (1 or B, 1, T, S); or, with `block`, (N or B·N, 1, P, 2P).
        block: block size P of block-local attention.
        flex: the same in FlexAttention's form; then nothing else counts.
        apart: lengths of the documents that lie one after another in the rows, each of which is attended by itself;
            then nothing else counts.
    """

    causal: bool = True
    mask: Tensor | None = None
    block: int | None = None
    flex: BlockMask | None = None
    apart: tuple[int, ...] = ()


def see_before(
    length: int,
    window: int | None,
    document_ids: Tensor | None,
    device: torch.device | None = None,
    *,
    flex: bool = False,
) -> Visibility:
    """Each token sees itself and the tokens before it, inside the window and inside its document.

    Args:
        length: T.
        window: keys a query sees, its own included; None: all.
        document_ids: (B, T) integers, or None where the sequence is one document.
        device: where the masks are needed.
        flex: use FlexAttention where there is something to skip.
    """
    if window is not None and window >= length:
        window = None
    if window is None and document_ids is None:
        return Visibility()
    if flex:
        return Visibility(causal=False, flex=flex_mask(length, window, document_ids, device))
    if window is None and document_ids is not None and (lengths := _lengths_apart(document_ids)):
        return Visibility(apart=lengths)
    block = None if window is None else max(window, SMALLEST_BLOCK)
    if block is not None and 2 * block < length:
        return Visibility(causal=False, mask=_block_mask(length, block, window, document_ids, device), block=block)
    index = torch.arange(length, device=device)
    visible = in_reach(index[:, None], index[None, :], window)[None]  # (1, T, T)
    if document_ids is not None:
        visible = visible & (document_ids[:, :, None] == document_ids[:, None, :])  # (B, T, T)
    return Visibility(causal=False, mask=visible.unsqueeze(1))


def _lengths_apart(document_ids: Tensor) -> tuple[int, ...]:
    """Lengths of the documents in (B, T) rows, where a CPU attends them faster one by one; else ()."""
    if document_ids.device.type != "cpu" or torch.compiler.is_compiling():  # lengths are shapes of the graph
        return ()
    starts = torch.ones_like(document_ids, dtype=torch.bool)  # (B, T)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    borders = starts.flatten().nonzero().flatten().tolist()
    if len(borders) * SHORTEST_APART > document_ids.numel():
        return ()
    return tuple(end - start for start, end in pairwise([*borders, document_ids.numel()]))


def in_reach(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """Causal, and at most `window` keys counting the query's own (Mistral's and Hugging Face's convention)."""
    distance = query - key
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def _block_mask(
    length: int, block: int, window: int | None, document_ids: Tensor | None, device: torch.device | None
) -> Tensor:
    """(N or B·N, 1, P, 2P): the queries of a block against the keys of the block before and of their own."""
    blocks = -(-length // block)
    query = torch.arange(block, device=device)[:, None]  # (P, 1)
    key = torch.arange(-block, block, device=device)[None, :]  # (1, 2P)
    band = in_reach(query, key, window).expand(blocks, block, 2 * block)  # (N, P, 2P)
    exists = (torch.arange(blocks, device=device)[:, None, None] > 0) | (key >= 0)  # (N, 1, 2P): nothing before block 0
    visible = (band & exists)[None]  # (1, N, P, 2P)
    if document_ids is not None:
        own = F.pad(document_ids, (0, blocks * block - length), value=-1).unflatten(1, (blocks, block))  # (B, N, P)
        visible = visible & (own[..., :, None] == _with_previous(own, dim=1)[..., None, :])  # (B, N, P, 2P)
    return visible.flatten(0, 1).unsqueeze(1)


def _with_previous(x: Tensor, dim: int) -> Tensor:
    """Put each block's predecessor before it: (..., N, P, ...) to (..., N, 2P, ...); block 0 gets zeros."""
    blocks = x.shape[dim]
    first = torch.zeros_like(x.narrow(dim, 0, 1))
    previous = torch.cat((first, x.narrow(dim, 0, blocks - 1)), dim)
    return torch.cat((previous, x), dim + 1)


def kernels_for(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Around a forward: which fused kernels its attention may take.

    Training, whose sequences all have one length, leaves that to torch, which prefers cuDNN's on some GPUs. Those are
    planned anew for every shape (tens of milliseconds): without gradients, as texts are read and generated in all
    lengths, the others are taken.
    """
    if device.type != "cuda" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return contextlib.nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def attend(
    q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, *, dropout: float = 0.0, scale: float | None = None
) -> Tensor:
    """softmax(q kᵀ · scale) v over the visible keys.

    Args:
        q: (B, H, T, D).
        k, v: (B, K, S, D); each key/value head serves H/K neighbouring query heads.
        visibility: from `see_before` or the cache.
        dropout: probability of dropping an attention weight.
        scale: None: 1/sqrt(D).

    Returns:
        (B, H, T, D).
    """
    if visibility.flex is not None:
        assert dropout == 0, "FlexAttention has no dropout"
        return flex_attend(q, k, v, visibility.flex, scale)
    if visibility.apart:
        return _attend_apart(q, k, v, visibility.apart, dropout, scale)
    grouped = q.shape[1] != k.shape[1]
    if visibility.block is not None:
        return _attend_in_blocks(q, k, v, visibility, dropout, scale)
    if _wider_is_faster(q):
        with torch.autocast("cpu", enabled=False):
            wide = attend(q.float(), k.float(), v.float(), visibility, dropout=dropout, scale=scale)
        return wide.to(torch.get_autocast_dtype("cpu"))
    return F.scaled_dot_product_attention(
        q, k, v, visibility.mask, dropout, is_causal=visibility.causal, scale=scale, enable_gqa=grouped
    )


def _wider_is_faster(q: Tensor) -> bool:
    """Whether (B, H, T, D) queries are short enough that the CPU's bf16 kernel is slow in its backward."""
    short = q.shape[2] * q.shape[3] <= LARGEST_WIDENED
    return short and q.device.type == "cpu" and torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()


def _attend_apart(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], dropout: float, scale: float | None
) -> Tensor:
    """(B, H, T, D) and twice (B, K, T, D) to (B, H, T, D), each document by itself, whose work is its T²."""
    rows = [x.transpose(1, 2).flatten(0, 1).split(lengths) for x in (q, k, v)]  # (L, H or K, D) each
    found = []
    for document in zip(*rows, strict=True):
        its_q, its_k, its_v = (x.transpose(0, 1).unsqueeze(0) for x in document)  # (1, H or K, L, D)
        out = attend(its_q, its_k, its_v, Visibility(), dropout=dropout, scale=scale)  # (1, H, L, D)
        found.append(out.squeeze(0).transpose(0, 1))  # (L, H, D)
    return torch.cat(found).unflatten(0, (len(q), -1)).transpose(1, 2)


def _attend_in_blocks(
    q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, dropout: float, scale: float | None
) -> Tensor:
    """(B, H, T, D) and twice (B, K, T, D) to (B, H, T, D), each block of P queries against 2P keys: work grows with T·P
    instead of T².
    """
    assert visibility.block is not None
    assert visibility.mask is not None
    batch, _, length, _ = q.shape
    block = visibility.block
    missing = -length % block
    q, k, v = (F.pad(x, (0, 0, 0, missing)).unflatten(2, (-1, block)) for x in (q, k, v))  # (B, H, N, P, D)
    k, v = _with_previous(k, dim=2), _with_previous(v, dim=2)  # (B, K, N, 2P, D)
    blocks = q.shape[2]
    mask = visibility.mask
    if mask.shape[0] != batch * blocks:  # no documents: the same masks for every sequence
        mask = mask.repeat(batch, 1, 1, 1)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B·N, H or K, P or 2P, D)
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale, enable_gqa=grouped)
    return out.unflatten(0, (batch, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :length]  # (B, H, T, D)
