"""The batch, stated in tokens: micro-batch and world size only slice it."""

from dataclasses import dataclass

from common.batch_stages import BatchStages
from common.errors import UserError


@dataclass(frozen=True)
class BatchPlan:
    """One optimizer step: `accumulation` micro-batches on each of `world_size` ranks."""

    sequences: int
    micro_batch: int
    world_size: int
    accumulation: int

    def micro_batch_number(self, rank: int, accumulation_index: int) -> int:
        """The place of a rank's micro-batch within the global step, the same for any world size."""
        return accumulation_index * self.world_size + rank


@dataclass(frozen=True)
class BatchPlans:
    """The plans of a batch that grows by stages; of one stage where it stays the same.

    They differ in their accumulation only.
    """

    stages: BatchStages
    plans: tuple[BatchPlan, ...]

    @property
    def full(self) -> BatchPlan:
        """The last stage's, which is the largest."""
        return self.plans[-1]

    def at(self, tokens: int) -> BatchPlan:
        """Of a step that starts after so many tokens of the run."""
        return self.plans[self.stages.index_at(tokens)]


def plan_batches(stages: BatchStages, block_size: int, micro_batch: int, world_size: int) -> BatchPlans:
    """Derive each stage's accumulation. Raises UserError as `plan_batch`, naming the stage."""
    last = len(stages.sizes) - 1
    names = ["batch.tokens_per_step" if n == last else f"batch.warmup's stage {n + 1}" for n in range(last + 1)]
    plans = [
        plan_batch(size, block_size, micro_batch, world_size, name)
        for size, name in zip(stages.sizes, names, strict=True)
    ]
    return BatchPlans(stages, tuple(plans))


def plan_batch(
    tokens_per_step: int, block_size: int, micro_batch: int, world_size: int, name: str = "batch.tokens_per_step"
) -> BatchPlan:
    """Derive the accumulation.

    Args: name: what states the tokens.

    Raises UserError, naming the nearest values that fit, where micro-batches over all ranks don't fill the step.
    """
    if tokens_per_step % block_size:
        below = tokens_per_step // block_size * block_size
        raise UserError(
            f"{name} is {tokens_per_step}, not a whole number of sequences of {block_size} tokens: "
            f"use {_either(below, below + block_size)}"
        )
    sequences = tokens_per_step // block_size
    round_of_ranks = micro_batch * world_size
    if sequences % round_of_ranks:
        below = sequences // round_of_ranks * round_of_ranks
        tokens = _either(below * block_size, (below + round_of_ranks) * block_size)
        fitting = [size for size in range(1, sequences // world_size + 1) if sequences % (size * world_size) == 0]
        of = "" if name == "batch.tokens_per_step" else f"{name}: "
        advice = f"{name} {tokens}"
        if fitting:
            below_and_above = [s for s in fitting if s < micro_batch][-1:] + [s for s in fitting if s > micro_batch][:1]
            advice = f"batch.micro_batch {' or '.join(map(str, below_and_above))}, or {advice}"
        raise UserError(
            f"{sequences} sequences a step ({of}{tokens_per_step} tokens of {block_size}) don't divide among "
            f"{world_size} ranks with batch.micro_batch {micro_batch}: use {advice}"
        )
    return BatchPlan(sequences, micro_batch, world_size, sequences // round_of_ranks)


def largest_micro_batch(tokens_per_step: int, block_size: int, world_size: int, at_most: int, multiple: int = 1) -> int:
    """The largest micro-batch up to `at_most`, or `multiple` where that is more, that divides the step.

    Args: multiple: sequences that it holds whole numbers of.

    Raises UserError where not even a micro-batch of so many sequences does.
    """
    plan_batch(tokens_per_step, block_size, multiple, world_size)
    per_rank = tokens_per_step // block_size // world_size
    sizes = range(multiple, max(multiple, min(at_most, per_rank)) + 1, multiple)
    return max(size for size in sizes if per_rank % size == 0)


def _either(below: int, above: int) -> str:
    return f"{below} or {above}" if below > 0 else str(above)
