"""The token embedding of a model whose output layer is the same matrix. V padded vocabulary, C width."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def embed_with_shared_table(tokens: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens' rows (..., C) of a table (V, C), and the table for the output layer, which must use it once.

    By itself each use makes a gradient as large as the table, mostly zeros at the embedding, and adds them up. Here the
    gradients of the rows are added into the output layer's.
    """
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and table.requires_grad):
        return F.embedding(tokens, table), table
    rows, head = _SharedTable.apply(table, tokens)
    return rows, head


class _SharedTable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(tokens)
        ctx.shape = table.shape
        ctx.set_materialize_grads(False)
        return F.embedding(tokens, table), table.view_as(table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor | None, grad_head: Tensor | None) -> tuple[Tensor | None, None]:
        if grad_rows is None:
            return grad_head, None
        (tokens,) = ctx.saved_tensors
        grad = grad_rows.new_zeros(ctx.shape) if grad_head is None else grad_head  # nobody else holds it
        return grad.index_add_(0, tokens.flatten(), grad_rows.flatten(0, -2).to(grad.dtype)), None
