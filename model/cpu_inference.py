"""Weights laid out for a CPU's matrix kernels, for inference with a model that won't be trained further.

A token at a time is bound by reading the weights from memory. oneDNN reads a matrix in its own block layout faster than
row by row, most of all in bf16.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.gpt import GPT

PACKED_DTYPES = (torch.float32, torch.bfloat16)


class PackedLinear(nn.Module):
    """A linear layer whose weight (out, in) is kept only in oneDNN's layout. For inference on a CPU."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        # private operators of torch, which its own compiler uses for frozen weights: `can_pack` tries them
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)
        self._bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return out


def can_pack(model: GPT) -> bool:
    """Whether this model's device and dtype, and this torch, have packed layers that compute what plain ones do."""
    weight = model.wte.weight
    if weight.device.type != "cpu" or weight.dtype not in PACKED_DTYPES or not torch.backends.mkldnn.is_available():
        return False
    x, matrix = torch.ones(1, 1, 16, dtype=weight.dtype), torch.eye(16, dtype=weight.dtype)
    try:
        with torch.no_grad():
            return torch.equal(PackedLinear(matrix, None)(x), F.linear(x, matrix))
    except (RuntimeError, AttributeError, TypeError, NotImplementedError):  # missing or changed in this torch
        return False


@torch.no_grad()
def pack(model: GPT) -> bool:
    """Pack every linear layer and the head in place; return whether that was possible.

    The results differ by rounding. Only embeddings and norms remain parameters of a packed model: it can generate and
    be evaluated, not be trained or saved. A tied head is packed beside the embedding, whose rows are still looked up.
    """
    if not can_pack(model):
        return False
    model.eval()
    model.packed_head = PackedLinear(model.head_weight, None)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, PackedLinear(module.weight, module.bias))
    return True
