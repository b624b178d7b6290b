"""Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685): train a small correction B·A beside each frozen matrix.

B starts at zero, so that an adapted model starts as the model it adapts. R rank.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.gpt import GPT
from model.initialisation import parameter_generator
from model.lora_config import LoraConfig
from model.roles import Role


class LoraLinear(nn.Linear):
    """A linear layer W x + b with (alpha/R)·B A x added.

    `weight` and `bias` keep their names and stay frozen; `lora_a` (R, in) and `lora_b` (out, R) are trained.
    """

    def __init__(self, base: nn.Linear, config: LoraConfig) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.lora_a = nn.Parameter(base.weight.new_empty(config.rank, base.in_features))
        self.lora_b = nn.Parameter(base.weight.new_zeros(base.out_features, config.rank))
        self.scale = config.alpha / config.rank
        self.dropout = config.dropout
        self.merged = False

    def roles(self) -> dict[str, Role]:
        """Of what is trained; the frozen layer's own belong to the module that has it."""
        return {"lora_a": Role("adapter"), "lora_b": Role("adapter")}

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        out = F.linear(x, self.weight, self.bias)
        if self.merged:
            return out
        narrow = F.linear(F.dropout(x, self.dropout, self.training), self.lora_a)  # (..., R)
        return out + self.scale * F.linear(narrow, self.lora_b)

    @torch.no_grad()
    def set_merged(self, merged: bool) -> None:
        """Add the correction to the weight, or take it out again; does nothing where that is already done."""
        if merged != self.merged:
            self.weight.add_(self.lora_b @ self.lora_a, alpha=self.scale if merged else -self.scale)
            self.merged = merged


def add_lora(model: GPT, config: LoraConfig, seed: int) -> None:
    """Freeze the model and put an adapter beside every target, in place. Its outputs do not change.

    A is normal with deviation 1/R, depends only on (seed, name), and is the same on every rank.

    Raises ValueError where the model is adapted already, or has none of the targets.
    """
    if any(lora_layers(model)):
        raise ValueError("the model already has adapters: merge and drop them first")
    targets = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.split(".")[-1] in config.targets
    ]
    if not targets:
        raise ValueError(f"the model has none of lora.targets {', '.join(config.targets)}: name others")
    model.requires_grad_(False)
    for name, module in targets:
        adapter = LoraLinear(module, config)
        values = torch.empty(adapter.lora_a.shape, dtype=torch.float32)
        values.normal_(0.0, 1.0 / config.rank, generator=parameter_generator(seed, f"{name}.lora_a"))
        with torch.no_grad():
            adapter.lora_a.copy_(values)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, adapter)


def lora_layers(model: GPT) -> Iterator[tuple[str, LoraLinear]]:
    """The adapted layers by name."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


def lora_tensors(model: GPT) -> dict[str, Tensor]:
    """The adapters' parameters by name: all that training has changed."""
    return {name: value for name, value in model.named_parameters() if ".lora_" in name}


def set_merged(model: GPT, merged: bool) -> None:
    """Merge all adapters into the weights (no cost at inference), or take them out again to train on."""
    for _, layer in lora_layers(model):
        layer.set_merged(merged)


def drop_lora(model: GPT) -> None:
    """Merge the adapters for good: plain linear layers of the same names, trainable again."""
    for name, layer in list(lora_layers(model)):
        layer.set_merged(True)
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        plain.weight, plain.bias = layer.weight, layer.bias
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, plain)
    model.requires_grad_(True)
