"""The third phase of a start: the run's folder, its configuration, and where it comes from."""

from typing import Any

import torch

from common.errors import UserError
from common.os_errors import refusal
from common.publish import LEFT_SECONDS, sweep_temporaries, write_whole
from model.ranks import agreed
from train.checkpoints.retention import sweep_leftovers
from train.run.provenance import record_start
from train.run.storage import Patience
from train.run.wandb_mirror import MIRROR_FILE
from train.settings.command_line import to_yaml
from train.startup.open_run import OpenRun
from train.startup.plan_start import StartPlan
from train.startup.request import Request


def prepare_folder(run: OpenRun, plan: StartPlan) -> None:
    """Make the run's folder and record what is about to be run. All ranks call, the first one writes.

    Raises UserError on all ranks where that can't be written, in several tries where the file system fails for a
    moment: no job is requeued for an error that would be met again.
    """
    agreed(run.ranks, lambda: _prepare(run.request, plan))
    run.stop.ctrl_c.drop = plan.state.write_dropped


def _prepare(request: Request, plan: StartPlan) -> None:
    patience, folder = Patience(), request.folder
    while True:
        try:
            write_start(request, plan)
            break
        except OSError as error:
            if not patience.waited(error):
                raise UserError(refusal("written", error, error.filename or folder.path)) from None
    plan.state.write("running", "starting", plan.progress)


def write_start(request: Request, plan: StartPlan) -> None:
    """Write the files that a start leaves before its first step. Raises OSError."""
    folder, config, checkpoint = request.folder, plan.config, plan.checkpoint
    folder.checkpoints.mkdir(parents=True, exist_ok=True)
    sweep_leftovers(folder.checkpoints)
    sweep_temporaries(folder.path, folder.published_names())
    sweep_temporaries(folder.path, [MIRROR_FILE], older_than_seconds=LEFT_SECONDS)  # train/sync_wandb.py's too
    request.weights.keep(folder.checkpoints, config.model.architecture())
    write_whole(folder.config, to_yaml(config))
    facts: dict[str, Any] = {"resumed_from": str(checkpoint.resolve()) if checkpoint else None}
    facts |= request.weights.recorded()
    record_start(folder.provenance, plan.machines, torch.version.cuda, facts, with_diff=config.run.record_diff)
