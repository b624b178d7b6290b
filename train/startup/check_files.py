"""Whether the files that a run starts from hold the model that it trains."""

from pathlib import Path

import torch

from model.gpt import GPT
from model.lora import add_lora
from train.checkpoints.reader import check_training_state
from train.optimization.optimizer import declared_state
from train.settings.sections import Config
from train.startup.request import Request


def check_files(request: Request, config: Config, checkpoint: Path | None) -> None:
    """Compare what the run starts from with the model that is to be trained, by the files' headers. One rank calls.

    Raises UserError where it is another's, before anything of the run is touched.
    """
    adapters = request.weights.adapters
    request.weights.check_files(resumed=checkpoint is not None)
    if checkpoint is not None:
        with torch.device("meta"):
            model = GPT(config.model.architecture())
        if adapters is not None:
            add_lora(model, adapters, config.run.seed)
        check_training_state(checkpoint, model, declared_state(config.optim))
