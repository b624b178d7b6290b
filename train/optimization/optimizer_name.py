"""By which name checkpoints know the optimizer that a configuration asks for; without torch."""

from train.settings.sections import OptimConfig


def optimizer_name(config: OptimConfig) -> str:
    """The kind's own name: adamw (which format 1 does not name) or muon."""
    return config.kind
