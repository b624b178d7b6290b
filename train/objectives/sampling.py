"""Answers that a policy samples: a block of prompts side by side, through the key-value cache.

A block has one shape from its first token to its last: rows that have ended are computed to the end of the block, and
what they give is dropped. So a row's text depends only on the weights, its block and its own random numbers, for any
number of ranks. P prompts, G samples of each, B = P·G rows, N tokens of an answer at most, V padded vocabulary.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.seeds import keys_of
from data_prep.tokenization.tokenizer import Ids
from model.cache import KVCache
from model.devices import without_compiling
from model.gpt import GPT
from model.number_formats import Dtype
from model.precision import autocast


class Sampled(NamedTuple):
    """Answers of B rows. Their first end token is part of them: a model learns to stop only by it.

    tokens: (B, N) int64, 0 behind an answer. lengths: (B,) int64. ended: (B,) bool; the others were cut at N tokens.
    """

    tokens: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    ended: npt.NDArray[np.bool_]


def random_numbers(seed: int, step: int, prompt: int, sample: int, count: int) -> npt.NDArray[np.float64]:
    """Uniform numbers in [0, 1), (count,), of nothing but these words. Args: prompt: its place among the step's."""
    keys = keys_of(f"rollout {seed} {step} {prompt} {sample}", 2)
    return np.random.Generator(np.random.Philox(key=keys)).random(count)


@torch.no_grad()
def sample_answers(
    model: GPT,
    prompts: Sequence[Ids],
    numbers: npt.NDArray[np.float64],
    *,
    temperature: float,
    end_ids: Collection[int],
    dtype: Dtype,
) -> Sampled:
    """Sample answers from softmax(logits / temperature), the whole of it: neither top-k nor top-p.

    What an importance ratio compares is this distribution (`objectives.policy.log_probabilities` has the same one).

    Args:
        prompts: P of them, ids (n,) each. numbers: (B, N) in [0, 1), a row for each sample, those of a prompt together.
        temperature: 0 takes the likeliest token.
    """
    rows, count = numbers.shape
    device = next(model.parameters()).device
    lengths = torch.tensor([len(ids) for ids in prompts], device=device)  # (P)
    padded = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64, device=device)  # (P, L)
    for row, ids in zip(padded, prompts, strict=True):
        row[: len(ids)] = torch.from_numpy(ids.astype(np.int64))
    tokens = torch.zeros(rows, count, dtype=torch.int64, device=device)  # (B, N)
    done = torch.zeros(rows, dtype=torch.bool, device=device)  # (B)
    kept = torch.zeros(rows, dtype=torch.int64, device=device)  # (B)
    ends = torch.tensor(sorted(end_ids), dtype=torch.int64, device=device)
    wide = torch.float32 if device.type == "mps" else torch.float64  # which MPS lacks
    drawn = torch.from_numpy(numbers).to(device, wide)
    was_training = model.training
    model.eval()
    try:
        with without_compiling(), autocast(dtype, device):
            cache = KVCache(model.config, len(prompts), padded.shape[1] + count)
            uniform = bool((lengths == padded.shape[1]).all())
            logits = model.next_logits(padded, cache, None if uniform else lengths)  # (P, V)
            which = torch.arange(len(prompts), device=device).repeat_interleave(rows // len(prompts))  # (B)
            cache, logits = cache.select(which), logits[which]  # (B, V)
            for place in range(count):
                chosen = _choose(logits, drawn[:, place : place + 1], temperature, wide)  # (B, 1)
                chosen = torch.where(done.unsqueeze(1), 0, chosen)
                tokens[:, place : place + 1] = chosen
                kept += ~done
                done |= torch.isin(chosen.squeeze(1), ends)
                if place + 1 == count or bool(done.all()):
                    break
                logits = model.next_logits(chosen, cache)
    finally:
        model.train(was_training)
    return Sampled(tokens.cpu().numpy(), kept.cpu().numpy(), done.cpu().numpy())


def _choose(logits: Tensor, numbers: Tensor, temperature: float, wide: torch.dtype) -> Tensor:
    """The token (B, 1) at which the distribution function of a row of (B, V) passes its number of (B, 1)."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    heights = (logits.to(wide) / temperature).softmax(dim=-1).cumsum(dim=-1)  # (B, V)
    chosen = torch.searchsorted(heights, numbers * heights[:, -1:], right=True)  # never one without probability
    return chosen.clamp(max=logits.shape[-1] - 1)
