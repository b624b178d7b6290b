"""Builds the saver of the run's checkpoints, and what each records beside its tensors."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from model.gpt import GPT
from train.checkpoints.saver import CheckpointKeeper
from train.checkpoints.writer import CheckpointWriter
from train.optimization.weight_average import build_weight_average
from train.run.recorder import Recorder
from train.settings.command_line import as_dict
from train.startup.course import warm_up_facts
from train.startup.fit_to_data import mix_facts
from train.startup.open_run import OpenRun
from train.startup.plan_start import StartPlan
from train.startup.position import Reading


def build_keeper(
    run: OpenRun,
    plan: StartPlan,
    facts: dict[str, Any],
    measured: Callable[[], dict[str, Any]],
    model: GPT,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    recorder: Recorder,
) -> CheckpointKeeper:
    """Args: facts: what every checkpoint records. measured: figures of evaluations, for the next one."""
    folder, half_life = run.request.folder.checkpoints, plan.config.optim.ema_half_life_tokens
    average = None
    if half_life is not None:
        average = build_weight_average(model, optimizer, half_life, run.ranks, plan.progress.tokens)
    return CheckpointKeeper(
        folder,
        CheckpointWriter(folder, run.ranks, model, optimizer, run.lock.still_mine, recorder.sync, average=average),
        plan.config.checkpoint,
        facts,
        measured,
        recorder,
        resumed_from=plan.checkpoint,
        scaler=scaler,
        deletes=run.ranks.is_first,
        suspected=plan.spikes.suspected,
        patience=run.margin.seconds,
    )


def manifest_facts(run: OpenRun, plan: StartPlan) -> dict[str, Any]:
    """Model, tokenizer, data, rewards, configuration, and what the position and the warm-up count."""
    config, tokens = plan.config, run.request.tokens
    return {
        "model": asdict(config.model.architecture()),
        "tokenizer": tokens.tokenizer_spec,
        "data_identity": tokens.identity,
        "config": as_dict(config),
        **warm_up_facts(plan.course.course),
        **Reading.of(config, tokens.identity).facts(),
        **mix_facts(tokens, plan.mix_start),
        **({"rewards": run.request.rewards} if run.request.rewards else {}),
        "world_size": run.ranks.world_size,
    }
