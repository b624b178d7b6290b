"""The batch, stated in tokens: micro-batch and world size only slice it."""

from dataclasses import dataclass

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


def plan_batch(tokens_per_step: int, block_size: int, micro_batch: int, world_size: int) -> BatchPlan:
    """Derive the accumulation.

    Raises UserError, naming the nearest values that fit, where micro-batches over all ranks don't fill the step.
    """
    if tokens_per_step % block_size:
        below = tokens_per_step // block_size * block_size
        raise UserError(
            f"batch.tokens_per_step is {tokens_per_step}, not a whole number of sequences of {block_size} tokens: "
            f"use {_either(below, below + block_size)}"
        )
    sequences = tokens_per_step // block_size
    round_of_ranks = micro_batch * world_size
    if sequences % round_of_ranks:
        below = sequences // round_of_ranks * round_of_ranks
        tokens = _either(below * block_size, (below + round_of_ranks) * block_size)
        fitting = [size for size in range(1, sequences // world_size + 1) if sequences % (size * world_size) == 0]
        advice = f"batch.tokens_per_step {tokens}"
        if fitting:
            below_and_above = [s for s in fitting if s < micro_batch][-1:] + [s for s in fitting if s > micro_batch][:1]
            advice = f"batch.micro_batch {' or '.join(map(str, below_and_above))}, or {advice}"
        raise UserError(
            f"{sequences} sequences a step ({tokens_per_step} tokens of {block_size}) don't divide among {world_size} "
            f"ranks with batch.micro_batch {micro_batch}: use {advice}"
        )
    return BatchPlan(sequences, micro_batch, world_size, sequences // round_of_ranks)


def largest_micro_batch(tokens_per_step: int, block_size: int, world_size: int, at_most: int) -> int:
    """The largest micro-batch up to `at_most` that divides the step.

    Raises UserError where not even a micro-batch of one sequence does.
    """
    plan_batch(tokens_per_step, block_size, 1, world_size)
    per_rank = tokens_per_step // block_size // world_size
    return max(size for size in range(1, max(1, min(at_most, per_rank)) + 1) if per_rank % size == 0)


def _either(below: int, above: int) -> str:
    return f"{below} or {above}" if below > 0 else str(above)
