"""What a run logs at its start: what it is about to do, and with what."""

import os
from collections.abc import Mapping
from typing import Any

import torch

from common.curves import VALIDATION
from common.measured import describe_validation, measured_alike, validation_of
from common.progress import format_bytes, format_count, format_duration
from common.run_folder import RunFolder
from data_prep.token_sets.packing import PackedSequences
from data_prep.token_sets.sequences import JoinedSequences
from data_prep.token_sets.token_set import TokenSet
from model.device_table import gpu_of_driver
from model.rank_environment import given_gpus
from model.ranks import Ranks
from train.batches.pairs import PairSequences
from train.batches.plan import BatchPlan
from train.batches.prompts import Prompts
from train.batches.training_sequences import MUCH_PADDING, training_sequences
from train.estimates.run_memory import average_bytes, estimated_memory, shares_of
from train.optimization.schedule import Course
from train.progress import Progress
from train.settings.sections import Config


def describe_run(folder: RunFolder, config: Config, machines: list[dict[str, Any]], reasons: list[str]) -> list[str]:
    """Where it writes, what every rank runs on, and the reason for each `auto` choice."""
    ranks = [
        f"rank {m['rank']} on {m['host']}: {m['device']} ({m.get('gpu', m['cpu'])}), "
        f"{m['threads']} thread{'' if m['threads'] == 1 else 's'} on {m['cores_allowed']} cores"
        for m in machines
    ]
    return [f"run {folder.path}, {config.run.max_steps:,} steps", *ranks, *reasons]


def describe_unused_gpus(ranks: Ranks) -> list[str]:
    """A warning where one process leaves other GPUs of its machine idle, or a CPU those of its job."""
    given, by = given_gpus(os.environ)
    if ranks.device.type == "cpu" and given:
        return [f"WARNING: on the CPU, as run.device says, though Slurm has given this job GPUs ({by})"]
    gpus = torch.cuda.device_count() if ranks.device.type == "cuda" and ranks.world_size == 1 else 1
    if gpus == 1:
        return []
    return [
        f"WARNING: one process uses 1 of the {gpus} GPUs that PyTorch sees here: train/launch.py --standalone "
        "--nproc_per_node=auto train/pretrain.py … starts one for each"
    ]


def describe_course(course: Course) -> list[str]:
    """The learning rate's course in steps."""
    first, last = course.warm_up.start, course.warm_up.end
    parts = [f"warm-up to {course.peak:g} from step {first:,} to {last:,}" if last > first else f"{course.peak:g}"]
    if course.kind != "constant":
        parts.append(f"{course.kind} decay to {course.final_lr_fraction:.4g} of it after step {course.decay_start:,}")
    lines = [f"learning rate: {', '.join(parts)}, up to step {course.end:,}"]
    if last > course.end:
        lines.append(f"schedule.warmup takes {course.warm_up.steps:,} steps: this run never reaches optim.lr")
    return lines


def planned_facts(config: Config, batch: BatchPlan, ranks: Ranks) -> dict[str, float]:
    """What train/plan.py would plan for this start, for its record: memory, and on a known card speed and hours."""
    memory = estimated_memory(config, batch, ranks.device.type).total / 2**30
    facts = {"planned_memory_gib": memory}
    if ranks.device.type != "cuda":
        return facts
    properties = torch.cuda.get_device_properties(ranks.device)
    card = gpu_of_driver(properties.name, properties.total_memory / 2**30)
    if card is None:
        return facts
    from train.estimates.machines import machine_of
    from train.estimates.run_plan import make_plan

    plan = make_plan(config, machine_of(card, ranks.world_size // ranks.local_world_size, ranks.local_world_size))
    if plan.tokens_per_second is not None and plan.durations is not None:
        facts["planned_tokens_per_second"] = plan.tokens_per_second
        facts["planned_hours"] = plan.durations.total / 3600
    return facts


def describe_planned(config: Config, batch: BatchPlan, ranks: Ranks) -> list[str]:
    """Speed and hours, where the card is known."""
    facts = planned_facts(config, batch, ranks)
    if "planned_hours" not in facts:
        return []
    speed, seconds = facts["planned_tokens_per_second"], 3600 * facts["planned_hours"]
    return [f"expected: {format_count(speed)} tokens/s, {format_duration(seconds)} for all steps (docs/planning.md)"]


def describe_optimizer(config: Config, world_size: int) -> list[str]:
    """Which rates its parts have, and how it is divided among ranks: nothing of AdamW that every rank has whole; and
    the average of the weights.
    """
    optim, lines = config.optim, []
    if optim.kind == "muon":
        rate = optim.lr if optim.muon_lr is None else optim.muon_lr
        lines.append(
            f"optimizer: muon for the blocks' matrices (peak rate {rate:g}), adamw for the rest ({optim.lr:g})"
        )
    if optim.is_sharded(world_size):
        shares = shares_of(config, world_size)
        state, work = max(share.state for share in shares), [share.flops for share in shares]
        lines.append(f"optimizer: {format_bytes(state)} of its state on a rank at most")
        if any(work):
            uneven = max(work) * world_size / sum(work)
            lines[-1] += f", {format_count(max(work))}FLOPs a step of Newton-Schulz ({uneven:.2f} times the mean)"
    if optim.ema_half_life_tokens is not None:
        steps = optim.ema_half_life_tokens / config.batch.tokens_per_step
        lines.append(
            f"average of the weights: half-life {optim.ema_half_life_tokens:,} tokens ({steps:,.4g} steps), "
            f"{format_bytes(average_bytes(config, world_size))} on a rank at most"
        )
    return lines


def describe_data(config: Config, tokens: TokenSet, begin: Progress) -> list[str]:
    """How much text there is and how often the run reads it, earlier reading of these data included."""
    length = config.model.block_size
    if config.objective.compares:
        pairs = PairSequences(tokens, "train", length, whole=config.objective.scores)
        return _describe_pairs(config, pairs, tokens, begin)
    if config.objective.rolls_out:
        return _describe_prompts(config, Prompts(tokens, "train", length - config.rollout.max_tokens), tokens, begin)
    found = training_sequences(
        tokens,
        length,
        stride=config.data.stride,
        packed=config.data.is_packed,
        mask_documents=config.data.masks_documents,
    )
    windows = found.count
    end = config.batch.stages.tokens_after(max(0, config.run.max_steps - begin.step), begin.tokens)
    sequences = begin.sequences + (end - begin.tokens) // length
    times = f"{sequences / windows:.2f} epochs"
    if config.data.stride is not None:
        times += f" of {windows:,} sequences, one at every {config.data.stride} tokens"
    if isinstance(found, JoinedSequences):
        parts = [
            line
            for part in found.parts.values()
            if isinstance(part, PackedSequences)
            for line in describe_packing(part)
        ]
        return [f"data: a mix of {', '.join(found.parts)}; the run reads {sequences * length:,} tokens", *parts]
    lines = [
        f"data: {tokens.folder}, {len(tokens.split('train')):,} training tokens; the run reads "
        f"{sequences * length:,}, {times}",
    ]
    return lines + (describe_packing(found) if isinstance(found, PackedSequences) else [])


def _describe_prompts(config: Config, prompts: Prompts, tokens: TokenSet, begin: Progress) -> list[str]:
    samples = config.rollout.samples
    asked = begin.sequences // samples + max(0, config.run.max_steps - begin.step) * config.rollout.prompts_per_step
    line = (
        f"data: {tokens.folder}, {prompts.count:,} prompts; the run asks {asked:,}, {asked / prompts.count:.2f} epochs"
    )
    if prompts.left_out:
        line += f"; {prompts.left_out:,} that leave no room for an answer left out"
    return [line]


def _describe_pairs(config: Config, found: PairSequences, tokens: TokenSet, begin: Progress) -> list[str]:
    seen = begin.sequences // 2 + max(0, config.run.max_steps - begin.step) * config.batch.pairs_per_step
    line = f"data: {tokens.folder}, {found.pairs:,} pairs; the run sees {seen:,}, {seen / found.pairs:.2f} epochs"
    if found.left_out:
        line += f"; {found.left_out:,} with a side longer than a sequence left out"
    return [line]


def describe_packing(packed: PackedSequences) -> list[str]:
    """What became of the documents: tokens to learn from and padding make up all sequences."""
    facts, share = packed.facts, packed.padding_share
    padding = f"{facts.padding:,} of padding ({share:.2%})"
    if packed.has_marks:  # not all of their tokens are learned from
        line = f"packing: {facts.pieces:,} conversations in {facts.sequences:,} sequences; {facts.targets:,} tokens"
        line += f" and {padding}"
    else:
        line = (
            f"packing: {facts.pieces:,} pieces of documents in {facts.sequences:,} sequences, {facts.cut_documents:,} "
            f"documents longer than one cut; {facts.targets:,} targets and {padding}"
        )
    if facts.left_out:
        line += f"; {facts.left_out:,} conversations longer than one left out"
    return [line if share <= MUCH_PADDING else f"WARNING: {line}: a smaller model.block_size wastes less"]


def describe_measure(facts: Mapping[str, Any], before: Mapping[str, Any] | None) -> list[str]:
    """What validation losses, if any, are measured on, and whether those so far were measured on something else.

    Args:
        facts: what the run's checkpoints will record. before: what the checkpoint records that is resumed.
    """
    now = validation_of(facts)
    if not now.get("val_tokens"):
        return []  # the objective has another measure
    lines = [f"validation on {describe_validation(now)}"]
    earlier = validation_of(before) if before and before.get("val_loss") is not None else None
    if earlier is not None and not measured_alike(VALIDATION, earlier, now):
        was = describe_validation(earlier) or "something else"
        lines.append(
            f"validation losses up to the checkpoint were measured on {was}: they don't compare with later ones"
        )
    return lines


def describe_in_place(config: Config, in_place: Mapping[str, str]) -> list[str]:
    """A warning for each host that reads the data where they are: why they are not staged there."""
    return [
        f"WARNING: data are read from {config.data.path}, not staged, on {host}: {why}"
        for host, why in in_place.items()
    ]
