"""Which matrices are adapted and how strongly (LoRA, Hu et al. 2021, arXiv:2106.09685); without torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from model.config import ModelConfig

TARGETS = ("c_attn", "c_proj", "c_fc", "c_gate")  # all matrices of a block, by the last name of their layers
PARTS = "qkv"  # of c_attn's rows
CHOICES: dict[str, tuple[tuple[str, str], ...]] = {  # what each target adapts: layers, and "" or a part of their rows
    "c_attn": (("attn.c_attn", ""),),
    "c_proj": (("attn.c_proj", ""), ("mlp.c_proj", "")),
    "c_fc": (("mlp.c_fc", ""),),
    "c_gate": (("mlp.c_gate", ""),),
    **{part: (("attn.c_attn", part),) for part in PARTS},
    "o": (("attn.c_proj", ""),),
    "up": (("mlp.c_fc", ""),),
    "gate": (("mlp.c_gate", ""),),
    "down": (("mlp.c_proj", ""),),
}


@dataclass(frozen=True)
class LoraConfig:
    """What to adapt and how strongly.

    Attributes:
        rank: R, columns of B and rows of A.
        alpha: the correction is scaled by alpha/rank.
        dropout: on the input of the correction.
        targets: what to adapt: c_attn (one adapter for queries, keys and values together) or some of q, k, v (one
            each), o (attention's output), up, gate and down (the MLP's), or by the layers' last names c_proj (o and
            down), c_fc (up), c_gate (gate).
        new_rows: how many of the last ids have their rows of table and head trained, too, whole.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS
    new_rows: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank is {self.rank}: use 1 or more")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"lora.dropout is {self.dropout}: use at least 0 and less than 1")
        if self.new_rows < 0:
            raise ValueError(f"lora.new_rows is {self.new_rows}: use 0 or more")
        unknown = sorted(set(self.targets) - set(CHOICES))
        if unknown or not self.targets:
            raise ValueError(f"lora.targets {unknown or '()'} can't be adapted: choose from {', '.join(CHOICES)}")
        twice = [part for part in PARTS if part in self.targets]
        if twice and "c_attn" in self.targets:
            raise ValueError(f"lora.targets has {twice[0]} twice, as c_attn adapts it as well: leave one of them out")

    def parts(self) -> dict[str, tuple[str, ...]]:
        """What to adapt by the layer's name in a block: parts of its rows, in their order, or ("",) for all."""
        found = {place for target in self.targets for place in CHOICES[target]}
        layers = dict.fromkeys(layer for choice in CHOICES.values() for layer, _ in choice)
        parts = {layer: tuple(part for part in ("", *PARTS) if (layer, part) in found) for layer in layers}
        return {layer: chosen for layer, chosen in parts.items() if chosen}


def part_rows(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """The first row of c_attn's weight and the number of rows, of queries, keys and values."""
    queries, keys = model.n_head * model.head_size, model.kv_heads * model.head_size
    return {"q": (0, queries), "k": (queries, keys), "v": (queries + keys, keys)}


def adapter_count(model: ModelConfig, config: LoraConfig) -> int:
    """Parameters of the adapters that `add_lora` would make, new ids' rows and a scalar head among them."""
    width, hidden = model.n_embd, model.hidden_size
    rows = {part: count for part, (_, count) in part_rows(model).items()}
    outputs = {"attn.c_attn": sum(rows.values()), "attn.c_proj": width, "mlp.c_fc": hidden, "mlp.c_proj": width}
    if model.mlp == "swiglu":
        outputs["mlp.c_gate"] = hidden
    inputs = dict.fromkeys(outputs, width) | {"mlp.c_proj": hidden}
    sides = [
        inputs[layer] + rows.get(part, outputs[layer])
        for layer, parts in config.parts().items()
        if layer in outputs
        for part in parts
    ]
    rows_of_ids = config.new_rows * width * (1 if model.tie_weights else 2)
    return config.rank * model.n_layer * sum(sides) + rows_of_ids + (width if model.scalar_head else 0)


def missing_targets(model: ModelConfig, targets: Sequence[str]) -> list[str]:
    """Those that a model doesn't have: a gate, where its MLP has none."""
    return [target for target in targets if target in ("c_gate", "gate") and model.mlp != "swiglu"]
