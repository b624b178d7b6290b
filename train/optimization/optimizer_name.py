"""By which name checkpoints know the optimizer that a configuration asks for; without torch."""

from common.checkpoint_manifest import OPTIMIZER_OF_FORMAT_1
from train.settings.sections import OptimConfig


def optimizer_name(config: OptimConfig) -> str:
    """The only optimizer there is today."""
    return OPTIMIZER_OF_FORMAT_1
