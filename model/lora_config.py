"""Which matrices are adapted and how strongly (LoRA, Hu et al. 2021, arXiv:2106.09685); without torch."""

from dataclasses import dataclass

from model.config import ModelConfig

TARGETS = ("c_attn", "c_proj", "c_fc", "c_gate")


@dataclass(frozen=True)
class LoraConfig:
    """What to adapt and how strongly.

    Attributes:
        rank: R, columns of B and rows of A.
        alpha: the correction is scaled by alpha/rank.
        dropout: on the input of the correction.
        targets: last names of the linear layers to adapt: c_attn, c_proj (both of a block), c_fc, c_gate.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank is {self.rank}: use 1 or more")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"lora.dropout is {self.dropout}: use at least 0 and less than 1")
        unknown = sorted(set(self.targets) - set(TARGETS))
        if unknown or not self.targets:
            raise ValueError(f"lora.targets {unknown or '()'} can't be adapted: choose from {', '.join(TARGETS)}")


def adapter_count(model: ModelConfig, config: LoraConfig) -> int:
    """Parameters of the adapters that `add_lora` would make."""
    width, hidden = model.n_embd, model.hidden_size
    queries_keys_values = width + 2 * model.kv_heads * model.head_size
    sides = {  # inputs and outputs together, of all matrices of a block with this name
        "c_attn": width + queries_keys_values,
        "c_proj": 2 * width + (hidden + width),
        "c_fc": width + hidden,
        "c_gate": width + hidden if model.mlp == "swiglu" else 0,
    }
    return config.rank * model.n_layer * sum(sides[target] for target in set(config.targets))
