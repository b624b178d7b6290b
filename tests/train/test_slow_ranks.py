"""A rank that computes more slowly than the others is named with its host, and only such a one."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.metrics_file import read_metrics
from model.ranks import start_ranks
from tests.helpers.notes import Notes
from tests.helpers.ranks import RankGroup, run_ranks
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import run_of, slow_down_forwards, tiny_arguments, train_as_rank
from train.run.slow_ranks import WINDOW_STEPS, WINDOWS, SlowRanks, is_slow, times_the_median


def compare(windows: list[list[float]]) -> tuple[list[str], list[dict[str, Any]]]:
    """A rank's part: the lines and records after windows of these seconds a step, by rank."""
    ranks, notes = start_ranks("cpu"), Notes()
    slow = SlowRanks(ranks, ["node0", "node1", "node2"], notes)  # type: ignore[arg-type]
    for number, seconds in enumerate(windows):
        for step in range(WINDOW_STEPS):
            outlier = 50.0 if step == 3 else 0.0  # a single step tells nothing
            slow.step(number * WINDOW_STEPS + step + 1, seconds[ranks.rank] + outlier)
    ranks.close()
    return notes.lines, notes.records


def test_a_rank_is_named_once_when_it_has_been_slow_for_a_while(tmp_path: Path) -> None:
    even, slow = [0.10, 0.10, 0.11], [0.10, 0.10, 0.13]
    windows = [slow] * (WINDOWS - 1) + [even] + [slow] * (WINDOWS + 2) + [even] * 2

    lines, records = run_ranks(3, tmp_path / "store", compare, windows)[0]

    named = (2 * WINDOWS) * WINDOW_STEPS
    assert lines == [
        f"WARNING: rank 2 on node2 computes 1.30 times as long as the others (0.130 s a step before step {named}): "
        "all ranks wait for it",
        "rank 2 on node2 is no longer slower than the others",
    ]
    assert [record["slow"] for record in records if record["step"] in (named, named + 30)] == [[2], []]
    assert records[0] == {"kind": "ranks", "step": 10, "compute_seconds": slow, "slow": []}


def test_the_lower_median_works_with_two() -> None:
    assert times_the_median(np.array([0.1, 0.2])).tolist() == [1.0, 2.0]
    assert times_the_median(np.array([0.4, 0.1, 0.2])).tolist() == [2.0, 0.5, 1.0]
    assert times_the_median(np.zeros(2)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("slower_steps", "is_it"), [(6, False), (7, False), (8, True), (10, True)])
def test_a_rank_that_is_slow_in_some_steps_only_is_not_slow(slower_steps: int, is_it: bool) -> None:
    """Its median is half as long again; beside other work on the same cores that happens to any rank."""
    scattered = np.array([0.15] * slower_steps + [0.05] * (10 - slower_steps))
    window = np.stack([np.full(10, 0.1), np.full(10, 0.09), scattered])
    assert times_the_median(np.median(window, axis=1))[2] == pytest.approx(1.5)
    assert is_slow(window).tolist() == [False, False, is_it]


def slowed(arguments: list[str]) -> None:
    """A rank of a real run; the second one takes much longer for each forward, also beside all that a machine does."""
    if os.environ["RANK"] == "1":
        slow_down_forwards(0.2)
    train_as_rank(arguments)


def test_a_slow_rank_of_a_real_run_is_named(tmp_path: Path) -> None:
    make_token_set(tmp_path / "tokens", train_tokens=20_000, val_tokens=1_000)
    more = ["--run.max_steps=50", "--eval.every_steps=0", "--checkpoint.every_steps=0", "--batch.micro_batch=16"]
    arguments = tiny_arguments(tmp_path, tmp_path / "tokens", "slow", *more)

    assert RankGroup(2, tmp_path / "store", partial(slowed, arguments)).join() == [0, 0]

    run = run_of(tmp_path, "slow")
    (warning,) = [line for line in run.log.read_text(encoding="utf-8").splitlines() if " computes " in line]
    assert "WARNING: rank 1 on " in warning and "all ranks wait for it" in warning
    records = [record for record in read_metrics(run.metrics) if record.get("kind") == "ranks"]
    assert records[0]["step"] == WINDOW_STEPS and records[-1]["slow"] == [1]
    fast, slow = records[-1]["compute_seconds"]
    assert slow > fast > 0
