"""A disk that fills up, turns read-only or ends a file: what was saved stays whole, and the message says what to do."""

import os
import re
import resource
import time
from pathlib import Path
from typing import Any

import pytest

from common.checkpoint_files import list_checkpoints, verify_checkpoint
from common.run_folder import RunFolder
from tests.helpers.mounts import fill, read_only_from_now_on, small_disk
from tests.helpers.ranks import RankGroup
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import curve, losses, run_of, start_ranks_training, tiny_arguments, train, train_as_rank


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_token_set(folder, train_tokens=2_001, val_tokens=500)
    return folder


CHECKPOINT_KIB = 462  # of the tiny model, and the space that a file system of pages takes for it
SMALL_FILES = 65_536


def state_of(run: RunFolder) -> dict[str, Any]:
    return run.read_state() or {}


def train_with_files_limited(arguments: list[str], limit_from_step: int) -> None:
    """A trainer whose files may not grow beyond a limit after some step: a failing write that needs no special disk."""
    from train.checkpoints import saver as keeper

    begin = keeper.CheckpointKeeper.save

    def save(self, progress, **options):
        if progress.step == limit_from_step:
            self.finish()  # the save before is not what fails
            resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_FILES, resource.RLIM_INFINITY))
        elif progress.step > limit_from_step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return begin(self, progress, **options)

    setattr(keeper.CheckpointKeeper, "save", save)  # noqa: B010 (a method)
    train_as_rank(arguments)


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_failed_write_stops_all_ranks_with_one_line_and_keeps_what_was_saved(
    tmp_path: Path, data: Path, asynchronous: str
) -> None:
    more = ("--checkpoint.on_failure=stop", f"--checkpoint.asynchronous={asynchronous}")
    arguments = tiny_arguments(tmp_path, data, "limited", *more)
    run = run_of(tmp_path, "limited")
    assert RankGroup(2, tmp_path / "store", train_with_files_limited, arguments, 10).join() == [2, 2]
    assert [step for step, _ in list_checkpoints(run.checkpoints)] == [5]
    assert not list(run.checkpoints.glob(".*"))  # its leftovers are gone
    state = state_of(run)
    assert (state["status"], state["failure"]) == ("failed", "storage")
    why = r"step 10 could not be saved: .*/weights-0000\d-of-00002.safetensors: File too large"
    assert re.search(why, state["reason"])
    assert "Traceback" not in run.log.read_text()
    train(2, tmp_path, arguments)
    assert max(losses(run)) == 20


def test_training_goes_on_past_a_failed_write_if_it_may(tmp_path: Path, data: Path) -> None:
    arguments = tiny_arguments(tmp_path, data, "going-on")
    run = run_of(tmp_path, "going-on")
    assert RankGroup(2, tmp_path / "store", train_with_files_limited, arguments, 10).join() == [0, 0]
    assert [step for step, _ in list_checkpoints(run.checkpoints)] == [20, 15]
    assert re.search(r"WARNING: step 10 could not be saved: .*: File too large", run.log.read_text())
    assert state_of(run)["status"] == "done"
    train(2, tmp_path, tiny_arguments(tmp_path, data, "calm"))
    assert losses(run) == losses(run_of(tmp_path, "calm"))


@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_the_last_save_must_succeed(tmp_path: Path, data: Path, policy: str) -> None:
    arguments = tiny_arguments(tmp_path, data, "last", f"--checkpoint.on_failure={policy}")
    assert RankGroup(1, tmp_path / "store", train_with_files_limited, arguments, 20).join() == [2]
    run = run_of(tmp_path, "last")
    assert [step for step, _ in list_checkpoints(run.checkpoints)] == [15, 10]
    assert state_of(run)["status"] == "failed"
    assert "step 20 could not be saved" in state_of(run)["reason"]


def train_with_a_save_that_waits(arguments: list[str], step: int, go_on: Path) -> None:
    """A trainer that, when one save is due, has finished the one before and waits until a file appears."""
    from train.checkpoints import saver as keeper

    begin = keeper.CheckpointKeeper.save

    def save(self, progress, **options):
        if progress.step == step:
            self.finish()
            while not go_on.exists():
                time.sleep(0.01)
        return begin(self, progress, **options)

    setattr(keeper.CheckpointKeeper, "save", save)  # noqa: B010 (a method)
    train_as_rank(arguments)


def test_a_full_disk_is_named_with_bytes_and_costs_no_checkpoint(tmp_path: Path, data: Path) -> None:
    arguments = tiny_arguments(tmp_path, data, "full", "--checkpoint.keep_last=1", "--checkpoint.on_failure=stop")
    run, go_on = run_of(tmp_path, "full"), tmp_path / "go-on"
    with small_disk(run.checkpoints, 6 * CHECKPOINT_KIB) as disk:
        group = RankGroup(2, tmp_path / "store", train_with_a_save_that_waits, arguments, 10, go_on)
        while not list_checkpoints(disk):
            assert group.processes[0].is_alive()
        (disk / "somebody-else's").write_bytes(bytes(1024 * (9 * CHECKPOINT_KIB // 2)))
        go_on.touch()
        assert group.join() == [2, 2]
        reason = state_of(run)["reason"]
        why = r"could not be saved: .*: No space left on device; a checkpoint needs [\d,]+ bytes, and [\d,]+ are free"
        assert re.search(why, reason)
        (checkpoint,) = [path for _, path in list_checkpoints(disk)]
        verify_checkpoint(checkpoint)
        assert not list(disk.glob(".*"))
        (disk / "somebody-else's").unlink()
        train(2, tmp_path, arguments)
        assert [step for step, _ in list_checkpoints(disk)] == [20, 5]  # the one resumed from stays
    assert max(losses(run)) == 20


def test_a_disk_that_turns_read_only_is_named(tmp_path: Path, data: Path) -> None:
    arguments = tiny_arguments(tmp_path, data, "read-only", "--run.max_steps=10000")
    run = run_of(tmp_path, "read-only")
    with small_disk(run.checkpoints, 20 * CHECKPOINT_KIB) as disk:
        group = start_ranks_training(2, tmp_path, arguments)
        while not list_checkpoints(disk):
            assert group.processes[0].is_alive()
        with read_only_from_now_on(disk, tmp_path / "read-only"):
            assert group.join() == [2, 2]
            assert "Read-only file system; a checkpoint needs" in state_of(run)["reason"]
            verify_checkpoint(list_checkpoints(disk)[0][1])


def test_a_run_whose_whole_folder_turns_read_only_ends_in_one_line(tmp_path: Path, data: Path) -> None:
    """Neither `state` can be written then, nor the lock taken away."""
    endless, stderr = ("--run.max_steps=10000", "--schedule.kind=constant"), tmp_path / "stderr.txt"
    arguments = tiny_arguments(tmp_path, data, "read-only", *endless)
    run = run_of(tmp_path, "read-only")
    group = RankGroup(1, tmp_path / "store", train_and_tell, arguments, stderr)
    while not list_checkpoints(run.checkpoints):
        assert group.processes[0].is_alive()
    with read_only_from_now_on(run.path, tmp_path / "read-only"):
        assert group.join() == [2]
        assert "Read-only file system; a checkpoint needs" in stderr.read_text()
        assert "Traceback" not in stderr.read_text()
    train(1, tmp_path, [*arguments, f"--run.max_steps={max(losses(run)) + 1}"])  # the lock it left is a dead one's


def train_and_tell(arguments: list[str], told: Path) -> None:
    """A trainer whose stderr goes to `told`."""
    os.dup2(os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    train_as_rank(arguments)


def train_until_nothing_has_room(arguments: list[str], step: int, told: Path) -> None:
    """A trainer on whose disk not a byte is left from some save on; what it says on stderr goes to `told`."""
    from train.checkpoints import saver as keeper

    begin = keeper.CheckpointKeeper.save

    def save(self, progress, **options):
        if progress.step == step:
            self.finish()  # the save before has had its room
            fill(self.folder)
        return begin(self, progress, **options)

    setattr(keeper.CheckpointKeeper, "save", save)  # noqa: B010 (a method)
    train_and_tell(arguments, told)


def test_a_disk_without_a_byte_ends_the_run_in_one_line_and_with_room_it_is_the_same_run(
    tmp_path: Path, data: Path
) -> None:
    """Not even metrics.jsonl and `state` can be written: what was not recorded was not saved either."""
    train(1, tmp_path, tiny_arguments(tmp_path, data, "calm"))
    with small_disk(tmp_path / "runs", 3000) as disk:
        arguments = tiny_arguments(tmp_path, data, "full")
        run = run_of(tmp_path, "full")
        stderr = tmp_path / "stderr.txt"
        assert RankGroup(1, tmp_path / "store", train_until_nothing_has_room, arguments, 10, stderr).join() == [2]
        assert [step for step, _ in list_checkpoints(run.checkpoints)] == [5]
        told = stderr.read_text()
        assert f"error: step 20 could not be saved: {run.checkpoints}" in told
        assert f"WARNING: {run.metrics} can't be written: No space left on device" in run.log.read_text()
        assert "Traceback" not in told
        (run.checkpoints / "filler").unlink()
        train(1, tmp_path, arguments)
        found = curve(run)
    assert disk.exists()
    assert found == curve(run_of(tmp_path, "calm"))


@pytest.mark.parametrize("pages_left", [0, 1, 2])  # for the lock; for the configuration beside it; for provenance
def test_a_start_on_a_full_disk_is_refused_in_one_line_and_leaves_nothing(
    tmp_path: Path, data: Path, pages_left: int
) -> None:
    with small_disk(tmp_path / "runs", 1000) as disk:
        filler = fill(disk)
        os.truncate(filler, filler.stat().st_size - pages_left * os.sysconf("SC_PAGE_SIZE"))
        arguments, stderr = tiny_arguments(tmp_path, data, "full"), tmp_path / "stderr.txt"
        assert RankGroup(1, tmp_path / "store", train_and_tell, arguments, stderr).join() == [2]
        (line,) = stderr.read_text().splitlines()
        assert line.startswith(f"error: {disk / 'full'}")
        assert "can't be written (No space left on device): free some space, or name" in line
        assert not [path for path in disk.rglob("*") if "lock" in path.name or path.suffix == ".tmp"]


def test_samples_that_cannot_be_written_end_the_run_in_one_line(tmp_path: Path, data: Path) -> None:
    run = run_of(tmp_path, "full")
    run.path.mkdir(parents=True)
    more = ("--eval.sample_every_steps=2", '--eval.prompts=["ab"]')
    arguments, stderr = tiny_arguments(tmp_path, data, "full", *more), tmp_path / "stderr.txt"
    with small_disk(tmp_path / "small", 100) as disk:
        run.samples.symlink_to(disk / "samples.jsonl")
        run.samples.touch()
        fill(disk)
        assert RankGroup(1, tmp_path / "store", train_and_tell, arguments, stderr).join() == [2]
    why = f"{run.samples} can't be written: No space left on device"
    assert [line for line in stderr.read_text().splitlines() if why in line and line.startswith("error: ")]
    assert "Traceback" not in stderr.read_text()
    assert why in state_of(run)["reason"]
