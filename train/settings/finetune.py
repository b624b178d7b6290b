"""Whether a fine-tuning's configuration fits the model that it starts from."""

from dataclasses import asdict

from common.errors import UserError
from model.config import ModelConfig
from model.lora_config import missing_targets
from train.settings.sections import LoraSection, ModelSection

ADJUSTABLE = ("dropout", "block_size", "scalar_head")  # the options of a trained model that another training may change


def fit_to_base(model: ModelSection, base: ModelConfig) -> None:
    """Refuse a model that the base's weights don't fill, and targets it lacks.

    Raises UserError naming the first option that differs.
    """
    wanted, there = asdict(model.architecture()), asdict(base)
    for name, value in there.items():
        if wanted[name] != value and name not in ADJUSTABLE:
            raise UserError(f"model.{name} is {wanted[name]}, but the base has {value}: leave section model out")
    if model.block_size > base.block_size and base.position == "learned":
        raise UserError(
            f"model.block_size is {model.block_size}, but the base learned {base.block_size} positions: use no more"
        )


def check_targets(lora: LoraSection, base: ModelConfig) -> None:
    """Raises UserError where a target is named that the base does not have."""
    for target in missing_targets(base, lora.targets or ()):
        raise UserError(f"lora.targets has {target}, but the base's MLP is {base.mlp}, which has no gate: leave it out")
