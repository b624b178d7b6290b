"""Put a trainer together from an opened run: model, optimizer, step, batches, evaluations, checkpoints."""

from typing import Any

import torch

from model.counts import flops_per_token, peak_flops
from train.evaluations.evaluation import Tools
from train.layer_statistics.layer_statistics import build_layer_statistics
from train.objectives.build import build_objective, open_rollouts
from train.optimization.ddp import Parallel
from train.optimization.optimizer import build_optimizer
from train.optimization.step import Stepper, UpdateWatcher
from train.startup.announce import describe_measure, planned_facts
from train.startup.build_keeper import build_keeper, manifest_facts
from train.startup.build_model import build_model, build_reference
from train.startup.open_pairs import open_pairs
from train.startup.open_run import OpenRun
from train.startup.plan_start import StartPlan
from train.startup.recording import Recording
from train.trainer import Trainer


def assemble(run: OpenRun, plan: StartPlan, recording: Recording) -> Trainer:
    """All ranks call. Raises UserError where an evaluation can't be done with this model."""
    # Model, optimizer and step
    model, plan = build_model(run, plan, recording)
    request, ranks, config, recorder = run.request, run.ranks, plan.config, recording.recorder
    model.ln_f.register_forward_hook(lambda *_: recording.acts.get_on())  # a long evaluation is no hang
    optimizer = build_optimizer(model, config.optim, ranks)
    statistics = None
    if every := config.log.statistics_every:
        statistics = build_layer_statistics(every, plan.dtype, request.tokens, model, ranks, recorder)
    stepper = _build_stepper(run, plan, recording, Parallel(model, ranks), optimizer, statistics)

    # Batches, and what happens between steps
    held_back = sampler = None
    if config.objective.compares:
        loader, held_back = open_pairs(run, plan, recording, stepper.objective, model)
    elif config.objective.rolls_out:
        reference = build_reference(run, plan) if config.needs_reference else None
        pieces = (config, request.tokens, model, reference, ranks, plan.batch, plan.dtype)
        loader, sampler = open_rollouts(stepper.objective, *pieces, on_act=recording.acts.start)
    else:
        loader = plan.open_sequences(request.tokens, ranks)
    untrained = request.weights.untrained and plan.checkpoint is None
    tools = Tools(model, request.tokens, ranks, plan.batch, plan.dtype, recorder, untrained, held_back, sampler)
    for evaluation in request.evaluations:
        evaluation.build(tools)

    # Checkpoints, which record what evaluations have measured
    def measured() -> dict[str, Any]:
        found = {key: value for evaluation in request.evaluations for key, value in evaluation.facts().items()}
        return found | plan.spikes.facts()

    facts = manifest_facts(run, plan) | request.weights.facts(request.folder.checkpoints)
    for line in [*describe_measure(facts | measured(), plan.manifest), *request.weights.describe(model)]:
        recorder.log(line)
    in_place = {"data_in_place": run.in_place} if run.in_place else {}
    gpu = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else None
    peak = None if gpu is None else peak_flops(gpu)
    return Trainer(
        config=config,
        course=plan.course.course,
        ranks=ranks,
        folder=request.folder,
        model=model,
        optimizer=optimizer,
        stepper=stepper,
        loader=loader,
        evaluations=request.evaluations,
        keeper=build_keeper(run, plan, facts, measured, model, optimizer, stepper.scaler, recorder),
        recorder=recorder,
        stop=run.stop,
        state=plan.state,
        acts=recording.acts,
        slow_ranks=recording.slow_ranks,
        layer_statistics=statistics,
        spikes=plan.spikes,
        margin=run.margin,
        flops_per_token=flops_per_token(config.model.architecture(), adapters=config.adapter_count()),
        peak_flops=peak * ranks.world_size if peak else None,
        start_facts=planned_facts(config, plan.batch, ranks) | in_place,
    )


def _build_stepper(
    run: OpenRun,
    plan: StartPlan,
    recording: Recording,
    parallel: Parallel,
    optimizer: torch.optim.Optimizer,
    watcher: UpdateWatcher | None,
) -> Stepper:
    config = plan.config
    sources = [source.name for source in config.data.mix]
    return Stepper(
        parallel,
        optimizer,
        run.ranks,
        plan.batch,
        build_objective(config.objective.kind, config.optim.z_loss, sources, config.of_answers),
        dtype=plan.dtype,
        grad_clip=config.optim.grad_clip,
        seed=config.run.seed,
        skip_nonfinite=config.run.on_nonfinite == "skip",
        on_act=recording.acts.start,
        watcher=watcher,
    )
