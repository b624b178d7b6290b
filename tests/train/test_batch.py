"""The batch is stated in tokens; what doesn't divide is met with the nearest values that do."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from train.batches.plan import largest_micro_batch, plan_batch


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
