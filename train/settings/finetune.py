"""The configuration of a fine-tuning: a run's, and what is trained of the model it begins with."""

from dataclasses import asdict, dataclass, field

from common.errors import UserError
from model.config import ModelConfig
from model.lora import TARGETS, LoraConfig, adapter_count
from train.settings.command_line import Config, ModelSection

ADJUSTABLE = ("dropout", "block_size")  # what of a trained model's configuration another training may change


@dataclass(frozen=True)
class LoraSection:
    """Adapters (LoRA, Hu et al. 2021, arXiv:2106.09685) beside the base's frozen matrices.

    Args:
        rank: columns and rows of an adapter's two matrices; 0 trains all of the base's weights instead, and the rest of
            this section counts for nothing.
        alpha: the adapters' correction is scaled by alpha/rank.
        dropout: on the input of the adapters.
        targets: which matrices get an adapter: c_attn (queries, keys, values), c_proj (out of attention and MLP), c_fc,
            c_gate (SwiGLU); null: all that the model has.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: list[str] | None = None

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"lora.rank is {self.rank}: give 1 or more, or 0 to train all weights")
        if self.adapters() is not None and self.alpha <= 0:
            raise ValueError(f"lora.alpha is {self.alpha}: give a positive number")

    def adapters(self) -> LoraConfig | None:
        """None where all weights are trained. Raises ValueError for an impossible setting."""
        if self.rank == 0:
            return None
        targets = TARGETS if self.targets is None else tuple(self.targets)
        return LoraConfig(rank=self.rank, alpha=self.alpha, dropout=self.dropout, targets=targets)


@dataclass(frozen=True)
class FinetuneConfig(Config):
    """Everything a fine-tuning is made from. Its model is the base's."""

    lora: LoraSection = field(default_factory=LoraSection)

    def adapter_count(self) -> int | None:
        """Parameters of the adapters; None where all weights are trained."""
        adapters = self.lora.adapters()
        return None if adapters is None else adapter_count(self.model.architecture(), adapters)


def fit_to_base(model: ModelSection, base: ModelConfig) -> None:
    """Refuse a model that the base's weights don't fill, and targets it lacks.

    Raises UserError naming the first option that differs.
    """
    wanted, there = asdict(model.architecture()), asdict(base)
    for name, value in there.items():
        if wanted[name] != value and name not in ADJUSTABLE:
            raise UserError(f"model.{name} is {wanted[name]}, the base has {value}: leave section model out")
    if model.block_size > base.block_size and base.position == "learned":
        raise UserError(
            f"model.block_size is {model.block_size}, the base learned {base.block_size} positions: give no more"
        )


def check_targets(lora: LoraSection, base: ModelConfig) -> None:
    """Raises UserError where a target is named that the base does not have."""
    if lora.targets is not None and "c_gate" in lora.targets and base.mlp != "swiglu":
        raise UserError(f"lora.targets has c_gate, but the base's MLP is {base.mlp}, which has no gate: leave it out")
