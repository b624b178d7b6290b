"""The choices that an earlier start of the run made for `auto`, which hold."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from train.settings.sections import Config

CHOSEN = (
    ("run", "dtype"),
    ("run", "compile"),
    ("optim", "shard"),  # which `train.startup.auto` decides anew
    ("recompute", "mode"),
    ("batch", "micro_batch"),
)


def reuse(config: Config, recorded: Mapping[str, Any] | None, *, world_size: int) -> Config:
    """Fill `auto` fields with what the run's earlier start chose. Args: recorded: its resolved configuration."""
    for section, key in CHOSEN if recorded is not None else ():
        part, earlier = getattr(config, section), (recorded or {}).get(section, {}).get(key, "auto")
        if getattr(part, key) != "auto" or earlier == "auto":
            continue
        sequences = config.batch.stages.common_size // config.model.block_size
        if key == "micro_batch" and sequences % (earlier * world_size):
            continue  # other ranks than before: choose again
        config = replace(config, **{section: replace(part, **{key: earlier})})
    return config
