"""Put a trainer together from an opened run: model, optimizer, step, loader, evaluations, checkpoints."""

from typing import Any, cast

import torch

from data_prep.tokenization.tokenizer import load_tokenizer
from model.counts import flops_per_token, peak_flops
from model.precision import Dtype
from train.batches.loader import open_loader
from train.checkpoints.saver import CheckpointKeeper
from train.checkpoints.writer import CheckpointWriter
from train.evaluations.evaluation import Tools
from train.objectives.language_modelling import LanguageModelling
from train.optimization.ddp import Parallel
from train.optimization.optimizer import build_optimizer
from train.optimization.step import Stepper
from train.startup.announce import describe_measure
from train.startup.build_model import build_model
from train.startup.manifest_facts import manifest_facts
from train.startup.open_run import OpenRun
from train.startup.plan_start import StartPlan
from train.startup.recording import Recording
from train.trainer import Trainer


def assemble(run: OpenRun, plan: StartPlan, recording: Recording) -> Trainer:
    """All ranks call. Raises UserError where an evaluation can't be done with this model."""
    request, ranks, config, recorder = run.request, run.ranks, plan.config, recording.recorder
    folder, tokens, weights = request.folder, request.tokens, request.weights
    dtype = cast(Dtype, config.run.dtype)  # plan_start has replaced auto

    # Model, optimizer and step
    model = build_model(run, config, resumed=plan.checkpoint is not None)
    optimizer = build_optimizer(model, config.optim)
    stepper = Stepper(
        Parallel(model, ranks),
        optimizer,
        ranks,
        plan.batch,
        LanguageModelling(),
        dtype=dtype,
        grad_clip=config.optim.grad_clip,
        seed=config.run.seed,
    )

    # The batches
    loader = open_loader(
        tokens,
        plan.batch,
        ranks,
        length=config.model.block_size,
        stride=config.data.stride,
        seed=config.run.seed,
        mask_documents=config.data.document_mask,
    )

    # What happens between steps
    untrained = weights.untrained and plan.checkpoint is None
    tokenizer = load_tokenizer(tokens.tokenizer_spec)
    tools = Tools(model, tokens, tokenizer, ranks, plan.batch, dtype, recorder, untrained)
    for evaluation in request.evaluations:
        evaluation.build(tools)

    # Checkpoints, which record what evaluations have measured
    facts = manifest_facts(run, plan) | weights.facts(folder.checkpoints)
    keeper = CheckpointKeeper(
        folder.checkpoints,
        CheckpointWriter(folder.checkpoints, ranks, model, optimizer, run.lock.still_mine, recorder.sync),
        config.checkpoint,
        facts,
        lambda: measured(run),
        recorder,
        resumed_from=plan.checkpoint,
        scaler=stepper.scaler,
        deletes=ranks.is_first,
        patience=run.margin.seconds,
    )
    for line in [*describe_measure(facts | measured(run), plan.manifest), *weights.describe(model)]:
        recorder.say(line)

    peak = peak_flops(torch.cuda.get_device_name(ranks.device)) if ranks.device.type == "cuda" else None
    return Trainer(
        config=config,
        course=plan.course.course,
        ranks=ranks,
        folder=folder,
        model=model,
        optimizer=optimizer,
        stepper=stepper,
        loader=loader,
        evaluations=request.evaluations,
        keeper=keeper,
        recorder=recorder,
        stop=run.stop,
        state=plan.state,
        heartbeat=recording.heartbeat,
        margin=run.margin,
        flops_per_token=flops_per_token(config.model.architecture(), adapters=config.adapter_count()),
        peak_flops=peak * ranks.world_size if peak else None,
        start_facts={"data_in_place": run.in_place} if run.in_place else {},
    )


def measured(run: OpenRun) -> dict[str, Any]:
    """What a checkpoint records of the evaluations: their latest figures, and what these were measured on."""
    return {key: value for evaluation in run.request.evaluations for key, value in evaluation.facts().items()}
