"""The last phase before training: disk space for future checkpoints, and the state of the one that is resumed."""

from model.ranks import agreed
from train.checkpoints.disk_space import check_space
from train.checkpoints.ownership import checkpoint_bytes
from train.checkpoints.reader import load_loss_scale, load_on_all_ranks
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
    load_on_all_ranks(trainer.ranks, plan.checkpoint, trainer.model, trainer.optimizer, trainer.keeper.writer.average)
    load_loss_scale(trainer.stepper.scaler, plan.manifest, trainer.ranks.world_size)


def _require_space(trainer: Trainer, plan: StartPlan) -> None:
    """Raises UserError where the disk has no room for future checkpoints. One rank calls."""
    check_space(
        trainer.folder.checkpoints,
        plan.config.checkpoint,
        first_step=plan.progress.step,
        max_steps=plan.config.run.max_steps,
        sizes=checkpoint_bytes(trainer.model, trainer.optimizer, trainer.keeper.writer.average),
        more=plan.config.checkpoint.keep_last + 1 if plan.config.run.on_spike == "rollback" else 0,
    )
