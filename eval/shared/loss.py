"""The loss of a model on fixed tokens: a sum over target tokens divided by their count."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from data_prep.token_sets.sequences import Sequences, document_ids
from model.gpt import GPT, IGNORE_INDEX
from model.number_formats import Dtype
from model.precision import autocast
from model.ranks import Ranks


@dataclass(frozen=True)
class LossResult:
    """Mean cross-entropy in nats over `tokens` target tokens, whose text has so many bytes of UTF-8."""

    loss: float
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        """Of the targets' text, which compares across tokenizers; NaN where it has no bytes."""
        return self.loss * self.tokens / math.log(2) / self.bytes if self.bytes else math.nan


@torch.no_grad()
def evaluate_loss(
    model: GPT,
    windows: Sequences,
    piece_bytes: npt.NDArray[np.int32],
    ranks: Ranks,
    *,
    window_count: int,
    micro_batch: int,
    dtype: Dtype,
    split_documents_at: int | None = None,
    done: Callable[[int], object] = lambda count: None,
) -> LossResult:
    """The mean loss in nats over the targets of the first `window_count` sequences, divided among all ranks.

    All ranks call.

    Every micro-batch has the same shape, the last one filled up with ignored targets, so that compiled models aren't
    compiled again. Which rank has which micro-batch only changes the order of a float64 sum.

    Args:
        piece_bytes: (V,) bytes of text that each id stands for.
        window_count: how many sequences. micro_batch: how many of them at a time.
        split_documents_at: the end-of-text id, where attention is to stay inside documents that the sequences don't
            tell apart themselves.
        done: called after every micro-batch of this rank's share with its number of sequences.
    """
    assert 0 < window_count <= windows.count
    was_training = model.training
    model.eval()
    loss_sum, target_count, byte_count = 0.0, 0, 0
    for start in range(ranks.rank * micro_batch, window_count, ranks.world_size * micro_batch):
        stop = min(start + micro_batch, window_count)
        rows = windows.rows(np.arange(start, stop))
        inputs, targets = torch.from_numpy(rows.inputs), torch.from_numpy(rows.targets)  # (≤M, T)
        counted = rows.targets[rows.targets != IGNORE_INDEX]  # (n,)
        target_count += len(counted)
        byte_count += int(piece_bytes[counted].sum())
        missing = micro_batch - (stop - start)
        inputs = torch.cat([inputs, inputs.new_zeros(missing, inputs.shape[1])])  # (M, T)
        targets = torch.cat([targets, targets.new_full((missing, targets.shape[1]), IGNORE_INDEX)])  # (M, T)
        documents = None
        if rows.document_ids is not None:
            of_rows = torch.from_numpy(rows.document_ids)  # (≤M, T)
            documents = torch.cat([of_rows, of_rows.new_zeros(missing, of_rows.shape[1])]).to(ranks.device)
        if split_documents_at is not None:
            documents = torch.from_numpy(document_ids(inputs.numpy(), split_documents_at)).to(ranks.device)
        with autocast(dtype, ranks.device):
            loss_sum += model(inputs.to(ranks.device), targets.to(ranks.device), document_ids=documents).item()
        done(stop - start)
    model.train(was_training)
    loss_sum, total, total_bytes = ranks.sum([loss_sum, float(target_count), float(byte_count)])
    return LossResult(loss_sum / total, int(total), int(total_bytes))
