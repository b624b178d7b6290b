"""Weights for a vocabulary with more ids than they were trained with. V ids, C width."""

from collections.abc import Mapping

import torch
from torch import Tensor

from model.config import ModelConfig


def with_ids(weights: Mapping[str, Tensor], known: int, model: ModelConfig) -> dict[str, Tensor]:
    """A model's tensors with rows for ids that are appended to its `known` ones, up to `model.vocab_size`.

    New rows of the tables (rows, C) and of the head are the mean of the known ones, so that a new id starts as likely
    as an average one (Hewitt 2021, "Initializing new word embeddings for pretrained language models"). Rows of padding
    become those of ids; what `model` has beyond is padding, zero where the weights have none.
    """
    if model.vocab_size == known:
        return dict(weights)
    sizes = {"wte": model.padded_vocab_size, "lm_head": model.padded_vocab_size, "wve": model.vocab_size}
    return {
        name: _grown(tensor, known, model.vocab_size, sizes[part]) if (part := name.split(".")[0]) in sizes else tensor
        for name, tensor in weights.items()
    }


@torch.no_grad()
def _grown(table: Tensor, known: int, ids: int, rows: int) -> Tensor:
    """(rows, C) from a table with at least `known` rows."""
    grown = table.new_zeros(rows, table.shape[1])
    kept = min(rows, len(table))
    grown[:kept] = table[:kept]
    grown[known:ids] = table[:known].double().mean(0).to(table.dtype)
    return grown
