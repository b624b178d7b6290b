"""Rows of the embedding table and the head that are trained whole beside adapters, all others being frozen.

Adapters correct matrices inside blocks. An id that the base never saw has no row there that means anything, and a
correction elsewhere can't give it one: its own row must be trained, in the table and in the head, or the model never
generates it. n such rows, V padded vocabulary, C width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.roles import Role


class _NewRows(nn.Module):
    """A matrix (V, C), frozen, and `lora_rows` (n, C) in place of its rows from `first` on."""

    weight: Tensor
    lora_rows: Tensor

    def _take(self, base: nn.Embedding | nn.Linear, first: int, count: int) -> None:
        nn.Module.__init__(self)
        self.weight, self.first, self.merged = base.weight, first, False
        self.lora_rows = nn.Parameter(base.weight.detach()[first : first + count].clone())

    def roles(self) -> dict[str, Role]:
        """Of what is trained; the matrix belongs to the model."""
        return {"lora_rows": Role("adapter")}

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, rows {self.first} … {self.first + len(self.lora_rows) - 1} trained"

    def matrix(self) -> Tensor:
        """(V, C) with the trained rows."""
        if self.merged:
            return self.weight
        return torch.cat([self.weight[: self.first], self.lora_rows, self.weight[self.first + len(self.lora_rows) :]])

    @torch.no_grad()
    def set_merged(self, merged: bool) -> None:
        """Copy the rows into the matrix; nothing has to be taken out again, as what is there is not used then."""
        if merged:
            self.weight[self.first : self.first + len(self.lora_rows)] = self.lora_rows
        self.merged = merged


class TableWithNewRows(_NewRows, nn.Embedding):
    def __init__(self, base: nn.Embedding, first: int, count: int) -> None:
        self._take(base, first, count)
        for name in ("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "sparse"):  # DDP asks for some
            setattr(self, name, getattr(base, name))

    def forward(self, tokens: Tensor) -> Tensor:
        """(...) ids to (..., C)."""
        known = F.embedding(tokens, self.weight)
        if self.merged:
            return known
        place = tokens - self.first
        new = F.embedding(place.clamp(0, len(self.lora_rows) - 1), self.lora_rows)
        return torch.where(((place >= 0) & (place < len(self.lora_rows))).unsqueeze(-1), new, known)


class HeadWithNewRows(_NewRows, nn.Linear):
    def __init__(self, base: nn.Linear, first: int, count: int) -> None:
        self._take(base, first, count)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., V)."""
        return F.linear(x, self.matrix())


def matrix_of(layer: nn.Module) -> Tensor:
    """(V, C): a table's or a head's matrix, with rows that are trained beside it in their places."""
    if isinstance(layer, TableWithNewRows | HeadWithNewRows):
        return layer.matrix()
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight
