"""The room that a run's checkpoints take is known before the first step."""

import json
import re
import resource
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from model.ranks import start_ranks
from tests.helpers.manifests import FACTS, WHOLE
from tests.helpers.mounts import small_disk
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import losses, run_of, tiny_arguments, train, train_by_path
from tests.model.small import small_model
from train.checkpoints.disk_space import check_space, needed_bytes
from train.checkpoints.ownership import checkpoint_bytes
from train.checkpoints.retention import Checkpoint, delete, expendable, keep_weights, set_aside_expendable
from train.checkpoints.writer import CheckpointWriter
from train.optimization.optimizer import build_optimizer
from train.progress import Progress
from train.settings.sections import CheckpointConfig, OptimConfig


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_token_set(folder, train_tokens=2_001, val_tokens=500)
    return folder


def bytes_in(folder: Path) -> int:
    """As a disk counts them: a file with two names once."""
    return sum({path.stat().st_ino: path.stat().st_size for path in folder.rglob("*") if path.is_file()}.values())


def test_a_checkpoints_size_is_known_before_it_is_written(tmp_path: Path) -> None:
    model = small_model()
    optimizer = build_optimizer(model, OptimConfig())
    told, told_weights = checkpoint_bytes(model, optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    path = CheckpointWriter(tmp_path, start_ranks("cpu"), model, optimizer).save(Progress(1), FACTS)
    margin = 65_536 + 256 * 4 * len(list(model.parameters()))
    assert told - margin < bytes_in(path) <= told
    weights = sum(file.stat().st_size for file in path.glob("weights-*"))
    assert told_weights - margin < weights <= told_weights


@given(
    every=st.integers(1, 4),
    keep_last=st.integers(1, 3),
    keep_every=st.integers(0, 6),
    keep_best=st.booleans(),
    weights_each=st.integers(0, 2),
    first_save=st.integers(0, 3),
    saves=st.integers(1, 6),
    losses=st.lists(st.floats(0, 9), min_size=20, max_size=20),
)
def test_no_run_takes_more_than_was_planned(
    every, keep_last, keep_every, keep_best, weights_each, first_save, saves, losses
) -> None:
    """By making the very folders that a run would: any losses, resumed anywhere."""
    config = CheckpointConfig(
        every_steps=every,
        keep_last=keep_last,
        keep_every_steps=keep_every,
        keep_best=keep_best,
        weights_every_steps=weights_each * every,
    )
    optimizer_bytes, weights_bytes, manifest_bytes = 200_000, 100_000, 4_000

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)

        def save(step: int) -> Path:
            path = folder / f"step-{step:08d}"
            path.mkdir()
            files = {"weights-0.safetensors": weights_bytes, "optimizer-0.safetensors": optimizer_bytes}
            for name, size in files.items():
                with open(path / name, "wb") as file:
                    file.truncate(size)
            listed = {name: {"bytes": size, "sha256": "0" * 64} for name, size in files.items()}
            measured = {"val_loss": losses[step // every % 20], "val_step": step}
            (path / "checkpoint.json").write_text(json.dumps({**WHOLE, "files": listed, **measured}))
            return path

        def keep(step: int) -> Path:
            path = save(step)
            if config.weights_every_steps and step % config.weights_every_steps == 0:
                keep_weights(path, step)
            return path

        first = first_save * every
        existing = [step for step in (first - every, first) if step > 0]
        resumed_from = [keep(step) for step in existing][-1] if first else None
        before, most = bytes_in(folder), 0
        planned = needed_bytes(
            config,
            existing=existing,
            first_step=first,
            max_steps=first + saves * every,
            checkpoint_bytes=weights_bytes + optimizer_bytes + manifest_bytes,
            weights_bytes=weights_bytes + manifest_bytes,
        )
        for step in range(first + every, first + saves * every + 1, every):
            keep(step)
            most = max(most, bytes_in(folder))
            delete(set_aside_expendable(folder, config, last=step, resumed_from=resumed_from))
        assert most - before <= planned
        # nor is a run refused that needs much less: at most the best one's place and a resumed one's are to spare
        assert planned <= most - before + 2 * (weights_bytes + optimizer_bytes + manifest_bytes)


def simulated(config: CheckpointConfig, existing: list[int], first_step: int, max_steps: int, sizes: tuple[int, int]):
    """What is taken at most, by going through every save to come under the rules of retention."""
    every = config.every_steps or max_steps
    without_best = replace(config, keep_best=False)  # which may be any: it takes a place of its own at worst
    whole, ever = set(existing), set(existing)
    weights_at = [config.weights_every_steps] if config.weights_every_steps else []
    weights = {step for step in whole for each in weights_at if step % each == 0}

    def taken() -> int:
        count = min(len(ever), len(whole) + config.keep_best)
        return count * sizes[0] + len(weights - whole) * sizes[1]

    before = most = len(whole) * sizes[0]
    for step in [*range(first_step - first_step % every + every, max_steps, every), max_steps]:
        whole.add(step)
        ever.add(step)
        weights |= {step for each in weights_at if step % each == 0}
        most = max(most, taken())
        whole -= expendable([Checkpoint(step) for step in whole], without_best, first_step)
    return max(most, taken()) - before


@given(
    every=st.integers(0, 4),
    keep_last=st.integers(1, 5),
    keep_every=st.integers(0, 12),
    keep_best=st.booleans(),
    weights_each=st.integers(0, 3),
    existing=st.sets(st.integers(1, 20), max_size=8),
    first_step=st.integers(0, 20),
    more_steps=st.integers(1, 60),
    sizes=st.sampled_from([(1000, 1), (1000, 400), (7, 6)]),
)
def test_the_plan_is_what_every_save_to_come_would_take(
    every, keep_last, keep_every, keep_best, weights_each, existing, first_step, more_steps, sizes
) -> None:
    config = CheckpointConfig(
        every_steps=every,
        keep_last=keep_last,
        keep_every_steps=keep_every,
        keep_best=keep_best,
        weights_every_steps=weights_each * every,
    )
    there = [step for step in existing if step <= first_step]
    planned = needed_bytes(
        config,
        existing=there,
        first_step=first_step,
        max_steps=first_step + more_steps,
        checkpoint_bytes=sizes[0],
        weights_bytes=sizes[1],
    )
    assert planned == simulated(config, there, first_step, first_step + more_steps, sizes)


def test_a_run_without_an_end_is_planned_without_going_through_it() -> None:
    config = CheckpointConfig(every_steps=10, keep_last=10**9, keep_every_steps=1000, weights_every_steps=100)
    steps = 10**15
    planned = needed_bytes(
        config, existing=[], first_step=0, max_steps=steps, checkpoint_bytes=10**6, weights_bytes=10**3
    )
    whole = 10**9 + 1 + 1 + (steps - 10**10) // 1000  # newest, best, the one being written, and those that stay
    assert planned / 10**6 == pytest.approx(whole + (steps / 100 - steps / 1000) / 1000, rel=1e-4)


def test_a_disk_too_small_for_the_plan_is_refused_before_the_first_step(tmp_path: Path, data: Path) -> None:
    run = run_of(tmp_path, "small")
    with small_disk(run.checkpoints, 1000):
        done = train_by_path(*tiny_arguments(tmp_path, data, "small"))
        assert done.returncode == 2, done
        pattern = (
            r"error: .*/small/checkpoints: the run's checkpoints need ([\d,]+) bytes \(.* each\), "
            r"but only ([\d,]+) are free"
        )
        found = re.search(pattern, done.stderr)
        assert found
        needed, free = (int(number.replace(",", "")) for number in found.groups())
        assert needed > 1_024_000 >= free
        assert losses(run) == {}
        train(1, tmp_path, tiny_arguments(tmp_path, data, "small", "--checkpoint.every_steps=0"))  # which needs less


def test_a_checkpoint_that_a_limit_forbids_is_refused_though_bytes_are_free(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        check_space(tmp_path, CheckpointConfig(), first_step=0, max_steps=10, sizes=(1_000_000, 1))
        with pytest.raises(UserError, match=r"File too large: a checkpoint of 1,000,001 bytes can't be written"):
            check_space(tmp_path, CheckpointConfig(), first_step=0, max_steps=10, sizes=(1_000_001, 1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []
