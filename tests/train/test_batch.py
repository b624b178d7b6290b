"""The batch is stated in tokens; what doesn't divide is met with the nearest values that do."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.batch_stages import BatchStages
from common.errors import UserError
from train.batches.plan import largest_micro_batch, plan_batch, plan_batches
from train.settings.sections import BatchConfig

# Steps of each stage, and by how much a step grows with it, in units of so many tokens.
STAGES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5)), min_size=1, max_size=5)


def stages_of(parts: list[tuple[int, int]], unit: int) -> BatchStages:
    """As the configuration states them."""
    warmup, start, size = [], 0, 0
    for steps, growth in parts:
        size += growth * unit
        warmup.append([start, size])
        start += steps * size
    return BatchConfig(tokens_per_step=size, warmup=warmup).stages


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 16), st.integers(1, 16))
def test_what_divides_is_cut_up_without_a_remainder(block: int, micro: int, world: int, accumulation: int) -> None:
    plan = plan_batch(block * micro * world * accumulation, block, micro, world)
    assert plan.accumulation == accumulation
    numbers = [plan.micro_batch_number(rank, index) for rank in range(world) for index in range(accumulation)]
    assert sorted(numbers) == list(range(world * accumulation))


def test_the_nearest_batches_are_named() -> None:
    with pytest.raises(
        UserError, match=r"is 500000, not a whole number of sequences of 1024 tokens: use 499712 or 500736"
    ):
        plan_batch(500_000, 1024, 4, 1)
    with pytest.raises(UserError, match=r"tokens: use 1024"):
        plan_batch(10, 1024, 1, 1)


def test_the_nearest_micro_batches_are_named() -> None:
    # 48 sequences on 2 ranks: micro-batches of 1, 2, 3, 4, 6, 8, 12 and 24 divide
    with pytest.raises(UserError, match=r"batch.micro_batch 4 or 6, or batch.tokens_per_step 40960 or 51200"):
        plan_batch(48 * 1024, 1024, 5, 2)


@given(STAGES, st.integers(1, 7), st.integers(0, 60), st.integers(0, 60), st.integers(0, 500))
def test_tokens_batch_and_step_are_closed_forms_of_each_other(
    parts: list[tuple[int, int]], unit: int, steps: int, more: int, elsewhere: int
) -> None:
    """Against counting step by step; also from where a run with another batch was (a branch), between two borders."""
    stages = stages_of(parts, unit)
    for start in (0, elsewhere):
        tokens, seen = start, [start]
        for _ in range(steps + more):
            tokens += stages.size_at(tokens)
            seen.append(tokens)
        assert stages.tokens_after(steps, start) == seen[steps]
        assert stages.tokens_after(more, seen[steps]) == seen[-1] == stages.tokens_after(steps + more, start)
        left = sum(late - early for early, late in zip(seen[steps:], seen[steps + 1 :], strict=False))
        assert stages.steps_left(more, seen[steps]) * stages.size_at(seen[steps]) == pytest.approx(left)
    step = 0
    for (count, _), start, size in zip(parts, stages.starts, stages.sizes, strict=True):
        assert stages.tokens_after(step) == start and stages.size_at(start) == size
        step += count
    assert stages.steps_to(stages.tokens_after(steps)) == steps


@pytest.mark.parametrize(
    ("warmup", "words"),
    [
        ([[0, 64], [100, 128]], "from 0 to 100 tokens are no whole steps of 64: let the next stage start at 64 or 128"),
        ([[0, 64], [50, 128]], "let the next stage start at 64$"),
        ([[0, 64], [128, 96]], r"ends with 96 tokens a step.* add the stage at which these start, \[TOKENS, 128\]"),
        ([[64, 128]], "let its first stage start at 0"),
        ([[0, 256], [256, 128]], r"\[256, 128\] after \[0, 256\]: let both numbers grow"),
        ([[0, 0], [256, 128]], "use a positive number"),
        ([[0, 64, 1], [64, 128]], "give pairs"),
    ],
)
def test_stages_that_are_none_are_refused_with_what_fits(warmup: list[list[int]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        BatchConfig(tokens_per_step=128, warmup=warmup)


def test_a_stage_that_does_not_divide_is_named_with_the_nearest_values() -> None:
    def plan(size: int, micro_batch: int) -> None:
        stages = BatchConfig(tokens_per_step=48 * 64, warmup=[[0, size], [size * 10, 48 * 64]]).stages
        plan_batches(stages, 64, micro_batch, 2)

    plan(8 * 64, 4)
    with pytest.raises(UserError, match=r"batch.warmup's stage 1 is 500, not a whole number .* use 448 or 512"):
        plan(500, 4)
    with pytest.raises(UserError, match=r"stage 1: 640 tokens .*micro_batch 1 or 5, or batch.warmup's stage 1 512 or"):
        plan(10 * 64, 4)
    with pytest.raises(UserError, match=r"batch.micro_batch 4 or 6, or batch.tokens_per_step 2560 or 3200"):
        plan(10 * 64, 5)


@given(st.integers(1, 64), st.integers(1, 12), st.integers(1, 12), st.integers(1, 12))
def test_every_advice_works(block: int, sequences: int, micro: int, world: int) -> None:
    try:
        plan_batch(block * sequences, block, micro, world)
    except UserError as error:
        advice = str(error).split(": use ")[1]
        sizes, _, tokens = advice.rpartition("batch.tokens_per_step ")
        for value in tokens.split(" or "):
            plan_batch(int(value), block, micro, world)
        for value in sizes.replace("batch.micro_batch", "").replace(", or", "").split(" or "):
            if value.strip():
                plan_batch(block * sequences, block, int(value), world)


def test_the_largest_micro_batch_divides() -> None:
    assert largest_micro_batch(48 * 64, 64, 2, at_most=10) == 8
    assert largest_micro_batch(48 * 64, 64, 2, at_most=1000) == 24
    with pytest.raises(UserError):
        largest_micro_batch(7 * 64, 64, 2, at_most=4)
