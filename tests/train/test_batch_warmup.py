"""Runs whose batch grows: what each step reads and records, killed, resumed, on another number of ranks."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from common.checkpoint_files import list_checkpoints, read_checkpoint_manifest, write_checkpoint_manifest
from common.errors import UserError
from common.metrics_file import read_metrics
from common.run_folder import RunFolder
from tests.helpers.ranks import RankGroup
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import (
    curve,
    losses,
    run_of,
    slow_down_forwards,
    tiny_arguments,
    train,
    train_as_rank,
    weights_hashes,
)
from train.checkpoints.resume import check_same_run

SIZES = [128] * 5 + [256] * 4 + [512] * 7  # tokens of each step
WARMUP = "--batch.warmup=[[0, 128], [640, 256], [1664, 512]]"
STOPPED_AT = 7  # in the middle of the second stage
MORE = (WARMUP, f"--run.max_steps={len(SIZES)}", f"--checkpoint.every_steps={STOPPED_AT}", "--checkpoint.keep_last=9")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_token_set(folder, train_tokens=20_001, val_tokens=500)
    return folder


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, data: Path) -> RunFolder:
    """An undisturbed run on two ranks."""
    folder = tmp_path_factory.mktemp("calm")
    train(2, folder, tiny_arguments(folder, data, "calm", *MORE))
    return run_of(folder, "calm")


def train_slowly(arguments: list[str]) -> None:
    slow_down_forwards(0.05)  # so that it does not end before it is killed
    train_as_rank(arguments)


def test_each_step_reads_its_stages_tokens_and_the_last_has_the_final_rate(calm: RunFolder) -> None:
    records = [record for record in read_metrics(calm.metrics) if "loss" in record]
    tokens = [record["tokens"] for record in records]
    assert [late - early for early, late in zip([0, *tokens], tokens, strict=False)] == SIZES
    assert [len(record["sequences"]) * 16 for record in records] == SIZES
    read = [number for record in records for number in record["sequences"]]
    assert len(set(read)) == len(read)  # within the first epoch, none twice
    assert records[-1]["lr"] == pytest.approx(1e-2 * 0.1)
    assert read_checkpoint_manifest(list_checkpoints(calm.checkpoints)[0][1])["sequences"] == sum(SIZES) // 16
    log = calm.log.read_text(encoding="utf-8")
    assert "batch warm-up: 128 tokens a step from step 1, 256 tokens a step from step 6" in log
    assert f"the run reads {sum(SIZES):,}, " in log


def test_killed_in_the_middle_of_a_stage_it_ends_as_undisturbed(tmp_path: Path, data: Path, calm: RunFolder) -> None:
    group = RankGroup(2, tmp_path / "store", train_slowly, tiny_arguments(tmp_path, data, "cut", *MORE))
    cut = run_of(tmp_path, "cut")
    while not list_checkpoints(cut.checkpoints) or len(losses(cut)) <= STOPPED_AT:
        assert group.processes[0].is_alive()
    group.kill()
    for step, path in list_checkpoints(cut.checkpoints):
        if step > STOPPED_AT:  # the machine was slow to kill it
            shutil.rmtree(path)
    shutil.copytree(cut.path, cut.path.with_name("single"))

    train(2, tmp_path, tiny_arguments(tmp_path, data, "cut", *MORE))
    assert curve(cut) == curve(calm)
    ends = [weights_hashes(list_checkpoints(run.checkpoints)[0][1]) for run in (cut, calm)]
    assert ends[0] == ends[1]

    train(1, tmp_path, tiny_arguments(tmp_path, data, "single", *MORE))
    single = run_of(tmp_path, "single")
    assert losses(single) == pytest.approx(losses(calm), abs=1e-5)
    read = [[r["sequences"] for r in read_metrics(run.metrics) if "sequences" in r] for run in (single, calm)]
    assert read[0] == read[1]


def test_another_batch_than_the_checkpoints_is_refused(calm: RunFolder, tmp_path: Path) -> None:
    checkpoint = list_checkpoints(calm.checkpoints)[0][1]
    manifest: Any = read_checkpoint_manifest(checkpoint)
    grows, identity = dict(manifest["config"]), str(manifest["data_identity"])
    batch = dict(grows["batch"])
    stays = {**grows, "batch": {**batch, "warmup": []}}
    del batch["warmup"]  # as a version wrote it that had no stages
    older = {**manifest, "config": {**grows, "batch": batch}}
    write_checkpoint_manifest(tmp_path, older)

    for path, config, words in (
        (checkpoint, stays, r"batch\.warmup \[\[0, 128\].*this run has \[\]"),
        (tmp_path, grows, r"batch\.warmup \[\], this run has \[\[0, 128\]"),
    ):
        with pytest.raises(UserError, match=words):
            check_same_run(path, config, identity, [], optimizer="adamw")
        check_same_run(path, config, identity, ["batch.warmup"], optimizer="adamw")
    check_same_run(tmp_path, stays, identity, [], optimizer="adamw")
