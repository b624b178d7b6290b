"""What runs of older versions, whose configuration lacks later options, were trained with."""

from dataclasses import asdict
from typing import Any

from eval.reporting.key_figures import flatten
from train.settings.sections import Config

BEFORE = {"optim.shard": False}  # what was done before an option whose default is auto


def option_defaults() -> dict[str, Any]:
    """By option: what its absence from a run's configuration means."""
    found = flatten(asdict(Config())) | BEFORE
    return {name: value for name, value in found.items() if name != "run.root"}
