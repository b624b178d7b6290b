"""What to do about a run that doesn't fit into the memory."""

from typing import cast

from common.progress import format_bytes
from model.memory import memory_estimate
from model.precision import Dtype
from train.batches.plan import BatchPlan, largest_micro_batch
from train.settings.sections import Config
from train.startup.auto import average_bytes, optimizer_bytes, recompute_every


def estimated_bytes(config: Config, plan: BatchPlan, device_type: str) -> int:
    """What a training step keeps on one rank, for a resolved configuration."""
    estimate = memory_estimate(
        config.model.architecture(),
        micro_batch=plan.micro_batch,
        dtype=cast(Dtype, config.run.dtype),
        recompute_every=recompute_every(config),
        recompute_norms=config.recompute.norms,
        stream=config.run.stream_dtype,
        device_type=device_type,
        compiled=config.run.compile is True,
        adapters=config.adapter_count(),
        optimizer_bytes=optimizer_bytes(config, plan.world_size),
        average_bytes=average_bytes(config, plan.world_size),
        statistics_ranks=plan.world_size if config.log.statistics_every else 0,
    )
    return estimate.total


def memory_advice(config: Config, plan: BatchPlan, device_type: str) -> str:
    """The options of a resolved configuration that take less memory, in the order in which to try them."""
    length, size = config.model.block_size, plan.micro_batch
    less = []
    if size > 1:
        half = largest_micro_batch(config.batch.tokens_per_step, length, plan.world_size, size // 2)
        less.append(f"halve batch.micro_batch ({size}: --batch.micro_batch {half}; the batch stays the same)")
    if config.recompute.mode != "full":
        less.append(f"use --recompute.mode full ({config.recompute.mode} now)")
    activations_are_least = not less
    if config.optim.shard is not True and plan.world_size > 1:
        less.append("use --optim.shard true (each rank keeps a part of the optimizer's state)")
    if activations_are_least:
        less.append("use a smaller model.preset or model.block_size, or a machine with more memory")
    estimate = format_bytes(estimated_bytes(config, plan, device_type))
    return f"{', or '.join(less)}; the estimate for this configuration is {estimate} a rank"
