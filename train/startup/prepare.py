"""What a start reads and writes before its first step: what it goes on from, the run's folder, its configuration."""

from pathlib import Path
from typing import Any

import torch

from common.errors import UserError
from common.os_errors import refusal
from common.publish import LEFT_SECONDS, sweep_temporaries, write_whole
from model.gpt import GPT
from model.lora import add_lora
from model.weights import fitting_checkpoint
from train.checkpoints.reader import check_training_state
from train.checkpoints.retention import sweep_leftovers
from train.optimization.optimizer import declared_state
from train.run.provenance import record_start
from train.run.state import RunState
from train.run.storage import Patience
from train.run.wandb_mirror import MIRROR_FILE
from train.settings.command_line import to_yaml
from train.startup.context import RunContext


def check_files(context: RunContext, checkpoint: Path | None) -> None:
    """Compare what the run goes on from with the model that is to be trained, by the files' headers. One rank calls.

    Raises UserError where it is another's, before anything of the run is touched.
    """
    config, base = context.config, context.base
    adapters = None if base is None else base.adapters
    if base is not None and (adapters is not None or checkpoint is None):
        fitting_checkpoint(base.source)
    if checkpoint is not None:
        with torch.device("meta"):
            model = GPT(config.model.architecture())
        if adapters is not None:
            add_lora(model, adapters, config.run.seed)
        check_training_state(checkpoint, model, declared_state(config.optim))


def prepare_folder(
    context: RunContext, machines: list[dict[str, Any]], checkpoint: Path | None, state: RunState
) -> None:
    """Make the run's folder and write down what is about to be run. One rank calls.

    Raises UserError where that can't be written, in several tries where the file system fails for a moment: no job is
    requeued for an error that would be met again.
    """
    patience = Patience()
    while True:
        try:
            write_start(context, machines, checkpoint)
            break
        except OSError as error:
            if not patience.waited(error):
                raise UserError(refusal("written", error, error.filename or context.folder.path)) from None
    state.write("running", "starting", state.start)


def write_start(context: RunContext, machines: list[dict[str, Any]], checkpoint: Path | None) -> None:
    """The files that a start leaves before its first step. Raises OSError."""
    folder, config = context.folder, context.config
    folder.checkpoints.mkdir(parents=True, exist_ok=True)
    sweep_leftovers(folder.checkpoints)
    sweep_temporaries(folder.path, folder.published_names())
    sweep_temporaries(folder.path, [MIRROR_FILE], older_than_seconds=LEFT_SECONDS)  # train/sync_wandb.py's too
    if context.base is not None:
        context.base.keep(folder.checkpoints, config.model.architecture())
    write_whole(folder.config, to_yaml(config))
    facts: dict[str, Any] = {"resumed_from": str(checkpoint.resolve()) if checkpoint else None}
    if context.base is not None:
        facts["base"] = context.base.recorded()
    record_start(folder.provenance, machines, facts, with_diff=config.run.record_diff)
