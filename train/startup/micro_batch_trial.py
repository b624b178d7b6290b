"""Before DDP wraps the model: does a micro-batch that was chosen by an estimate fit into the GPU's memory?

Forward and backward of one micro-batch, without a collective, so that a rank that runs out of memory leaves no other
waiting; room for what comes later is taken meanwhile. What does not fit is made smaller on all ranks. The weights stay
as they are.
"""

from dataclasses import replace

import torch

from common.errors import UserError
from common.memory_errors import is_out_of_memory, what_was_asked
from common.publish import write_whole
from model.gpt import GPT
from model.precision import autocast
from model.ranks import Ranks, agreed
from train.batches.loader import MicroBatch
from train.batches.plan import largest_micro_batch, plan_batches
from train.estimates.run_memory import average_bytes, communication_bytes, memory_advice, optimizer_bytes
from train.objectives.build import build_objective
from train.settings.command_line import to_yaml
from train.startup.open_run import OpenRun
from train.startup.plan_start import StartPlan
from train.startup.recording import Recording


def settle_micro_batch(run: OpenRun, plan: StartPlan, recording: Recording, model: GPT) -> StartPlan:
    """The plan, with a smaller micro-batch where its own runs out of memory in a trial. All ranks call.

    Raises UserError on all ranks where not even one sequence fits.
    """
    ranks, chosen = run.ranks, plan
    while (problem := _problem(plan, ranks, model)) is not None:
        smaller = _smaller(run, plan, ranks, model, problem)
        recording.recorder.log(
            f"micro_batch {smaller.batch.micro_batch}, recompute {smaller.config.recompute.mode}: "
            f"{plan.batch.micro_batch} ran out of memory in a trial ({problem})"
        )
        plan = smaller
        if plan.config.run.compile:
            torch._dynamo.reset()  # else the blocks would be compiled again for batches of any size
    if plan is not chosen:
        _record(run, plan, recording)
    return plan


def _problem(plan: StartPlan, ranks: Ranks, model: GPT) -> str | None:
    """What a rank met that ran out of memory, in a few words on all ranks; None where all had enough."""
    mine = _try(plan, ranks, model)
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()
    problems = ranks.gather(mine)
    return next((f"rank {rank}: {problem}" for rank, problem in enumerate(problems) if problem is not None), None)


def _try(plan: StartPlan, ranks: Ranks, model: GPT) -> str | None:
    """What this rank met; None where it had enough memory."""
    config = plan.config
    # what is not there yet: moments, averaged weights, DDP's buckets beside the gradients of a first backward
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    later = (
        optimizer_bytes(config, ranks.world_size)
        + communication_bytes(config, ranks.world_size)
        + average_bytes(config, ranks.world_size)
        + (trained if ranks.world_size > 1 else 0)
    )
    try:
        room = torch.empty(later, dtype=torch.uint8, device=ranks.device)
        shape = (plan.batch.micro_batch, config.model.block_size)
        tokens = torch.zeros(shape, dtype=torch.int64, device=ranks.device)  # (M, T)
        batch = MicroBatch(tokens, tokens, tokens if config.data.masks_documents else None)
        scale = torch.ones((), device=ranks.device)
        with autocast(plan.dtype, ranks.device):
            objective = build_objective(config.objective.kind, config.optim.z_loss, (), config.of_answers)
            loss, _ = objective.loss(model, batch, scale)  # ()
        loss.backward(scale)
        del room
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return what_was_asked(error) or type(error).__name__
    finally:
        model.zero_grad(set_to_none=True)
    return None


def _smaller(run: OpenRun, plan: StartPlan, ranks: Ranks, model: GPT, problem: str) -> StartPlan:
    """The next smaller micro-batch that divides the step; below one sequence, recomputed blocks where that is open."""
    config, size = plan.config, plan.batch.micro_batch
    if size > config.unit_sequences:
        tokens, length = config.batch.stages.common_size, config.model.block_size
        size = largest_micro_batch(tokens, length, ranks.world_size, size - 1, config.unit_sequences)
    elif run.request.config.recompute.mode == "auto" and config.recompute.mode != "full":
        config = replace(config, recompute=replace(config.recompute, mode="full"))
        model.recompute_every = 1
    else:
        raise UserError(
            f"not even a micro-batch of one sequence of {config.model.block_size} tokens fits into the memory "
            f"({problem}): {memory_advice(config, plan.batch, ranks.device.type)}"
        )
    config = replace(config, batch=replace(config.batch, micro_batch=size))
    batches = plan_batches(config.batch.stages, config.model.block_size, size, ranks.world_size)
    return replace(plan, config=config, batches=batches)


def _record(run: OpenRun, plan: StartPlan, recording: Recording) -> None:
    """Record the choice for later starts, and for the advice of a failure."""
    folder, config = run.request.folder, plan.config
    agreed(run.ranks, lambda: write_whole(folder.config, to_yaml(config)))
    recording.reporter.memory_advice = memory_advice(config, plan.batch, run.ranks.device.type)
