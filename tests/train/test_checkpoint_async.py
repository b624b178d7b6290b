"""Saving beside training: the same bytes as a save that training waits for, one at a time, published by agreement."""

import hashlib
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from common.checkpoint_files import OWN_HASH, list_checkpoints, read_checkpoint_manifest, verify_checkpoint
from common.metrics_file import read_metrics
from model.ranks import start_ranks
from model.weights import save_tensors
from tests.helpers.manifests import FACTS
from tests.helpers.ranks import RankGroup, run_ranks
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import curve, run_of, tiny_arguments, train, train_as_rank
from train.checkpoints import background_write as background_save
from train.checkpoints.writer import CheckpointWriter
from train.errors import LockLost
from train.progress import Progress


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_token_set(folder, train_tokens=2_001, val_tokens=500)
    return folder


def file_hashes(checkpoint: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in checkpoint.glob("*.safetensors")}


def write_only_after(patch: pytest.MonkeyPatch, wait: Callable[[], object]) -> None:
    """A disk that takes nothing before `wait` returns."""

    def late(path: Path, tensors: Any) -> None:
        wait()
        save_tensors(path, tensors)

    patch.setattr(background_save, "save_tensors", late)


def train_with_late_writes(arguments: list[str], release: Path) -> None:
    """A trainer whose disk takes nothing until a file appears: training goes on meanwhile, or the file never does."""

    def wait() -> None:
        while not release.exists():
            threading.Event().wait(0.01)

    write_only_after(pytest.MonkeyPatch(), wait)
    train_as_rank(arguments)


def test_training_goes_on_beside_a_slow_save_and_the_files_are_those_of_a_save_waited_for(
    tmp_path: Path, data: Path
) -> None:
    more = ("--checkpoint.keep_last=10", "--checkpoint.every_steps=4", "--run.max_steps=10", "--eval.every_steps=4")
    train(2, tmp_path, tiny_arguments(tmp_path, data, "waited-for", *more, "--checkpoint.asynchronous=false"))
    release = tmp_path / "release"
    arguments = tiny_arguments(tmp_path, data, "beside", *more)
    group = RankGroup(2, tmp_path / "store", train_with_late_writes, arguments, release)
    run, expected = run_of(tmp_path, "beside"), run_of(tmp_path, "waited-for")
    # steps 5 to 8 are trained while step 4's files wait; the second save, after step 8, waits for the first
    while not (records := read_metrics(run.metrics)) or not any(r["step"] == 8 and "val_loss" in r for r in records):
        assert group.processes[0].is_alive()
        threading.Event().wait(0.02)
    assert list_checkpoints(run.checkpoints) == []
    assert len(list(run.checkpoints.glob(".step-*.tmp"))) == 1
    assert max(record["step"] for record in records) == 8
    release.touch()
    assert group.join() == [0, 0]
    assert curve(run) == curve(expected)
    for (step, found), (_, wanted) in zip(
        list_checkpoints(run.checkpoints), list_checkpoints(expected.checkpoints), strict=True
    ):
        assert file_hashes(found) == file_hashes(wanted), step
        told, meant = ({**read_checkpoint_manifest(path), "config": None, OWN_HASH: None} for path in (found, wanted))
        assert told == meant  # the validation loss, too, is that of the step
        verify_checkpoint(found)
    saves = [record for record in read_metrics(run.metrics) if record.get("kind") == "save"]
    assert [record["step"] for record in saves] == [4, 8, 10]
    assert all({"save_blocked_seconds", "save_seconds", "save_bytes", "time"} <= set(record) for record in saves)


def settle_at_once_where_one_share_is_late(folder: Path) -> list[list[int]]:
    """Rank 1's share is late: what the ranks agree on before, and after."""
    ranks = start_ranks("cpu")
    release = threading.Event()
    if ranks.rank == 1:
        write_only_after(pytest.MonkeyPatch(), release.wait)
    model = torch.nn.Linear(64, 64)
    writer = CheckpointWriter(folder, ranks, model, torch.optim.AdamW(model.parameters()))
    writer.begin(Progress(1, 2, 3), FACTS)
    if ranks.rank == 0:
        writer._pending.writing._thread.join()  # rank 0 has written, and knows that it hasn't all
    before = ranks.agree(writer.flags())
    release.set()
    writer.finish()
    after = ranks.agree(writer.flags())
    ranks.close()
    return [before, after]


def test_a_share_that_is_late_on_one_rank_is_waited_for_by_all(tmp_path: Path) -> None:
    answers = run_ranks(2, tmp_path / "store", settle_at_once_where_one_share_is_late, tmp_path / "checkpoints")
    assert answers == [[[1, 0], [0, 0]]] * 2
    ((_, checkpoint),) = list_checkpoints(tmp_path / "checkpoints")
    assert json.loads((checkpoint / "checkpoint.json").read_text())["sequences"] == 3


def publish_without_the_lock(folder: Path) -> str:
    ranks = start_ranks("cpu")
    model = torch.nn.Linear(4, 4)
    answers = iter([True, False])
    lock = (lambda: next(answers)) if ranks.is_first else (lambda: False)  # only rank 0 is asked
    writer = CheckpointWriter(folder, ranks, model, torch.optim.AdamW(model.parameters()), lock)
    writer.save(Progress(1), FACTS)
    (folder.parent / "lock").touch()  # another's
    try:
        writer.save(Progress(2), FACTS)
    except LockLost as error:
        return str(error)
    finally:
        ranks.close()
    return "published"


def test_nothing_is_published_once_the_lock_is_lost(tmp_path: Path) -> None:
    answers = run_ranks(2, tmp_path / "store", publish_without_the_lock, tmp_path / "checkpoints")
    assert (
        answers
        == [f"step 2 is not published: {tmp_path} has been taken over by another trainer: this one leaves it as it is"]
        * 2
    )
    assert [step for step, _ in list_checkpoints(tmp_path / "checkpoints")] == [1]


def test_a_snapshot_is_untouched_by_what_follows_and_its_memory_is_used_again(tmp_path: Path) -> None:
    ranks = start_ranks("cpu")
    model = torch.nn.Linear(64, 64)
    release = threading.Event()
    writer = CheckpointWriter(tmp_path, ranks, model, torch.optim.AdamW(model.parameters()))
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        write_only_after(patch, release.wait)
        model.weight.fill_(1.0)
        writer.begin(Progress(1), FACTS)
        model.weight.fill_(2.0)
        release.set()
        first = writer.finish().path
        addresses = [tensor.data_ptr() for tensors in writer._buffers.values() for tensor in tensors.values()]
        second = writer.save(Progress(2), FACTS)
    assert addresses == [tensor.data_ptr() for tensors in writer._buffers.values() for tensor in tensors.values()]
    from safetensors.torch import load_file

    for path, value in ((first, 1.0), (second, 2.0)):
        assert (load_file(path / "weights-00000-of-00001.safetensors")["weight"] == value).all()


def test_an_error_that_is_no_disks_fault_is_raised_and_publishes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path, tensors: Any) -> None:
        raise AssertionError("an invariant")

    monkeypatch.setattr(background_save, "save_tensors", broken)
    model = torch.nn.Linear(4, 4)
    writer = CheckpointWriter(tmp_path, start_ranks("cpu"), model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(AssertionError, match="an invariant"):
        writer.save(Progress(1), FACTS)
    assert list_checkpoints(tmp_path) == []


def train_noting_what_is_synced(arguments: list[str], metrics: Path, notes: Path) -> None:
    """A trainer that notes, whenever a checkpoint gets its name, how much of the record a power cut would leave."""
    synced = 0
    fsync, replace = os.fsync, os.replace

    def noting_fsync(descriptor: int) -> None:
        nonlocal synced
        status = os.fstat(descriptor)
        fsync(descriptor)
        if metrics.exists() and os.path.samestat(status, metrics.stat()):
            synced = status.st_size

    def noting_replace(source: Path, target: Path) -> None:
        replace(source, target)
        if target.name.startswith("step-"):
            with open(notes, "a") as file:
                file.write(f"{target.name} {synced}\n")

    patch = pytest.MonkeyPatch()
    patch.setattr(os, "fsync", noting_fsync)
    patch.setattr(os, "replace", noting_replace)
    train_as_rank(arguments)


def test_no_checkpoint_outlives_the_record_of_its_steps(tmp_path: Path, data: Path) -> None:
    """After a power cut a run goes on from its newest checkpoint: the steps before it must be in metrics.jsonl."""
    run, notes = run_of(tmp_path, "noted"), tmp_path / "notes.txt"
    arguments = tiny_arguments(tmp_path, data, "noted")
    assert RankGroup(1, tmp_path / "store", train_noting_what_is_synced, arguments, run.metrics, notes).join() == [0]
    content = run.metrics.read_bytes()
    published = [line.split() for line in notes.read_text().splitlines()]
    assert [name for name, _ in published] == [f"step-{step:08d}" for step in (5, 10, 15, 20)]
    for name, synced in published:
        steps = [json.loads(line)["step"] for line in content[: int(synced)].splitlines()]
        assert max(steps, default=0) >= int(name.removeprefix("step-"))
