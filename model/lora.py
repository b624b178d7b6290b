"""Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685): train a small correction B·A beside each frozen matrix.

B starts at zero, so that an adapted model starts as the model it adapts. R rank.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.gpt import GPT
from model.initialisation import parameter_generator
from model.lora_config import LoraConfig, part_rows
from model.new_rows import HeadWithNewRows, TableWithNewRows
from model.roles import Role


class LoraLinear(nn.Linear):
    """A linear layer W x + b with (alpha/R)·B A x added, to all outputs or to those of some parts of its rows.

    `weight` and `bias` keep their names and stay frozen; `lora_a` (R, in) and `lora_b` (out, R) are trained, or for
    each part, such as q, `lora_a_q` (R, in) and `lora_b_q` (its rows, R).
    """

    def __init__(self, base: nn.Linear, config: LoraConfig, parts: Mapping[str, tuple[int, int]] | None = None) -> None:
        """Args: parts: by name the first of its rows and their number; None: one adapter for all rows."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.rows = {f"_{part}": rows for part, rows in parts.items()} if parts else {"": (0, base.out_features)}
        for part, (_, count) in self.rows.items():
            self.register_parameter(f"lora_a{part}", nn.Parameter(base.weight.new_empty(config.rank, base.in_features)))
            self.register_parameter(f"lora_b{part}", nn.Parameter(base.weight.new_zeros(count, config.rank)))
        self.scale = config.alpha / config.rank
        self.dropout = config.dropout
        self.merged = False

    def roles(self) -> dict[str, Role]:
        """Of what is trained; the frozen layer's own belong to the module that has it."""
        return {f"lora_{side}{part}": Role("adapter") for part in self.rows for side in "ab"}

    def sides(self) -> Iterator[tuple[Tensor, Tensor, tuple[int, int]]]:
        """A (R, in), B (rows, R), and (first row, rows) of every part."""
        for part, rows in self.rows.items():
            yield getattr(self, f"lora_a{part}"), getattr(self, f"lora_b{part}"), rows

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        out = F.linear(x, self.weight, self.bias)
        if self.merged:
            return out
        dropped = F.dropout(x, self.dropout, self.training)
        for a, b, (first, count) in self.sides():
            correction = self.scale * F.linear(F.linear(dropped, a), b)  # (..., rows)
            if count < self.out_features:
                correction = F.pad(correction, (first, self.out_features - first - count))
            out = out + correction
        return out

    @torch.no_grad()
    def set_merged(self, merged: bool) -> None:
        """Add the correction to the weight, or take it out again; does nothing where that is already done."""
        if merged != self.merged:
            for a, b, (first, count) in self.sides():
                self.weight[first : first + count].add_(b @ a, alpha=self.scale if merged else -self.scale)
            self.merged = merged


def add_lora(model: GPT, config: LoraConfig, seed: int) -> None:
    """Freeze the model and put an adapter beside every target, in place, and the rows of new ids beside the others.

    A scalar head is trained whole, as those rows are.

    Its outputs do not change.

    A is normal with deviation 1/R, depends only on (seed, name), and is the same on every rank.

    Raises ValueError where the model is adapted already, or has none of the targets.
    """
    if any(lora_layers(model)):
        raise ValueError("the model already has adapters: merge and drop them first")
    parts, rows = config.parts(), part_rows(model.config)
    targets = [
        (name, module, [part for part in parts[layer] if part])
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (layer := ".".join(name.split(".")[-2:])) in parts
    ]
    if not targets:
        raise ValueError(f"the model has none of lora.targets {', '.join(config.targets)}: name others")
    model.requires_grad_(False)
    for name, module, chosen in targets:
        adapter = LoraLinear(module, config, {part: rows[part] for part in chosen})
        for own, parameter in adapter.named_parameters():
            if own.startswith("lora_a"):
                values = torch.empty(parameter.shape, dtype=torch.float32)
                values.normal_(0.0, 1.0 / config.rank, generator=parameter_generator(seed, f"{name}.{own}"))
                with torch.no_grad():
                    parameter.copy_(values)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, adapter)
    if config.new_rows:
        first = model.config.vocab_size - config.new_rows
        model.wte = TableWithNewRows(model.wte, first, config.new_rows)
        if not model.config.tie_weights:
            model.lm_head = HeadWithNewRows(model.lm_head, first, config.new_rows)
    if model.config.scalar_head:
        model.scalar_head = HeadWithNewRows(model.scalar_head, 0, 1)


def lora_layers(model: GPT) -> Iterator[tuple[str, LoraLinear]]:
    """The adapted layers by name."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


def lora_tensors(model: GPT) -> dict[str, Tensor]:
    """The adapters' parameters and new ids' rows by name: all that training has changed."""
    return {name: value for name, value in model.named_parameters() if ".lora_" in name}


def set_merged(model: GPT, merged: bool) -> None:
    """Merge all adapters into the weights (no cost at inference), or take them out again to train on."""
    for _, layer in lora_layers(model):
        layer.set_merged(merged)
    for _, rows in _new_rows(model):
        rows.set_merged(merged)


def drop_lora(model: GPT) -> None:
    """Merge the adapters for good: plain linear layers of the same names, trainable again."""
    for name, layer in list(lora_layers(model)):
        layer.set_merged(True)
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        plain.weight, plain.bias = layer.weight, layer.bias
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, plain)
    for name, rows in list(_new_rows(model)):
        rows.set_merged(True)
        count, width = rows.weight.shape
        whole: nn.Embedding | nn.Linear = nn.Embedding(count, width, device="meta")
        if name != "wte":
            whole = nn.Linear(width, count, bias=False, device="meta")
        whole.weight = rows.weight
        setattr(model, name, whole)
    model.requires_grad_(True)


def _new_rows(model: GPT) -> Iterator[tuple[str, TableWithNewRows | HeadWithNewRows]]:
    """The layers with rows that are trained whole, by name."""
    for name in ("wte", "lm_head", "scalar_head"):
        layer = getattr(model, name, None)
        if isinstance(layer, TableWithNewRows | HeadWithNewRows):
            yield name, layer
