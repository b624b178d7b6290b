"""Losses of a model on fixed tokens, by block, and what follows from their sums. Each target token counts once."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from data_prep.token_sets.sequences import Sequences, Tokens, document_ids
from model.gpt import GPT, IGNORE_INDEX
from model.number_formats import Dtype
from model.precision import autocast
from model.ranks import Ranks

Sums = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A figure and its standard error (None where there is but one block of tokens)."""

    value: float
    standard_error: float | None


@dataclass(frozen=True)
class Blocks:
    """Sums over blocks of neighbouring targets, in float64: losses in nats, targets, bytes of their text.

    A block has T targets, of conversations those of one sequence's answers.
    """

    losses: Sums
    targets: Sums
    bytes: Sums

    def loss(self) -> Estimate:
        """Nats per token."""
        return ratio(self.losses, self.targets)

    def perplexity(self) -> Estimate:
        loss = self.loss()
        value = math.exp(loss.value) if loss.value < 700 else math.inf
        return Estimate(value, None if loss.standard_error is None else value * loss.standard_error)

    def bits_per_byte(self) -> Estimate:
        return ratio(self.losses / math.log(2), self.bytes)


def ratio(numerators: Sums, denominators: Sums) -> Estimate:
    """sum / sum, and the standard error of that ratio (Cochran 1977, section 6.3), blocks taken as independent.

    Tokens of one text are hard or easy together, so an error estimated from single tokens would be too small.
    """
    count, total = len(numerators), float(denominators.sum())
    value = float(numerators.sum()) / total if total else math.nan
    if count < 2:
        return Estimate(value, None)
    residuals = numerators - value * denominators
    return Estimate(value, math.sqrt(count / (count - 1) * float(residuals @ residuals)) / total)


@torch.no_grad()
def measure(
    model: GPT,
    stream: Tokens,
    piece_bytes: npt.NDArray[np.int32],
    ranks: Ranks,
    *,
    targets: int,
    stride: int,
    micro_batch: int,
    dtype: Dtype = "fp32",
    split_documents_at: int | None = None,
    done: Callable[[int], object] = lambda count: None,
) -> Blocks:
    """Measure tokens 1 … `targets` of the stream, shared out over all ranks (all must call).

    Args:
        piece_bytes: (V,) bytes of text that each id stands for.
        targets: how many, a multiple of the model's length T.
        stride: targets counted in each sequence but the first; T: sequences don't overlap.
        micro_batch: sequences at a time.
        split_documents_at: the id that starts a document, where attention is to stay inside documents.
        done: called with the number of sequences of this rank's share that are finished.
    """
    length = model.config.block_size
    assert targets % length == 0
    sums = np.zeros((3, targets // length))
    starts = window_starts(targets, length, stride)
    first_new = np.concatenate(([0], starts[:-1] + length))  # the first target that no earlier sequence has counted
    was_training = model.training
    model.eval()
    for first in range(ranks.rank * micro_batch, len(starts), ranks.world_size * micro_batch):
        chosen = starts[first : first + micro_batch]
        rows = np.stack([stream.read(int(start), int(start) + length + 1) for start in chosen]).astype(np.int64)
        inputs = rows[:, :-1]
        documents = None if split_documents_at is None else document_ids(inputs, split_documents_at)
        losses = _losses(model, inputs, rows[:, 1:], documents, ranks.device, dtype)  # (≤M, T)
        place = chosen[:, None] + np.arange(length)  # (≤M, T): which target, counted from 0
        new = place >= first_new[first : first + micro_batch, None]
        blocks = place[new] // length
        figures: tuple[npt.NDArray[Any], ...] = (losses[new], np.ones(len(blocks)), piece_bytes[rows[:, 1:][new]])
        for row, weights in zip(sums, figures, strict=True):
            row += np.bincount(blocks, weights=weights, minlength=len(row))
        done(len(chosen))
    model.train(was_training)
    return Blocks(*np.sum(ranks.gather_array(sums), axis=0))


def window_starts(targets: int, length: int, stride: int) -> npt.NDArray[np.int64]:
    """Starts (n,) of sequences of T inputs that together count each of `targets` targets; the last may overlap."""
    return np.append(np.arange(0, targets - length, stride), targets - length)


@torch.no_grad()
def measure_answers(
    model: GPT,
    sequences: Sequences,
    piece_bytes: npt.NDArray[np.int32],
    ranks: Ranks,
    *,
    count: int,
    micro_batch: int,
    dtype: Dtype = "fp32",
    done: Callable[[int], object] = lambda count: None,
) -> Blocks:
    """Measure the targets that count of the first `count` sequences of conversations, shared out over all ranks.

    Args: as `measure`. All ranks call.
    """
    sums = np.zeros((3, count))
    was_training = model.training
    model.eval()
    for first in range(ranks.rank * micro_batch, count, ranks.world_size * micro_batch):
        chosen = np.arange(first, min(first + micro_batch, count))
        rows = sequences.rows(chosen)
        counted = rows.targets != IGNORE_INDEX  # (≤M, T)
        sums[0, chosen] = _losses(model, rows.inputs, rows.targets, rows.document_ids, ranks.device, dtype).sum(axis=1)
        sums[1, chosen] = counted.sum(axis=1)
        sums[2, chosen] = np.where(counted, piece_bytes[np.where(counted, rows.targets, 0)], 0).sum(axis=1)
        done(len(chosen))
    model.train(was_training)
    return Blocks(*np.sum(ranks.gather_array(sums), axis=0))


def _losses(
    model: GPT,
    inputs: npt.NDArray[np.int64],
    targets: npt.NDArray[np.int64],
    documents: npt.NDArray[np.int64] | None,
    device: torch.device,
    dtype: Dtype,
) -> Sums:
    """Cross-entropy of each target in nats, (M, T), 0 where it does not count; inputs, targets, documents: (M, T)."""
    ids = None if documents is None else torch.from_numpy(documents).to(device)
    with autocast(dtype, device):
        losses = model(
            torch.from_numpy(inputs).to(device),
            torch.from_numpy(targets).to(device),
            reduction="none",
            document_ids=ids,
        )
    return np.asarray(losses.cpu().double().numpy())  # Apple GPUs have no float64
