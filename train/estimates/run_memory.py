"""What a configuration takes in memory on a rank, and the `auto` choices that follow from it; without torch.

A start (`train.startup.auto`) and a plan (`train/plan.py`) ask the same functions.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, cast

from common.environment import whole_number
from common.errors import UserError
from common.progress import format_bytes, format_count
from model.counts import Shape, flops_per_token, matrix_rows, parameter_count, parameter_shapes, trained_shapes
from model.memory import MemoryEstimate, memory_estimate
from model.number_formats import FLOAT32, Dtype
from train.batches.plan import BatchPlan, largest_micro_batch
from train.objectives.rewards import judging_models
from train.optimization.declared_state import ADAMW, OptimizerState, muon_state, newton_schulz_flops
from train.optimization.owners import BUFFER_BYTES, owners_of
from train.settings.sections import Config

MEMORY_SHARE = 0.85  # of what is free; the rest is for the allocator's rounding and what the estimate leaves out
KEPT_SHARE = 0.95  # what an earlier start chose may take, so that it holds where a little less is free than it was then
CPU_MICRO_BATCH = 8  # beyond it a CPU gains no speed
# The variable by which glibc gives what is as large back to the system as soon as it is freed; below so much there are
# no tensors that count
MMAP_THRESHOLD, SMALL_BYTES = "MALLOC_MMAP_THRESHOLD_", 1 << 20


@dataclass(frozen=True)
class Room:
    """What a rank computes on. device_type: torch's name of it. free: bytes it may use, PyTorch being there."""

    device_type: str
    world_size: int
    free: int


@dataclass(frozen=True)
class Share:
    """What a rank has to keep and do where the optimizer is sharded. state: bytes. flops: of Newton-Schulz, a step."""

    state: int
    flops: int


def shapes_to_train(config: Config) -> dict[str, Shape]:
    return trained_shapes(config.model.architecture(), config.adapters())


def state_of_config(config: Config) -> OptimizerState:
    """What the optimizer that a configuration asks for keeps of its model's parameters."""
    return ADAMW if config.optim.kind == "adamw" else muon_state(_muons(config))


def shares_of(config: Config, world_size: int) -> list[Share]:
    """By rank."""
    shapes, declared = shapes_to_train(config), state_of_config(config)
    matrices = _muons(config)
    state, flops = [0] * world_size, [0] * world_size
    for name, rank in owners_of(shapes, declared, world_size).items():
        state[rank] += declared.nbytes({name: shapes[name]})
        if name in matrices:
            flops[rank] += newton_schulz_flops(shapes[name], matrices[name], config.optim.muon_iterations)
    return [Share(*share) for share in zip(state, flops, strict=True)]


def optimizer_bytes(config: Config, world_size: int = 1) -> int:
    """What the optimizer keeps on one rank: of all that is trained, or, where it is sharded, the largest part."""
    if config.optim.is_sharded(world_size):
        return max(share.state for share in shares_of(config, world_size))
    return state_of_config(config).nbytes(shapes_to_train(config))


def average_bytes(config: Config, world_size: int = 1) -> int:
    """What one rank keeps of an average of the weights: the largest part, as `WeightAverage` divides them."""
    if config.optim.ema_half_life_tokens is None:
        return 0
    kept, shapes = [0] * world_size, shapes_to_train(config)
    for name, rank in owners_of(shapes, state_of_config(config), world_size).items():
        kept[rank] += FLOAT32 * math.prod(shapes[name])
    return max(kept)


def communication_bytes(config: Config, world_size: int) -> int:
    """What sends weights to the other ranks: after a sharded update, or where averaged ones are evaluated."""
    exchanged = world_size > 1 and config.optim.ema_half_life_tokens is not None and config.eval.weights == "ema"
    return BUFFER_BYTES if exchanged or config.optim.is_sharded(world_size) else 0


def temporary_bytes(config: Config) -> int:
    """What an update makes and drops: Muon's new momentum, weights and direction of a matrix; AdamW's kernel nothing.

    An AdamW that isn't fused holds three tensors of the largest parameter's size.
    """
    shapes = shapes_to_train(config)
    largest = max(math.prod(shape) for shape in shapes.values()) if not config.optim.fused else 0
    matrix = max((math.prod(shapes[name]) for name in _muons(config)), default=0)
    return max(3 * largest, 6 * matrix) * FLOAT32


def _largest_runs_muon(config: Config, world_size: int) -> bool:
    """Whether the rank whose memory is estimated updates matrices by Muon: sharded, the largest part may be a table."""
    if not _muons(config) or not config.optim.is_sharded(world_size):
        return bool(_muons(config))
    return max(shares_of(config, world_size), key=lambda share: share.state).flops > 0


def _muons(config: Config) -> Mapping[str, Shape]:
    if config.optim.kind != "muon" or config.adapters() is not None:
        return {}
    return matrix_rows(config.model.architecture())


def recompute_every(config: Config) -> int:
    """The model's `recompute_every` for a configuration whose mode is resolved."""
    return {"none": 0, "full": 1, "every": config.recompute.every_blocks}[config.recompute.mode]


def estimate_of(config: Config, micro_batch: int, every: int, world_size: int, device_type: str) -> MemoryEstimate:
    """What a training step takes on one rank.

    Args:
        config: with dtype, compile and shard resolved. micro_batch, every: as in `memory_estimate`.
    """
    state = optimizer_bytes(config, world_size)
    saved_here = device_type == "cpu" and config.checkpoint.asynchronous
    sequences = config.batch.tokens_per_step // config.model.block_size
    saves = config.checkpoint.every_steps, config.checkpoint.weights_every_steps
    adapters = config.adapters()
    threshold = whole_number(MMAP_THRESHOLD, 0, advice="it is glibc's: unset it")
    return memory_estimate(
        config.model.architecture(),
        micro_batch=micro_batch,
        dtype=cast(Dtype, config.run.dtype),
        recompute_every=every,
        recompute_norms=config.recompute.norms,
        stream=config.run.stream_dtype,
        device_type=device_type,
        compiled=config.run.compile is True,
        adapters=config.adapter_count(),
        new_rows=adapters is not None and adapters.new_rows > 0,
        optimizer_bytes=state,
        average_bytes=average_bytes(config, world_size),
        temporary_bytes=temporary_bytes(config),
        communication_bytes=communication_bytes(config, world_size),
        snapshot_bytes=_snapshot_bytes(config, world_size) if saved_here else 0,
        gradients_stay=world_size > 1 or sequences > micro_batch,
        snapshot_stays=any(0 < every < config.run.max_steps for every in saves),
        statistics_ranks=world_size if config.log.statistics_every else 0,
        several_ranks=world_size > 1,
        muon=_largest_runs_muon(config, world_size),
        reference=config.needs_reference and config.objective.rolls_out,
        held_bytes=_judging_bytes(config),
        heap_gaps=not 0 < threshold <= SMALL_BYTES,
    )


def _judging_bytes(config: Config) -> int:
    """What reward models keep on every rank."""
    models = judging_models(config.rollout.reward) if config.objective.rolls_out else []
    return FLOAT32 * sum(math.prod(shape) for model in models for shape in parameter_shapes(model).values())


def _snapshot_bytes(config: Config, world_size: int) -> int:
    """What a save copies on one rank: weights, moments and averaged weights of the largest part."""
    shapes, declared = shapes_to_train(config), state_of_config(config)
    copies = 1 if config.optim.ema_half_life_tokens is None else 2
    copied = [0] * world_size
    for name, rank in owners_of(shapes, declared, world_size).items():
        copied[rank] += copies * FLOAT32 * math.prod(shapes[name]) + declared.nbytes({name: shapes[name]})
    return max(copied)


def estimated_memory(config: Config, plan: BatchPlan, device_type: str) -> MemoryEstimate:
    """What a training step takes on one rank, for a resolved configuration."""
    return estimate_of(config, plan.micro_batch, recompute_every(config), plan.world_size, device_type)


def describe_model(config: Config, plan: BatchPlan, device_type: str) -> list[str]:
    """Size of the model, how the batch is divided, and the memory this takes on a rank."""
    architecture = config.model.architecture()
    flops = flops_per_token(architecture, adapters=config.adapter_count())
    memory = estimated_memory(config, plan, device_type)
    return [
        f"model: {parameter_count(architecture):,} parameters, {architecture.n_layer} layers of width "
        f"{architecture.n_embd}, {format_count(flops)}FLOPs per token",
        *_describe_objective(config),
        f"batch: {config.batch.tokens_per_step:,} tokens a step = {plan.world_size} ranks x {plan.accumulation} "
        f"micro-batches x {plan.micro_batch} sequences x {architecture.block_size} tokens",
        *_describe_stages(config),
        f"estimated memory per rank: {format_bytes(memory.total)}, most in phase {memory.largest_phase!r}",
    ]


def _describe_objective(config: Config) -> list[str]:
    """Nothing of language modelling."""
    if config.objective.kind == "sft":
        return ["objective: sft, the answers of conversations"]
    if config.objective.scores:
        return [f"objective: reward, {config.batch.pairs_per_step:,} pairs a step, a score at each answer's end"]
    if config.objective.compares:
        preference = config.preference
        extra = f", likelihood of the chosen {preference.likelihood:g}" if preference.likelihood else ""
        return [
            f"objective: {config.objective.kind}, {config.batch.pairs_per_step:,} pairs a step, loss "
            f"{preference.loss}, beta {preference.beta:g}{extra}"
        ]
    if not config.objective.rolls_out:
        return []
    rollout = config.rollout
    return [
        f"objective: {config.objective.kind}, {rollout.prompts_per_step:,} prompts a step x {rollout.samples} answers "
        f"of at most {rollout.max_tokens:,} tokens, {rollout.epochs * rollout.minibatches:,} updates, reward "
        f"{', '.join(rollout.reward)}"
    ]


def _describe_stages(config: Config) -> list[str]:
    """Where the batch grows: nothing where it stays the same."""
    stages = config.batch.stages
    parts = [
        f"{size:,} tokens a step from step {stages.steps_to(start) + 1:,}"
        for start, size in zip(stages.starts, stages.sizes, strict=True)
    ]
    return [f"batch warm-up: {', '.join(parts)}"] if len(parts) > 1 else []


def memory_advice(config: Config, plan: BatchPlan, device_type: str) -> str:
    """The options of a resolved configuration that take less memory, in the order in which to try them."""
    length, size = config.model.block_size, plan.micro_batch
    less = []
    if size > config.unit_sequences:
        tokens = config.batch.stages.common_size
        half = largest_micro_batch(tokens, length, plan.world_size, size // 2, config.unit_sequences)
        less.append(f"halve batch.micro_batch ({size}: --batch.micro_batch {half}; the batch stays the same)")
    if config.recompute.mode != "full":
        less.append(f"use --recompute.mode full ({config.recompute.mode} now)")
    activations_are_least = not less
    if config.optim.shard is not True and plan.world_size > 1:
        less.append("use --optim.shard true (each rank keeps a part of the optimizer's state)")
    if activations_are_least:
        less.append("use a smaller model.preset or model.block_size, or a machine with more memory")
    estimate = format_bytes(estimated_memory(config, plan, device_type).total)
    return f"{', or '.join(less)}; the estimate for this configuration is {estimate} a rank"


def settle_memory(config: Config, asked: Config, room: Room) -> tuple[Config, list[str]]:
    """Sharding, recomputation and micro-batch, with a line of reason for each that was `auto`.

    Args:
        config: with dtype and compile resolved, an earlier start's choices in it.
        asked: without those choices; what is not `auto` in it stays.

    Raises UserError where nothing fits.
    """
    config, reasons = _choose_sharding(config, asked, room)
    config, anew = _forget_what_does_not_fit(config, asked, room)
    reasons += anew
    if config.recompute.mode == "auto":
        mode: Literal["none", "full"] = "none" if fits(config, _least_micro_batch(config), 0, room) else "full"
        config = replace(config, recompute=replace(config.recompute, mode=mode))
        reasons.append(f"recompute {mode}: {format_bytes(room.free)} are free")
    if config.batch.micro_batch == "auto":
        micro_batch = _choose_micro_batch(config, room)
        config = replace(config, batch=replace(config.batch, micro_batch=micro_batch))
        reasons.append(f"micro_batch {micro_batch}: {format_bytes(room.free)} are free")
    return config, reasons


def _choose_sharding(config: Config, asked: Config, room: Room) -> tuple[Config, list[str]]:
    """Shard the optimizer where it would not fit whole; decided at every start, as the weights stay the same.

    It comes before recomputation, which costs more.
    """
    if asked.optim.shard != "auto":
        return config, []
    whole, parts = (replace(config, optim=replace(config.optim, shard=shard)) for shard in (False, True))
    if room.world_size == 1:
        return whole, []
    every = 0 if config.recompute.mode == "auto" else recompute_every(config)
    if fits(whole, _least_micro_batch(config), every, room):
        return whole, ["shard false: each rank has room for the optimizer's whole state"]
    here, all_of_it = optimizer_bytes(parts, room.world_size), optimizer_bytes(whole, room.world_size)
    if here + communication_bytes(parts, room.world_size) >= all_of_it:  # of a tiny model: buffers are more than state
        return whole, []
    line = f"{format_bytes(here)} of the optimizer's {format_bytes(all_of_it)} on a rank at most"
    return parts, [f"shard true: {format_bytes(room.free)} are free; {line}"]


def _forget_what_does_not_fit(config: Config, asked: Config, room: Room) -> tuple[Config, list[str]]:
    """An earlier start's choices, made `auto` again where the memory here is too small for them, and a line on that."""
    mode, size = config.recompute.mode, config.batch.micro_batch
    chosen = [
        f"{name} {value}"
        for name, wish, value in (
            ("recompute", asked.recompute.mode, mode),
            ("micro_batch", asked.batch.micro_batch, size),
        )
        if wish == "auto" and value != "auto"
    ]
    if not chosen or mode == "auto":
        return config, []
    if fits(config, _least_micro_batch(config), recompute_every(config), room, share=KEPT_SHARE):
        return config, []
    free = format_bytes(room.free)
    line = f"{' and '.join(chosen)}, which an earlier start chose, may not fit into the {free} that are free"
    config = replace(config, batch=asked.batch)
    if asked.recompute.mode == "auto" and not fits(config, _least_micro_batch(config), recompute_every(config), room):
        config = replace(config, recompute=asked.recompute)
    return config, [line]


def _least_micro_batch(config: Config) -> int:
    return config.batch.micro_batch if isinstance(config.batch.micro_batch, int) else config.unit_sequences


def fits(config: Config, micro_batch: int, every: int, room: Room, *, share: float = MEMORY_SHARE) -> bool:
    """Whether an estimate leaves enough of the room free."""
    return estimate_of(config, micro_batch, every, room.world_size, room.device_type).to_come <= share * room.free


def largest_that_fits(config: Config, every: int, room: Room) -> int | None:
    """The largest micro-batch that divides the step and whose estimate fits; None where not even one sequence does.

    Raises UserError where no micro-batch divides the step.
    """
    tokens, length = config.batch.stages.common_size, config.model.block_size
    size = CPU_MICRO_BATCH if room.device_type == "cpu" else tokens // length
    while size >= config.unit_sequences:
        size = largest_micro_batch(tokens, length, room.world_size, size, config.unit_sequences)
        if fits(config, size, every, room):
            return size
        size -= 1
    return None


def _choose_micro_batch(config: Config, room: Room) -> int:
    size = largest_that_fits(config, recompute_every(config), room)
    if size is None:
        raise UserError(
            f"not even a micro-batch of one sequence of {config.model.block_size} tokens fits into "
            f"{format_bytes(room.free)}: use --recompute.mode full, or a smaller model.preset or model.block_size"
        )
    return size
