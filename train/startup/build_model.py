"""The model with its first weights, on this rank's device."""

import torch

from model.counts import check_parameters
from model.gpt import GPT
from train.optimization.compilation import compile_blocks
from train.settings.sections import Config
from train.startup.auto import recompute_every, set_determinism
from train.startup.open_run import OpenRun


def build_model(run: OpenRun, config: Config, *, resumed: bool) -> GPT:
    """All ranks call. Args: config: resolved. resumed: a checkpoint will fill what is trained."""
    set_determinism(config.run.deterministic, run.ranks.device)
    with torch.device("meta"):
        model = GPT(config.model.architecture())
    model.to_empty(device=run.ranks.device)
    run.request.weights.fill(model, run.request.folder.checkpoints, config.run.seed, resumed=resumed)
    check_parameters(model, adapters=config.adapter_count())
    model.recompute_every = recompute_every(config)
    model.recompute_norms = config.recompute.norms
    if config.run.compile:
        compile_blocks(model)
    return model
