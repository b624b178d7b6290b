"""A rank that hangs is named, wherever it does; one that moves again no longer; and in the end the run ends itself."""

import importlib
import os
import re
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from common.liveness import look_at
from common.metrics_file import read_metrics
from common.run_folder import RunFolder
from tests.helpers.ranks import RankGroup
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import run_of, slow_down_forwards, tiny_arguments, train_as_rank
from train.run import hang_watch
from train.run.acts import FIRST_SECONDS, HANG_SECONDS, Acts

PATIENCE_SECONDS = 120.0
# By what a rank is said to be in: the function in which it stops, and at which of its calls.
PLACES: dict[str, tuple[str, str, int]] = {
    "waiting for data": ("train.batches.loader:StepBatch", "micro_batches", 0),  # not yet told that it has the batch
    "forward": ("model.gpt:GPT", "forward", 30),
    "backward": ("torch:Tensor", "backward", 30),
    "update": ("train.optimization.adamw:AdamW", "step", 6),
    "validating": ("train.evaluations.validation:Validation", "measure", 1),
    "saving": (
        "train.checkpoints.saver:CheckpointKeeper",
        "save",
        3,
    ),  # the last one: the run ends at once when it continues
}
AT_THE_END = ("train.run.recorder:Recorder", "close", 0)  # of `Trainer.finish`: rank 0 has written `state` by then


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tokens"
    make_token_set(folder, train_tokens=20_000, val_tokens=1_000)
    return folder


def stop_in(place: str, stopped: int, stop: Callable[[], None], arguments: list[str], last_grace: float = 60.0) -> None:
    """Train as a rank; `stopped` calls `stop` once, in the function that `PLACES` names."""
    owner, name, call = PLACES.get(place, AT_THE_END)
    module, _, kind = owner.partition(":")
    holder: Any = getattr(importlib.import_module(module), kind)
    original, calls = getattr(holder, name), 0

    def trapped(*values: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call + 1:
            stop()
        return original(*values, **named)

    if int(os.environ["RANK"]) == stopped:
        setattr(holder, name, trapped)
    hang_watch.LAST_GRACE_SECONDS = last_grace
    train_as_rank(arguments)


def freeze() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def wait_in_the_middle() -> None:
    while True:
        time.sleep(0.1)


def wait_for(condition: Callable[[], Any], group: RankGroup) -> Any:
    until = time.monotonic() + PATIENCE_SECONDS
    while not (found := condition()):
        assert time.monotonic() < until, "nothing was noticed"
        assert any(process.is_alive() for process in group.processes)
        time.sleep(0.1)
    return found


def hangs_of(run: RunFolder) -> list[dict[str, Any]]:
    return [record for record in read_metrics(run.metrics) if record.get("kind") == "hang"]


def suspect_of(run: RunFolder) -> str:
    return str((run.read_state() or {}).get("suspect", "")) if run.state.exists() else ""


@pytest.mark.timeout(600)
def test_a_frozen_rank_is_named_in_every_phase_and_the_run_continues_when_it_does(tmp_path: Path, data: Path) -> None:
    """All phases at once: stopped processes cost nothing."""
    groups = {}
    for number, place in enumerate(PLACES):
        arguments = tiny_arguments(tmp_path, data, f"run-{number}", "--run.hang_seconds=5")
        function = partial(stop_in, place, number % 2, freeze)
        groups[place] = RankGroup(2, tmp_path / place.replace(" ", "-"), function, arguments)
    arguments = tiny_arguments(tmp_path, data, "at-the-end", "--run.hang_seconds=5", "--run.max_steps=2")
    last = RankGroup(2, tmp_path / "at-the-end", partial(stop_in, "at the end", 1, freeze), arguments)
    for number, (place, group) in enumerate(groups.items()):
        run, rank = run_of(tmp_path, f"run-{number}"), number % 2
        words = wait_for(partial(suspect_of, run), group)
        assert words.startswith(f"rank {rank} on "), (place, words)
        assert ", silent for " in words, (place, words)
        assert look_at(run, time.time()).word == "silent"
        assert str(look_at(run, time.time())).startswith(f"silent: waits for rank {rank} on ")
        assert f"training hangs, and waits for: rank {rank} on " in run.log.read_text(encoding="utf-8")

        os.kill(group.processes[rank].pid or 0, signal.SIGCONT)
        assert group.join() == [0, 0], place
        assert (run.read_state() or {})["status"] == "done"
        assert "suspect" not in (run.read_state() or {})
        assert list(run.path.glob("ranks/*.stacks")) == []
        assert hangs_of(run)[0]["continued"] and hangs_of(run)[0]["hang_seconds"] > 10.0, place

    ended = run_of(tmp_path, "at-the-end")  # all is saved, and rank 0 only waits to leave
    wait_for(lambda: ended.log.exists() and "waits for: rank 1 on " in ended.log.read_text(encoding="utf-8"), last)
    assert (ended.read_state() or {})["status"] == "done"
    os.kill(last.processes[1].pid or 0, signal.SIGCONT)
    assert last.join() == [0, 0]
    assert (ended.read_state() or {})["status"] == "done"


STUCK = [(2, 1, "forward"), (2, 0, "backward"), (2, 1, "saving"), (1, 0, "update")]  # ranks, which one, in what


@pytest.mark.timeout(600)
def test_a_rank_that_is_stuck_is_named_and_the_run_ends_itself(tmp_path: Path, data: Path) -> None:
    """Its heart beats on: it is known by having done less than the others."""
    more = ["--run.hang_seconds=6", "--run.hang_limit_seconds=14"]
    groups = []
    for number, (world_size, stuck, place) in enumerate(STUCK):
        arguments = tiny_arguments(tmp_path, data, f"stuck-{number}", *more)
        function = partial(stop_in, place, stuck, wait_in_the_middle, last_grace=10.0)
        groups.append(RankGroup(world_size, tmp_path / f"store-{number}", function, arguments))
    for number, (world_size, stuck, place) in enumerate(STUCK):
        run, group = run_of(tmp_path, f"stuck-{number}"), groups[number]
        assert group.join(PATIENCE_SECONDS) == [1] * world_size
        log, state = run.log.read_text(encoding="utf-8"), run.read_state() or {}
        assert re.search(f"training hangs, and waits for: rank {stuck} on .*, in {place}, no progress for ", log), log
        assert (state["status"], state["failure"]) == ("failed", "hung")
        assert re.match(f"hung for .* s: rank {stuck} on .*, in {place}, no progress for ", state["reason"]), state
        assert state["culprit_node"] == os.uname().nodename
        assert f"failed: {state['reason']}" in log
        assert [hang["continued"] for hang in hangs_of(run)] == [False]
        assert hangs_of(run)[0]["hang_seconds"] > 14.0
        for rank in range(world_size):
            stacks = run.stacks_file(rank).read_text(encoding="utf-8")
            assert ("in wait_in_the_middle" in stacks) is (rank == stuck)
            assert "train/trainer.py" in stacks
        facts = run.stacks_file(stuck).read_text(encoding="utf-8")
        assert f"rank {stuck}, last heartbeat: " in facts and "\nState:\t" in facts
        assert not any(psutil.pid_exists(process.pid or 0) for process in group.processes)


def evaluate_slowly(arguments: list[str]) -> None:
    """A rank of which each forward takes a while, but less than is a hang."""
    slow_down_forwards(1.0)
    train_as_rank(arguments)


def test_a_long_evaluation_is_no_hang(tmp_path: Path, data: Path) -> None:
    """A validation of 8 forwards takes twice as long as a hang, of which each is some progress."""
    more = ["--run.max_steps=1", "--batch.tokens_per_step=64", "--eval.tokens=512", "--checkpoint.every_steps=0"]
    patience = ["--run.hang_seconds=4", "--run.hang_limit_seconds=5"]
    arguments = tiny_arguments(tmp_path, data, "long", *more, *patience)
    assert RankGroup(1, tmp_path / "store", partial(evaluate_slowly, arguments)).join() == [0]
    assert "training hangs" not in run_of(tmp_path, "long").log.read_text(encoding="utf-8")


def test_what_takes_long_has_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    acts = Acts()
    acts.enter("training", step=1)
    assert acts.patience_seconds == FIRST_SECONDS
    now += 50.0
    acts.enter("training", step=2)
    assert acts.patience_seconds == 250.0
    acts.enter("saving")
    assert acts.patience_seconds == FIRST_SECONDS
    now += 2.0
    acts.enter("training", step=3)
    acts.compiling()
    assert acts.patience_seconds == FIRST_SECONDS
    acts.compiled()
    acts.enter("saving")
    assert acts.patience_seconds == HANG_SECONDS
