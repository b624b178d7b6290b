"""The last phase before training: disk space for future checkpoints, and the state of the one that is resumed."""

from pathlib import Path

from common.errors import UserError
from model.ranks import agreed
from train.checkpoints.disk_space import check_space
from train.checkpoints.ownership import checkpoint_bytes
from train.checkpoints.reader import load_loss_scale, load_training_state
from train.startup.plan_start import StartPlan
from train.trainer import Trainer


def restore(trainer: Trainer, plan: StartPlan) -> None:
    """Fill weights, optimizer and loss scale from a checkpoint, if there is one. All ranks call.

    Raises UserError on all ranks where the disk has no room for the run's checkpoints, or the state doesn't fit.
    """
    if plan.progress.step < plan.config.run.max_steps:
        agreed(trainer.ranks, lambda: _require_space(trainer, plan))
    if plan.checkpoint is None or plan.manifest is None:
        return
    _load(trainer, plan.checkpoint)
    load_loss_scale(trainer.stepper.scaler, plan.manifest, trainer.ranks.world_size)


def _load(trainer: Trainer, checkpoint: Path) -> None:
    """Each rank reads what it keeps. Raises UserError on all ranks where the state of one doesn't fit."""
    problem = None
    try:
        load_training_state(checkpoint, trainer.model, trainer.optimizer)
    except UserError as error:
        problem = str(error)
    problems = [other for other in trainer.ranks.gather(problem) if other is not None]
    if problems:
        raise UserError(problems[0])


def _require_space(trainer: Trainer, plan: StartPlan) -> None:
    """Raises UserError where the disk has no room for future checkpoints. One rank calls."""
    check_space(
        trainer.folder.checkpoints,
        plan.config.checkpoint,
        first_step=plan.progress.step,
        max_steps=plan.config.run.max_steps,
        sizes=checkpoint_bytes(trainer.model, trainer.optimizer),
        more=plan.config.checkpoint.keep_last + 1 if plan.config.run.on_spike == "rollback" else 0,
    )
