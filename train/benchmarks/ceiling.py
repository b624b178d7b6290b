"""What the machine could do at best: a step's matrix products and nothing else, at the step's shapes.

Every linear layer once forward and twice backward (the gradients of its input and of its weight), the head likewise,
and attention's products over the keys that are seen: half of all, as a causal kernel may skip the rest. No norms, no
activations, no softmax, no loss, no optimizer; every result goes into memory that was there before.

N rows (tokens of a micro-batch), B micro-batch, H heads, T sequence, D head size, S keys.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig
from train.batches.loader import StepBatch

HEAD_ROWS_CPU = 1024  # a chunk of the head's products: the logits of all rows would only be carried to memory and back


@dataclass
class Linear:
    """The operands and results of one linear layer's three products. n in, m out."""

    x: Tensor  # (N, n), and its gradient's place
    y: Tensor  # (N, m), and its gradient
    weight: Tensor  # (m, n)
    x_grad: Tensor  # (N, n)
    weight_grad: Tensor  # (m, n)

    def multiply(self) -> None:
        torch.mm(self.x, self.weight.T, out=self.y)
        torch.mm(self.y, self.weight, out=self.x_grad)
        torch.mm(self.y.T, self.x, out=self.weight_grad)


@dataclass
class AttentionProducts:
    """Two products forward, four backward, of one layer."""

    q: Tensor  # (B·H, T, D); stands for the gradient of the output, too
    k: Tensor  # (B·H, S, D); stands for the values, too
    scores: Tensor  # (B·H, T, S)
    out: Tensor  # (B·H, T, D)
    k_grad: Tensor  # (B·H, S, D)

    def multiply(self) -> None:
        torch.bmm(self.q, self.k.transpose(1, 2), out=self.scores)  # scores of q and k
        torch.bmm(self.scores, self.k, out=self.out)  # output
        torch.bmm(self.q, self.k.transpose(1, 2), out=self.scores)  # gradient of the weights
        torch.bmm(self.scores.transpose(1, 2), self.q, out=self.k_grad)  # gradient of the values
        torch.bmm(self.scores, self.k, out=self.out)  # gradient of q
        torch.bmm(self.scores.transpose(1, 2), self.q, out=self.k_grad)  # gradient of k


class Ceiling:
    """The products of one step, called as a step is."""

    def __init__(self, config: ModelConfig, micro_batch: int, dtype: torch.dtype, device: torch.device) -> None:
        self._room: dict[tuple[str, int, int], Tensor] = {}
        self._dtype, self._device = dtype, device
        tokens = micro_batch * config.block_size
        width, hidden, ways = config.n_embd, config.hidden_size, 2 if config.mlp == "swiglu" else 1
        projected = (config.n_head + 2 * config.kv_heads) * config.head_size
        shapes = [(width, projected), (width, width), *[(width, hidden)] * ways, (hidden, width)]  # (in, out)
        self._linears = [self._linear(tokens, *shape) for _ in range(config.n_layer) for shape in shapes]
        self._attentions = [self._attention(config, micro_batch, window) for window in config.windows]
        rows = min(tokens, HEAD_ROWS_CPU) if device.type == "cpu" else tokens
        self._heads = [rows] * (tokens // rows) + ([tokens % rows] if tokens % rows else [])
        self._head = self._linear(rows, width, config.padded_vocab_size)

    def __call__(self, batch: StepBatch, step: int) -> None:
        """Multiply as often as the batch has micro-batches; what they hold does not matter."""
        with torch.no_grad():
            for _ in range(len(batch.tokens)):
                for linear in self._linears:
                    linear.multiply()
                for attention in self._attentions:
                    attention.multiply()
                for rows in self._heads:
                    self._part_of_head(rows).multiply()

    def _part_of_head(self, rows: int) -> Linear:
        head = self._head
        return Linear(head.x[:rows], head.y[:rows], head.weight, head.x_grad[:rows], head.weight_grad)

    def _linear(self, rows: int, inputs: int, outputs: int) -> Linear:
        """A layer with matrices of its own. Activations are shared, as those of the layer before are cached yet."""
        x, x_grad = self._shared("x", rows, inputs), self._shared("x gradient", rows, inputs)
        weight, weight_grad = (self._random(outputs, inputs) / inputs for _ in range(2))
        return Linear(x, self._shared("y", rows, outputs), weight, x_grad, weight_grad)

    def _shared(self, name: str, rows: int, columns: int) -> Tensor:
        key = (name, rows, columns)
        if key not in self._room:
            self._room[key] = self._random(rows, columns)
        return self._room[key]

    def _random(self, rows: int, columns: int) -> Tensor:
        return torch.rand(rows, columns, dtype=self._dtype, device=self._device)

    def _attention(self, config: ModelConfig, micro_batch: int, window: int | None) -> AttentionProducts:
        length, maps = config.block_size, micro_batch * config.n_head
        keys = keys_seen(length, window)
        shapes = [(length, config.head_size), (keys, config.head_size), (length, keys)]
        q, k, scores = (self._shared(f"{maps} maps", maps * rows, columns).view(maps, rows, columns)
                        for rows, columns in shapes)  # fmt: skip
        out, k_grad = (self._shared(f"{maps} maps' results", maps * rows, columns).view(maps, rows, columns)
                       for rows, columns in shapes[:2])  # fmt: skip
        return AttentionProducts(q, k, scores, out, k_grad)


def keys_seen(length: int, window: int | None) -> int:
    """Keys that a query of a causal sequence sees on average, itself included, rounded up."""
    reach = length if window is None else min(window, length)
    seen = reach * (reach + 1) // 2 + (length - reach) * reach
    return -(-seen // length)
