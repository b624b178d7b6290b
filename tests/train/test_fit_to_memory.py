"""`auto` micro-batches and recomputation follow the memory: at every start, and in a trial before the first step."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from model.gpt import GPT
from model.ranks import Ranks
from tests.helpers.ranks import RankGroup
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import losses, run_of, tiny_arguments, train, train_as_rank
from train.estimates import run_memory
from train.settings.command_line import as_dict
from train.settings.sections import (
    BatchConfig,
    CheckpointConfig,
    Config,
    ModelSection,
    OptimConfig,
    RecomputeConfig,
    RunConfig,
)
from train.startup import auto, build_model

ONE = Ranks(0, 1, 0, 1, torch.device("cpu"))
WORDS = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 3 has a total capacity of 79.11 GiB of which 1.20 GiB is free."
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_token_set(folder, train_tokens=5_000, val_tokens=500)
    return folder


def config_of(micro_batch="auto", mode="auto") -> Config:
    return Config(
        model=ModelSection(vocab_size=257, block_size=64, n_layer=8, n_head=2, n_embd=64),
        batch=BatchConfig(tokens_per_step=64 * 64, micro_batch=micro_batch),
        recompute=RecomputeConfig(mode=mode),
        checkpoint=CheckpointConfig(asynchronous=False),  # whose copy of all state is more than so small a batch
        run=RunConfig(dtype="fp32", compile=False),
    )


def bytes_of(micro_batch: int, every: int) -> int:
    return run_memory.estimate_of(config_of(), micro_batch, every, 1, "cpu").to_come


def chosen(monkeypatch: pytest.MonkeyPatch, asked: Config, recorded: Config | None, free: float):
    monkeypatch.setattr(auto, "free_memory_bytes", lambda *_: int(free))
    config, reasons = auto.resolve(asked, as_dict(recorded) if recorded else None, ONE)
    return config.batch.micro_batch, config.recompute.mode, "\n".join(reasons)


def test_what_an_earlier_start_chose_is_kept_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = config_of(8, "none")
    for free in (1 << 40, bytes_of(8, 0) / 0.9):  # a little less than a new run would want
        assert chosen(monkeypatch, config_of(), recorded, free) == (8, "none", "")


def test_what_an_earlier_start_chose_is_chosen_anew_where_it_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a smaller GPU after a requeue."""
    recorded, asked = config_of(8, "none"), config_of()
    size, mode, reasons = chosen(monkeypatch, asked, recorded, bytes_of(2, 0) / 0.84)
    assert (size, mode) == (2, "none")
    assert "recompute none and micro_batch 8, which an earlier start chose, may not fit into the" in reasons
    assert "micro_batch 2:" in reasons
    size, mode, reasons = chosen(monkeypatch, asked, recorded, bytes_of(1, 1) / 0.84)
    assert (size, mode) == (1, "full")
    assert "recompute full:" in reasons
    # what the configuration names is not the machine's to change
    assert chosen(monkeypatch, config_of(mode="none"), recorded, bytes_of(2, 0) / 0.84)[:2] == (2, "none")
    assert chosen(monkeypatch, config_of(8), recorded, bytes_of(8, 1) / 0.84)[:2] == (8, "full")
    assert chosen(monkeypatch, config_of(8, "none"), recorded, 1000)[:2] == (8, "none")
    # more ranks than before leave the micro-batch open, and the memory with it
    two = replace(ONE, world_size=3)
    monkeypatch.setattr(Ranks, "agree", lambda self, flags: flags)
    asked = replace(asked, batch=BatchConfig(tokens_per_step=63 * 64))
    monkeypatch.setattr(auto, "free_memory_bytes", lambda *_: int(bytes_of(1, 1) / 0.84))
    config, _ = auto.resolve(asked, as_dict(recorded), two)
    assert (config.batch.micro_batch, config.recompute.mode) == (1, "full")


def test_the_optimizer_is_sharded_only_where_it_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before blocks are recomputed; an earlier start's choice does not hold."""
    monkeypatch.setattr(Ranks, "agree", lambda self, flags: flags)
    two = replace(ONE, world_size=2)

    def choose(
        free: float, earlier: bool | None = None, asked: Any = "auto", ranks: Ranks = two
    ) -> tuple[Any, Any, str]:
        monkeypatch.setattr(auto, "free_memory_bytes", lambda *_: int(free))
        recorded = None if earlier is None else as_dict(replace(config_of(), optim=OptimConfig(shard=earlier)))
        config, reasons = auto.resolve(replace(config_of(1), optim=OptimConfig(shard=asked)), recorded, ranks)
        return config.optim.shard, config.recompute.mode, "\n".join(reasons)

    enough = bytes_of(1, 0) / 0.84
    monkeypatch.setattr(run_memory, "BUFFER_BYTES", 0)
    assert choose(enough)[:2] == choose(enough, True)[:2] == (False, "none")
    shard, mode, reasons = choose(0.9 * enough, False)
    assert (shard, mode) == (True, "none")
    assert "shard true: " in reasons and " of the optimizer's " in reasons
    assert choose(0.9 * enough, asked=False)[:2] == (False, "full")
    assert choose(enough, asked=True)[:2] == (True, "none")
    assert choose(0.9 * enough, ranks=ONE)[:2] == (False, "full")


def test_a_dtype_that_a_new_run_would_not_take_here_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = replace(config_of(1, "none"), run=RunConfig(compile=False))
    recorded = replace(asked, run=RunConfig(dtype="fp16"))
    _, _, reasons = chosen(monkeypatch, asked, recorded, 1 << 40)
    assert reasons.startswith("dtype fp16, as the run has been trained so far: a new run would take ")


def train_with(free: int, arguments: list[str]) -> None:
    pytest.MonkeyPatch().setattr(auto, "free_memory_bytes", lambda *_: free)
    train_as_rank(arguments)


def test_a_run_that_meets_less_memory_learns_the_same(tmp_path: Path, data: Path) -> None:
    options: tuple[str, ...] = ("--model.dropout=0", "--batch.micro_batch=auto", "--recompute.mode=none")
    options = (*options, "--schedule.kind=constant")
    options = (*options, "--checkpoint.asynchronous=false")  # whose copy of all state is more than so small a batch
    train(1, tmp_path, tiny_arguments(tmp_path, data, "calm", *options))
    arguments = tiny_arguments(tmp_path, data, "moved", *options)
    train(1, tmp_path, [*arguments, "--run.max_steps=10", "--allow-change=run.max_steps"])
    run = run_of(tmp_path, "moved")
    assert yaml.safe_load(run.config.read_text())["batch"]["micro_batch"] == 8
    tiny = replace(config_of(), model=ModelSection(vocab_size=257, block_size=16, n_layer=2, n_head=2, n_embd=32))
    needed = run_memory.estimate_of(tiny, 2, 0, 1, "cpu").to_come
    more = [*arguments, "--allow-change=run.max_steps"]
    assert RankGroup(1, tmp_path / "store", train_with, int(needed / 0.84), more).join() == [0]
    assert yaml.safe_load(run.config.read_text())["batch"]["micro_batch"] < 8
    assert "micro_batch 8, which an earlier start chose, may not fit" in run.log.read_text()
    assert losses(run) == pytest.approx(losses(run_of(tmp_path, "calm")), abs=1e-3)


def train_short_of_memory(most: int, arguments: list[str]) -> None:
    """As a GPU that runs out of memory in micro-batches of more than `most` sequences; on the last rank."""
    forward, patch = GPT.forward, pytest.MonkeyPatch()

    def short(self: GPT, tokens: torch.Tensor, *rest: Any, **keywords: Any) -> Any:
        last = int(os.environ["RANK"]) + 1 == int(os.environ["WORLD_SIZE"])
        if last and self.training and len(tokens) > most:
            raise torch.OutOfMemoryError(WORDS)
        return forward(self, tokens, *rest, **keywords)

    patch.setattr(GPT, "forward", short)
    patch.setattr(build_model, "TRIED_ON", ("cpu",))
    train_as_rank(arguments)


def test_ranks_agree_on_a_micro_batch_that_all_have_memory_for(tmp_path: Path, data: Path) -> None:
    arguments = tiny_arguments(tmp_path, data, "tried", "--batch.micro_batch=auto", "--run.max_steps=6")
    assert RankGroup(2, tmp_path / "store", train_short_of_memory, 2, arguments).join() == [0, 0]
    run = run_of(tmp_path, "tried")
    assert yaml.safe_load(run.config.read_text())["batch"]["micro_batch"] == 2
    log = run.log.read_text()
    for size, smaller in ((8, 4), (4, 2)):
        assert f"micro_batch {smaller}, recompute none: {size} ran out of memory in a trial (rank 1: 2.00 GiB" in log
    named = tiny_arguments(tmp_path, data, "named", "--batch.micro_batch=2", "--run.max_steps=6")
    train(2, tmp_path, named)
    assert losses(run) == losses(run_of(tmp_path, "named"))  # to the bit: nothing is left of the trial


def test_where_nothing_fits_all_ranks_end_with_what_to_do(tmp_path: Path, data: Path) -> None:
    arguments = tiny_arguments(tmp_path, data, "hopeless", "--batch.micro_batch=auto")
    assert RankGroup(2, tmp_path / "store", train_short_of_memory, 0, arguments).join() == [2, 2]
    run = run_of(tmp_path, "hopeless")
    assert "micro_batch 1, recompute full: 1 ran out of memory in a trial" in run.log.read_text()
    state = run.read_state() or {}
    assert state["status"] == "failed"
    assert state["reason"].startswith(
        "not even a micro-batch of one sequence of 16 tokens fits into the memory (rank 1"
    )
    assert "use a smaller model.preset or model.block_size" in state["reason"]


def test_a_micro_batch_that_was_given_stays_and_is_named(tmp_path: Path, data: Path) -> None:
    arguments = tiny_arguments(tmp_path, data, "given", "--batch.micro_batch=8")
    assert RankGroup(1, tmp_path / "store", train_short_of_memory, 2, arguments).join() == [2]
    reason = (run_of(tmp_path, "given").read_state() or {})["reason"]
    assert "halve batch.micro_batch (8: --batch.micro_batch 4;" in reason and "--recompute.mode full" in reason
