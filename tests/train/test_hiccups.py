"""A shared file system that fails for a moment costs nothing; one that stays away ends the run, to be started again."""

import errno
import json
import os
import resource
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from common import checkpoint_files
from common.checkpoint_files import list_checkpoints, verify_checkpoint
from common.metrics_file import read_json_lines, read_metrics
from common.patient_file import PatientFile
from common.publish import sha256_file
from common.run_folder import RunFolder
from tests.helpers.ranks import RankGroup
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import curve, run_of, tiny_arguments, train, train_as_rank
from train.checkpoints.resume import choose_checkpoint
from train.checkpoints.saver import CheckpointKeeper
from train.checkpoints.writer import CheckpointWriter
from train.run import storage

FOR_EVER = 10**9


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_token_set(folder, train_tokens=2_001, val_tokens=500)
    return folder


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, data: Path) -> RunFolder:
    folder = tmp_path_factory.mktemp("calm")
    train(2, folder, tiny_arguments(folder, data, "calm"))
    return run_of(folder, "calm")


def fail(call: str, part: str, code: int, times: int) -> None:
    """Let a call of the system fail so many times where the path it is about has `part` in it."""
    original, left = getattr(os, call), times

    def failing(target: Any, *arguments: Any, **keywords: Any) -> Any:
        nonlocal left
        path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else os.fspath(target)
        if left and part in f"{path} {arguments[0] if call == 'replace' else ''} ":
            left -= 1
            raise OSError(code, os.strerror(code), path)
        return original(target, *arguments, **keywords)

    setattr(os, call, failing)


def train_impatiently(
    arguments: list[str], disturb: Callable[[], None], delays: tuple[float, ...] = (0.01, 0.02), **of_record: Any
) -> None:
    """A trainer that waits no seconds between its tries."""
    from train.run import recorder
    from train.startup import build_keeper

    setattr(build_keeper, "CheckpointWriter", partial(CheckpointWriter, retry_delays=delays))  # noqa: B010
    setattr(build_keeper, "CheckpointKeeper", partial(CheckpointKeeper, retry_delays=(0.01, 0.02)))  # noqa: B010
    setattr(storage, "RETRY_DELAYS", (0.01, 0.02))  # noqa: B010
    setattr(recorder, "PatientFile", partial(PatientFile, **{"retry_seconds": 0.0, **of_record}))  # noqa: B010
    disturb()
    train_as_rank(arguments)


def state_of(run: RunFolder) -> dict[str, Any]:
    return run.read_state() or {}


@pytest.mark.parametrize(
    ("call", "part", "code", "times"),
    [
        ("mkdir", ".step-00000010.", errno.EIO, 2),
        ("fsync", "weights-00001-of", errno.ESTALE, 2),
        ("fsync", "checkpoint.json", errno.EIO, 1),
        ("replace", "/step-00000010 ", errno.EDQUOT, 2),
        ("fsync", "/checkpoints ", errno.EIO, 1),  # after the rename
        ("fsync", "metrics.jsonl", errno.EIO, 1),
        ("fsync", "/state.", errno.EIO, 1),
        ("fsync", "/config.yaml.", errno.EIO, 2),  # before the first step
        ("replace", "/provenance.json ", errno.ESTALE, 1),
    ],
)
@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_call_that_fails_for_a_moment_costs_nothing(
    tmp_path: Path, data: Path, calm: RunFolder, call: str, part: str, code: int, times: int, asynchronous: str
) -> None:
    arguments = tiny_arguments(tmp_path, data, "hiccup", f"--checkpoint.asynchronous={asynchronous}")
    disturb = partial(fail, call, part, code, times)
    assert RankGroup(2, tmp_path / "store", train_impatiently, arguments, disturb).join() == [0, 0]
    run = run_of(tmp_path, "hiccup")
    assert state_of(run)["status"] == "done" and "trouble" not in state_of(run)
    assert curve(run) == curve(calm)
    saves = [record for record in read_metrics(run.metrics) if str(record.get("kind")).startswith("save")]
    assert [(record["kind"], record["step"]) for record in saves] == [("save", step) for step in (5, 10, 15, 20)]
    for _, path in list_checkpoints(run.checkpoints):
        verify_checkpoint(path)
    assert not list(run.checkpoints.glob(".*"))
    if not part.startswith(("/state", "/config", "/provenance")):  # before there is a log, or beside it
        assert os.strerror(code) in run.log.read_text(), "and is told"


def remember_troubles(told: Path) -> None:
    write = RunFolder.write_state

    def remembering(folder: RunFolder, *arguments: Any, **values: Any) -> bool:
        with open(told, "a") as file:
            file.write(json.dumps(values.get("trouble", "")) + "\n")
        return write(folder, *arguments, **values)

    setattr(RunFolder, "write_state", remembering)  # noqa: B010


def stay_away(told: Path, part: str, times: int) -> None:
    remember_troubles(told)
    fail("fsync", part, errno.EIO, times)


def test_a_file_system_that_stays_away_is_told_at_once_and_ends_the_run_after_some_saves(
    tmp_path: Path, data: Path, calm: RunFolder
) -> None:
    arguments, told = tiny_arguments(tmp_path, data, "away", "--run.max_steps=40"), tmp_path / "told"
    disturb = partial(stay_away, told, "/.step-", FOR_EVER)
    assert RankGroup(2, tmp_path / "store", train_impatiently, arguments, disturb).join() == [2, 2]
    run = run_of(tmp_path, "away")
    state, records = state_of(run), read_json_lines(run.metrics)
    assert (state["status"], state["failure"], state["step"]) == ("failed", "storage", 0)
    assert "step 15 could not be saved" in state["reason"] and "3 saves in a row have failed" in state["reason"]
    assert [record["step"] for record in records if record.get("kind") == "save_failed"] == [5, 10, 15]
    assert max(record["step"] for record in records) < 25
    troubles = [json.loads(line) for line in told.read_text().splitlines()]
    assert any("step 5 could not be saved" in trouble for trouble in troubles)
    assert "Traceback" not in run.log.read_text()
    train(2, tmp_path, tiny_arguments(tmp_path, data, "away"))
    assert curve(run) == curve(calm)


@pytest.mark.parametrize(("times", "code"), [(2, 0), (3, 2)])
def test_the_last_save_is_tried_three_times(tmp_path: Path, data: Path, times: int, code: int) -> None:
    arguments = tiny_arguments(tmp_path, data, "last", "--checkpoint.every_steps=0", "--run.max_steps=5")
    disturb = partial(fail, "fsync", "weights-00000-of", errno.EIO, times)
    group = RankGroup(1, tmp_path / "store", train_impatiently, arguments, disturb, ())
    assert group.join() == [code]
    run = run_of(tmp_path, "last")
    assert [step for step, _ in list_checkpoints(run.checkpoints)] == ([] if code else [5])
    assert run.log.read_text().count("WARNING: step 5 could not be saved") == times
    if code:
        assert (state_of(run)["status"], state_of(run)["failure"]) == ("failed", "storage")


def limit_files_between(first: int, last: int, size: int) -> None:
    """No file may grow beyond a size while these steps are recorded: metrics.jsonl can't, in the middle of a line."""
    from train.run.recorder import Recorder

    step = Recorder.step

    def limited(recorder: Recorder, record: dict[str, Any]) -> None:
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (size if first <= record["step"] <= last else unlimited, unlimited))
        step(recorder, record)

    setattr(Recorder, "step", limited)  # noqa: B010


def test_records_wait_for_their_file_and_no_checkpoint_goes_before_them(
    tmp_path: Path, data: Path, calm: RunFolder
) -> None:
    arguments = tiny_arguments(tmp_path, data, "records")
    disturb = partial(limit_files_between, 3, 7, 1500)
    assert RankGroup(2, tmp_path / "store", train_impatiently, arguments, disturb).join() == [0, 0]
    run = run_of(tmp_path, "records")
    assert curve(run) == curve(calm)
    lines = read_json_lines(run.metrics)
    assert [record["step"] for record in lines if "loss" in record] == list(range(1, 21)), "in order, none twice"
    log = run.log.read_text()
    assert f"WARNING: {run.metrics} can't be written: File too large: records wait in memory" in log
    assert log.index("wait in memory") < log.index("all records are written")
    assert [record["step"] for record in lines if record.get("kind") == "save_failed"] == [5]


def test_records_that_memory_cannot_hold_end_the_run_on_all_ranks(tmp_path: Path, data: Path) -> None:
    arguments = tiny_arguments(tmp_path, data, "full", "--run.max_steps=1000", "--checkpoint.every_steps=0")
    disturb = partial(limit_files_between, 3, 1000, 1500)
    group = RankGroup(2, tmp_path / "store", partial(train_impatiently, most_bytes=100_000), arguments, disturb)
    assert group.join() == [2, 2]
    state = state_of(run_of(tmp_path, "full"))
    assert (state["status"], state["failure"]) == ("failed", "storage")
    assert "metrics.jsonl can't be written: File too large, and the memory for records is full" in state["reason"]


@pytest.mark.parametrize(("refusals", "resumed"), [(2, 10), (3, 5)])
def test_a_checkpoint_that_can_not_be_read_for_a_moment_is_not_passed_over(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, refusals: int, resumed: int
) -> None:
    train(1, tmp_path, tiny_arguments(tmp_path, data, "run", "--run.max_steps=10"))
    run, left, read = run_of(tmp_path, "run"), refusals, sha256_file

    def refuse(path: Path | str) -> str:
        nonlocal left
        if left and "step-00000010" in str(path):
            left -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return read(path)

    monkeypatch.setattr(checkpoint_files, "sha256_file", refuse)
    monkeypatch.setattr(storage, "RETRY_DELAYS", (0.0, 0.0))
    chosen, passed_over = choose_checkpoint("auto", run)
    assert chosen is not None and chosen.name == f"step-{resumed:08d}"
    assert len(passed_over) == (resumed == 5)
