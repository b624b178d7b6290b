"""The loader: whole steps, a pure function of (data, seed, sequences consumed), sliced by rank and nothing else."""

import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from common.batch_stages import BatchStages
from data_prep.token_sets.sequences import Windows
from tests.helpers.token_sets import make_token_set
from train.batches.loader import StepLoader
from train.batches.plan import BatchPlan, plan_batch, plan_batches
from train.batches.shuffle import windows_at


class Counting:
    """A stream whose token i is i, so that windows tell where they come from."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def read(self, start: int, stop: int) -> np.ndarray:
        assert 0 <= start <= stop <= self._length
        return np.arange(start, stop, dtype=np.uint32)


def loaders(windows: Windows, plan: BatchPlan, seed: int = 3) -> list[StepLoader]:
    return [StepLoader(windows, plan, rank=rank, seed=seed) for rank in range(plan.world_size)]


@settings(max_examples=60)
@given(
    window_count=st.integers(1, 60),
    world_size=st.integers(1, 8),
    micro_batch=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    epochs=st.integers(1, 3),
)
def test_each_window_exactly_once_an_epoch_over_all_ranks(
    window_count: int, world_size: int, micro_batch: int, accumulation: int, epochs: int
) -> None:
    plan = BatchPlan(world_size * micro_batch * accumulation, micro_batch, world_size, accumulation)
    windows = Windows(Counting(window_count * 4 + 1), block_size=4)
    assert windows.count == window_count
    everyone = loaders(windows, plan)
    given_out: list[int] = []
    for step in range(-(-epochs * window_count // plan.sequences)):
        for micro in range(accumulation):  # sequence numbers run over ranks within a round of micro-batches
            for loader in everyone:
                given_out += loader.step_at(step * plan.sequences).windows[micro].tolist()
    for epoch in range(epochs):
        assert sorted(given_out[epoch * window_count : (epoch + 1) * window_count]) == list(range(window_count))


@pytest.mark.parametrize("world_size", range(1, 9))
def test_the_same_sequences_per_step_for_any_world_size(world_size: int) -> None:
    windows = Windows(Counting(1001), block_size=4)
    sequences = 8 * 3 * 5 * 7
    alone = StepLoader(windows, BatchPlan(sequences, sequences, 1, 1), rank=0, seed=5)
    everyone = loaders(windows, BatchPlan(sequences, 1, world_size, sequences // world_size), seed=5)
    for consumed in (0, sequences, 10**9 + 1):
        shares = np.concatenate([loader.step_at(consumed).windows.ravel() for loader in everyone])
        assert sorted(shares) == sorted(alone.step_at(consumed).windows.ravel())


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_batch_that_grows_slices_the_same_order_of_sequences(world_size: int) -> None:
    stages = BatchStages((0, 4 * 8 * 3, 4 * (8 * 3 + 16 * 2)), (4 * 8, 4 * 16, 4 * 24))
    windows = Windows(Counting(1001), block_size=4)
    plans = plan_batches(stages, 4, 2, world_size)
    everyone = [StepLoader(windows, plans.full, rank=r, seed=5, plans=plans) for r in range(world_size)]
    for first, sizes in ((0, (8, 8, 8, 16, 16, 24, 24)), (4, (16, 24, 24))):
        begin = stages.tokens_after(first)
        steps = [loader.steps(begin // 4, begin) for loader in everyone]  # as if resumed there
        position = begin // 4
        for size in sizes:
            shares = [next(each) for each in steps]
            assert {share.total_target_count for share in shares} == {size * 4}
            found = sorted(np.concatenate([share.windows.ravel() for share in shares]).tolist())
            assert found == everyone[0].numbers_at(position, size)
            assert found == sorted(windows_at(position, size, windows.count, 5).tolist())
            position += size
        for each in steps:
            each.close()


def test_targets_follow_inputs_across_shard_borders(tmp_path: Path) -> None:
    tokens = make_token_set(tmp_path, train_tokens=103, val_tokens=20, shard_tokens=7).split("train")
    everything = tokens.read(0, 103)
    loader = StepLoader(Windows(tokens, 10), BatchPlan(10, 5, 1, 2), rank=0, seed=0)
    batch = loader.step_at(0)
    assert batch.tokens.shape == batch.targets.shape == (2, 5, 10)
    assert batch.target_count == 100
    for micro in range(2):
        for row in range(5):
            start = batch.windows[micro, row] * 10
            assert batch.tokens[micro, row].tolist() == everything[start : start + 10].tolist()
            assert batch.targets[micro, row].tolist() == everything[start + 1 : start + 11].tolist()
    assert sorted(batch.windows.ravel()) == list(range(10))  # 103 tokens hold 10 windows


@pytest.mark.parametrize("shard_tokens", [1, 3, 103, 500])
def test_shards_shorter_than_a_window(tmp_path: Path, shard_tokens: int) -> None:
    tokens = make_token_set(tmp_path, train_tokens=103, val_tokens=20, shard_tokens=shard_tokens).split("train")
    windows = Windows(tokens, 10)
    assert np.array_equal(windows.read(np.arange(10))[:, :-1].ravel(), tokens.read(0, 100))


@settings(max_examples=60)
@given(
    tokens=st.integers(2, 90),
    block_size=st.integers(1, 12),
    stride=st.integers(1, 12),
    sequences=st.integers(1, 9),
    consumed=st.integers(0, 400),
)
def test_windows_that_overlap_begin_at_every_stride_and_each_comes_once_an_epoch(
    tokens: int, block_size: int, stride: int, sequences: int, consumed: int
) -> None:
    assume(stride <= block_size < tokens)
    windows = Windows(Counting(tokens), block_size, stride)
    starts = [start for start in range(0, tokens, stride) if start + block_size < tokens]
    assert windows.count == len(starts)
    loader = StepLoader(windows, BatchPlan(sequences, sequences, 1, 1), rank=0, seed=2)
    steps = -(-3 * windows.count // sequences)
    begun = np.concatenate([loader.step_at(step * sequences).tokens[0, :, 0] for step in range(steps)])
    for epoch in range(3):
        assert sorted(begun[epoch * len(starts) : (epoch + 1) * len(starts)]) == starts
    consumed = min(consumed, (steps - 1) * sequences)  # asked for at once, it is what walking there gives
    batch = loader.step_at(consumed)
    assert batch.tokens[0, :, 0].tolist() == begun[consumed : consumed + sequences].tolist()
    assert batch.tokens[0].tolist() == [list(range(start, start + block_size)) for start in batch.tokens[0, :, 0]]
    assert batch.targets.equal(batch.tokens + 1)


def test_billions_of_overlapping_windows_cost_nothing() -> None:
    windows = Windows(Counting(4 * 10**9), 1024, 1)
    assert windows.count == 4 * 10**9 - 1024
    batch = StepLoader(windows, BatchPlan(4, 4, 1, 1), rank=0, seed=0).step_at(3 * 10**9)
    assert batch.tokens[0, :, 0].tolist() == batch.windows[0].tolist()


def test_reading_ahead_gives_what_asking_gives_and_ends_with_the_iterator() -> None:
    loader = StepLoader(Windows(Counting(401), 4), BatchPlan(6, 3, 1, 2), rank=0, seed=1)
    steps = loader.steps(600)
    for number in range(40):
        read, asked = next(steps), loader.step_at(600 + 6 * number)
        assert np.array_equal(read.windows, asked.windows)
        assert read.tokens.equal(asked.tokens)
    steps.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "loader"]


def test_a_read_error_surfaces_in_the_training_thread() -> None:
    class Broken(Counting):
        def read(self, start: int, stop: int) -> np.ndarray:
            raise OSError("the disk is gone")

    steps = StepLoader(Windows(Broken(401), 4), BatchPlan(6, 3, 1, 2), rank=0, seed=1).steps(0)
    with pytest.raises(OSError, match="the disk is gone"):
        next(steps)


def test_accumulation_is_derived() -> None:
    plan = plan_batch(524_288, 1024, 16, 8)
    assert (plan.sequences, plan.accumulation) == (512, 4)
