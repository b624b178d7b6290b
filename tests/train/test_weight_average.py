"""The exponential average of the weights: its closed form, a run that keeps one, saving, resuming, what it costs."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from common.checkpoint_files import list_checkpoints, read_checkpoint_manifest
from common.errors import UserError
from common.metrics_file import read_metrics
from data_prep.token_sets.sequences import Windows
from data_prep.token_sets.token_set import TokenSet
from eval.shared.loading import load_checkpoint
from eval.shared.loss import evaluate_loss
from model.config import preset_config
from model.gpt import GPT
from model.memory import memory_estimate
from model.ranks import Ranks, start_ranks
from model.weights import load_model, read_tensors
from tests.helpers.manifests import FACTS
from tests.helpers.ranks import run_ranks
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import curve, losses, run_of, start_ranks_training, tiny_arguments, train, weights_hashes
from tests.train.test_sharding import Few, learn
from train.checkpoints.ownership import checkpoint_bytes
from train.checkpoints.reader import load_training_state
from train.checkpoints.retention import keep_weights
from train.checkpoints.writer import CheckpointWriter
from train.estimates.run_memory import average_bytes
from train.optimization.optimizer import build_optimizer
from train.optimization.weight_average import WeightAverage, build_weight_average, share_of_step
from train.progress import Progress
from train.settings.sections import Config, EvalConfig, ModelSection, OptimConfig

HALF_LIFE = 1_500
KINDS = ("whole", "sharded")  # optimizers
KEEP = (f"--optim.ema_half_life_tokens={HALF_LIFE}",)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_token_set(folder, train_tokens=20_001, val_tokens=500)
    return folder


@given(st.lists(st.integers(1, 10**7), min_size=1, max_size=20), st.integers(1, 10**8), st.data())
def test_a_steps_share_is_a_closed_form_of_tokens(steps: list[int], half_life: int, data: st.DataObject) -> None:
    """What the updates come to is the mean that the module's head states, and its shares are 1 in all."""
    ends = np.cumsum(steps).tolist()
    weights = data.draw(st.lists(st.floats(-1, 1), min_size=len(steps), max_size=len(steps)))
    average = data.draw(st.floats(-1, 1))  # before the first step: has no part
    for before, after, weight in zip([0, *ends], ends, weights, strict=False):
        average += share_of_step(before, after, half_life) * (weight - average)

    def kept(tokens: int) -> float:
        return -math.expm1(-tokens * math.log(2) / half_life)

    total = kept(ends[-1])
    older = [kept(ends[-1] - before) - kept(ends[-1] - after) for before, after in zip([0, *ends], ends, strict=False)]
    assert sum(older) == pytest.approx(total, rel=1e-9)
    expected = sum(weight * share for weight, share in zip(weights, older, strict=True)) / total
    assert average == pytest.approx(expected, rel=1e-6, abs=1e-9)


def averages_of(checkpoint: Path) -> dict[str, Tensor]:
    return read_tensors(checkpoint.glob("ema-*"))


def test_a_run_keeps_it_and_trains_and_is_measured_as_stated(tmp_path: Path, data: Path) -> None:
    """On two ranks: weights and losses as without it; the average as its closed form; evaluations of it."""
    every = ("--checkpoint.every_steps=1", "--checkpoint.keep_last=20", "--run.max_steps=7", "--eval.every_steps=3")
    train(2, tmp_path, tiny_arguments(tmp_path, data, "without", *every))
    train(2, tmp_path, tiny_arguments(tmp_path, data, "with", *every, *KEEP, "--eval.weights=ema"))
    without, kept = run_of(tmp_path, "without"), run_of(tmp_path, "with")

    assert losses(kept) == losses(without)
    checkpoints = dict(list_checkpoints(kept.checkpoints))
    for step, path in list_checkpoints(without.checkpoints):
        found = weights_hashes(checkpoints[step])
        assert weights_hashes(path).items() <= found.items()
        assert sum(name.startswith("ema:") for name in found) == sum(name.startswith("weights:") for name in found)

    after = [read_tensors(checkpoints[step].glob("weights-*")) for step in range(1, 8)]
    older = [2.0 ** (-512 * (7 - n) / HALF_LIFE) for n in range(1, 8)]
    for name, average in averages_of(checkpoints[7]).items():
        expected = sum(share * weights[name].double() for share, weights in zip(older, after, strict=True)) / sum(older)
        torch.testing.assert_close(average.double(), expected, rtol=1e-5, atol=1e-7)
    assert read_checkpoint_manifest(checkpoints[7])["ema"] == {"half_life_tokens": HALF_LIFE, "start_tokens": 0}

    # the recorded losses are those of the averaged weights, which commands load, also of weights kept for good
    recorded = {r["step"]: r for r in read_metrics(kept.metrics) if "val_loss" in r}
    assert {r.get("weights") for r in recorded.values()} == {"ema"} and set(recorded) == {0, 3, 6, 7}
    for checkpoint in (checkpoints[7], keep_weights(checkpoints[7], 7)):
        loaded = load_checkpoint(checkpoint, weights="ema")
        assert loaded.facts["weights"] == "exponential average with a half-life of 1,500 tokens"
        assert loss_of(loaded.model, data) == pytest.approx(recorded[7]["val_loss"], rel=1e-5)
        assert abs(loss_of(load_model(checkpoint), data) - recorded[7]["val_loss"]) > 1e-3
    with pytest.raises(UserError, match="has no exponential average"):
        load_checkpoint(without.path, weights="ema")


def loss_of(model: GPT, data: Path) -> float:
    windows, sizes = Windows(TokenSet.open(data).split("val"), 16), np.ones(257, dtype=np.int32)
    options: dict[str, Any] = {"window_count": 16, "micro_batch": 4}
    return evaluate_loss(model, windows, sizes, start_ranks("cpu"), dtype="fp32", **options).loss


def test_a_run_killed_on_two_ranks_resumes_to_the_bit(tmp_path: Path, data: Path) -> None:
    more = (*KEEP, "--eval.weights=ema", "--schedule.kind=constant", "--checkpoint.every_steps=2")
    group = start_ranks_training(2, tmp_path, tiny_arguments(tmp_path, data, "cut", *more, "--run.max_steps=100000"))
    cut, calm = run_of(tmp_path, "cut"), run_of(tmp_path, "calm")
    while not list_checkpoints(cut.checkpoints) or len(losses(cut)) < 5:
        assert group.processes[0].is_alive()
    group.kill()
    end = f"--run.max_steps={max(losses(cut)) + 4}"
    for run in (cut, calm):
        train(2, tmp_path, tiny_arguments(tmp_path, data, run.path.name, *more, end))
    assert curve(cut) == curve(calm)
    ends = [weights_hashes(list_checkpoints(run.checkpoints)[0][1]) for run in (cut, calm)]
    assert ends[0] == ends[1] and any(name.startswith("ema:") for name in ends[0])


def build(ranks: Ranks, *, shard: bool) -> tuple[Few, torch.optim.Optimizer, WeightAverage]:
    model = Few()
    optimizer = build_optimizer(model, OptimConfig(lr=0.01, shard=shard), ranks)
    average = build_weight_average(model, optimizer, HALF_LIFE, ranks, 0)
    return model, optimizer, average


def resume_learn_and_save(folder: Path, world_size: int) -> list[int]:
    """Resume what one rank less has saved, learn once more, save; return how many averaged tensors are here.

    First with a whole optimizer, then with a sharded one.
    """
    ranks = start_ranks("cpu")
    owned = [resume_and_save(folder / kind, world_size, ranks, shard=kind == "sharded") for kind in KINDS]
    ranks.close()
    return owned


def resume_and_save(folder: Path, world_size: int, ranks: Ranks, *, shard: bool) -> int:
    model, optimizer, average = build(ranks, shard=shard)
    progress = load_training_state(folder / f"step-{world_size:08d}", model, optimizer, average)
    learn(model, optimizer, progress.step)
    average.update(progress.tokens, progress.tokens + 512)
    own = {name: p.detach().clone() for name, p in model.named_parameters()}
    with average.in_place():
        for name, p in model.named_parameters():
            assert not p.equal(own[name]), name
            if name in average.tensors:
                assert average.tensors[name].equal(own[name])
    assert all(p.equal(own[name]) for name, p in model.named_parameters())
    writer = CheckpointWriter(folder, ranks, model, optimizer, average=average)
    writer.save(Progress(progress.step + 1, progress.tokens + 512), FACTS)
    return len(average.tensors)


def test_it_is_the_same_to_the_bit_on_any_number_of_ranks(tmp_path: Path) -> None:
    ranks = start_ranks("cpu")
    model, optimizer, average = build(ranks, shard=False)
    for step in range(2):
        learn(model, optimizer, step)
        average.update(512 * step, 512 * step + 512)
    for kind in KINDS:
        writer = CheckpointWriter(tmp_path / kind, ranks, model, optimizer, average=average)
        writer.save(Progress(2, 1024), FACTS)
    for world_size in (2, 3, 4):
        owned = run_ranks(world_size, tmp_path / "store", resume_learn_and_save, tmp_path, world_size)
        assert np.sum(owned, axis=0).tolist() == [3, 3]
        learn(model, optimizer, world_size)
        average.update(512 * world_size, 512 * world_size + 512)
        for kind in KINDS:
            last = list_checkpoints(tmp_path / kind)[0][1]
            found = averages_of(last)
            assert found.keys() == average.tensors.keys()
            assert all(found[name].equal(tensor) for name, tensor in average.tensors.items())
    model, optimizer, back = build(ranks, shard=False)  # and back on a single rank
    load_training_state(last, model, optimizer, back)
    assert all(back.tensors[name].equal(tensor) for name, tensor in average.tensors.items())


def test_it_starts_where_a_checkpoint_has_none(tmp_path: Path) -> None:
    ranks = start_ranks("cpu")
    model, optimizer, average = build(ranks, shard=False)
    learn(model, optimizer, 0)
    checkpoint = CheckpointWriter(tmp_path, ranks, model, optimizer).save(Progress(1, 512), FACTS)
    load_training_state(checkpoint, model, optimizer, average)
    assert average.start_tokens == 512
    assert all(average.tensors[name].equal(p) for name, p in model.named_parameters())


def test_it_is_counted_in_memory_and_on_disk(tmp_path: Path) -> None:
    config = Config(optim=OptimConfig(ema_half_life_tokens=1))
    full = average_bytes(config)
    assert average_bytes(Config()) == 0
    assert full == 4 * 124_475_904  # with the vocabulary padded to 50,304
    assert full / 4 <= average_bytes(config, 4) < full / 4 * 1.3

    def estimate(size: int) -> int:
        sizes: dict[str, Any] = {"micro_batch": 1, "recompute_every": 0, "optimizer_bytes": 0, "average_bytes": size}
        return memory_estimate(preset_config("gpt2-124m"), dtype="fp32", **sizes).to_come

    assert estimate(full) - estimate(0) == full

    model, optimizer, average = build(start_ranks("cpu"), shard=False)
    learn(model, optimizer, 0)
    told, told_weights = checkpoint_bytes(model, optimizer, average)
    plain, plain_weights = checkpoint_bytes(model, optimizer)
    weights = sum(p.nbytes for p in model.parameters())
    assert weights <= told - plain == told_weights - plain_weights <= weights + 256 * 3
    writer = CheckpointWriter(tmp_path, start_ranks("cpu"), model, optimizer, average=average)
    path = writer.save(Progress(1, 512), FACTS)
    assert sum(file.stat().st_size for file in path.iterdir()) <= told


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: OptimConfig(ema_half_life_tokens=0), "use a positive number of tokens"),
        (lambda: Config(eval=EvalConfig(weights="ema"), model=ModelSection()), "set optim.ema_half_life_tokens"),
    ],
)
def test_what_cant_be_is_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
