"""One trainer at a time in a run's folder: real trainers, and locks as other machines would leave them."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.checkpoint_files import list_checkpoints
from common.errors import UserError
from common.periodic import Periodic
from common.processes import ProcessIdentity
from common.rewritten_file import RewrittenFile
from model.ranks import start_ranks
from tests.helpers.ranks import RankGroup, run_ranks
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import PRETRAIN, losses, run_of, start_ranks_training, tiny_arguments, train, train_by_path
from train.run.lock import RunLock

ELSEWHERE = {"host": "node7", "pid": 4242, "started": 1.0, "boot": "another", "namespace": "pid:[1]"}
NO_JOB: dict[str, Any] = {"job_id": None, "restart_count": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_token_set(folder, train_tokens=20_000, val_tokens=500)
    return folder


@pytest.fixture
def endless(tmp_path: Path, data: Path) -> Iterator[RankGroup]:
    """Two ranks that train until something ends them."""
    endless = ("--run.max_steps=100000", "--schedule.kind=constant")
    group = start_ranks_training(2, tmp_path, tiny_arguments(tmp_path, data, "mine", *endless))
    while len(losses(run_of(tmp_path, "mine"))) < 6:
        assert all(process.is_alive() for process in group.processes)
        time.sleep(0.05)
    yield group
    group.kill()


def suspend(process: int) -> None:
    """Stop a process, and wait until none of its threads is in the middle of a write any more."""
    os.kill(process, signal.SIGSTOP)
    for thread in Path(f"/proc/{process}/task").glob("*"):  # none where there is no /proc
        while "\nState:\tT" not in (thread / "status").read_text():
            time.sleep(0.001)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_trainer_is_refused_and_touches_nothing_until_the_first_is_dead(
    tmp_path: Path, data: Path, endless: RankGroup
) -> None:
    run = run_of(tmp_path, "mine")
    for process in endless.processes:
        assert process.pid is not None
        suspend(process.pid)  # alive, but nothing moves while we compare
    before = contents(run.path)
    second = train_by_path(*tiny_arguments(tmp_path, data, "mine"))
    assert second.returncode == 2
    (line,) = second.stderr.splitlines()
    assert f"is being trained by process {endless.processes[0].pid} on " in line
    assert contents(run.path) == before

    endless.kill()
    to_an_end = ("--schedule.kind=constant", f"--run.max_steps={max(losses(run)) + 1}")
    third = train_by_path(*tiny_arguments(tmp_path, data, "mine", *to_an_end))
    assert third.returncode == 0, third.stderr
    assert "that process is gone" in third.stdout
    assert not run.lock.exists()


def test_a_trainer_that_has_been_overtaken_leaves_everything_alone(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that Slurm lost goes on computing while the job has been started anew elsewhere."""
    arguments = tiny_arguments(tmp_path, data, "lost", "--run.max_steps=100000", "--checkpoint.every_steps=0")
    run = run_of(tmp_path, "lost")
    old = subprocess.Popen(
        [sys.executable, str(PRETRAIN), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "SLURM_JOB_ID": "77"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while len(losses(run)) < 3:
            assert old.poll() is None
            time.sleep(0.05)
        suspend(old.pid)
        monkeypatch.setenv("SLURM_JOB_ID", "77")
        with pytest.raises(UserError, match="Slurm job 77"):
            RunLock(run.path, 60).take()  # the same start of the job: refused
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        lock = RunLock(run.path, 60)
        assert "a later start of job 77" in lock.take()
        before = run.state.read_bytes(), lock.path.read_bytes()
        os.kill(old.pid, signal.SIGTERM)  # asked to save, too
        os.kill(old.pid, signal.SIGCONT)
        _, errors = old.communicate(timeout=60)
    finally:
        old.kill()
    assert (old.returncode, len(errors.splitlines())) == (1, 1), errors
    assert "another trainer" in errors
    assert list_checkpoints(run.checkpoints) == []
    assert run.state.read_bytes() == before[0]
    assert json.loads(lock.path.read_text())["token"] == json.loads(before[1])["token"]
    lock.release()
    assert not lock.path.exists()


def test_a_restart_count_that_is_none_is_refused_before_a_lock_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "once")
    with pytest.raises(UserError, match="SLURM_RESTART_COUNT is 'once' in the environment"):
        RunLock(tmp_path / "run", 60).take()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("SLURM_RESTART_COUNT", "")
    monkeypatch.setenv("SLURM_JOB_ID", "7" * 5_000)
    with pytest.raises(UserError, match="the job_id of this process has 5,000 characters, too long for a record"):
        RunLock(tmp_path / "run", 60).take()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.delenv("SLURM_JOB_ID")
    lock = RunLock(tmp_path / "run", 60)
    lock.take()
    lock.release()


def test_a_copy_of_a_live_run_is_a_run_of_its_own_and_a_moved_one_keeps_its_trainer(tmp_path: Path, data: Path) -> None:
    run = run_of(tmp_path, "mine")
    command = tiny_arguments(tmp_path, data, "mine", "--run.max_steps=100000", "--checkpoint.every_steps=0")
    trainer = subprocess.Popen(
        [sys.executable, str(PRETRAIN), *command],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while len(losses(run)) < 3:
            assert trainer.poll() is None
            time.sleep(0.05)
        suspend(trainer.pid)
        shutil.copytree(run.path, tmp_path / "runs" / "copy")
        shutil.copytree(run.path, tmp_path / "runs" / "linked", copy_function=os.link)  # as `cp -al`
        for copy in ("copy", "linked"):
            lock = RunLock(tmp_path / "runs" / copy, 60)
            assert f"process {trainer.pid} on" in (found := lock.take())
            assert "trains another folder, of which this one is a copy" in found
            lock.release()
        moved = tmp_path / "runs" / "moved"
        before = run.lock.read_bytes()
        run.path.rename(moved)
        with pytest.raises(UserError, match=f"moved is being trained by process {trainer.pid} on"):
            RunLock(moved, 60).take()
        assert (moved / "lock").read_bytes() == before
        os.kill(trainer.pid, signal.SIGCONT)
        _, errors = trainer.communicate(timeout=60)
    finally:
        trainer.kill()
    assert (trainer.returncode, len(errors.splitlines())) == (1, 1), errors
    assert f"{run.lock} is gone: the run's folder was moved or deleted" in errors
    assert "taken over" not in errors
    lock = RunLock(moved, 60)
    assert "that process is gone" in lock.take()
    lock.release()


def test_on_another_mount_a_lock_is_judged_by_whether_it_changes(tmp_path: Path) -> None:
    """A file system that is mounted twice may number its files differently, and its trainer lives."""
    record = vars(ProcessIdentity.of_this_process()) | NO_JOB | {"folder": [-1, 1], "token": "theirs"}
    file = write_lock(tmp_path, record)
    count = iter(range(1000))
    renewal = Periodic("other", 0.1, lambda: file.write(record | {"renewed": next(count)}))
    with pytest.raises(UserError, match="is being trained by"):
        RunLock(tmp_path, 60).take()
    renewal.stop()
    lock = RunLock(tmp_path, 0.5)
    assert "not renewed for" in lock.take()
    lock.release()


def write_lock(folder: Path, record: dict[str, Any]) -> RewrittenFile:
    folder.mkdir(parents=True, exist_ok=True)
    file = RewrittenFile(folder / "lock")
    file.write(record)
    return file


def test_the_lock_of_another_machine_is_judged_by_whether_it_changes(tmp_path: Path) -> None:
    record = ELSEWHERE | NO_JOB | {"token": "theirs", "renewed": time.time() + 1e6}  # its clock is far ahead
    file = write_lock(tmp_path, record)
    count = iter(range(1000))
    renewal = Periodic("other", 0.1, lambda: file.write(record | {"renewed": next(count)}))
    with pytest.raises(UserError, match="is being trained by process 4242 on node7"):
        RunLock(tmp_path, 60).take()
    renewal.stop()
    lock = RunLock(tmp_path, 0.5)
    assert "not renewed for" in lock.take()
    assert lock.still_mine()
    file.write(record)  # the other one wakes up: it writes to what it once opened
    assert lock.still_mine()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_reused_pid_and_an_earlier_boot_are_told_from_the_owner(tmp_path: Path) -> None:
    me = ProcessIdentity.of_this_process()
    assert not me.is_gone()
    write_lock(tmp_path, vars(me) | NO_JOB | {"started": me.started - 1, "token": "theirs"})
    lock = RunLock(tmp_path, 60)
    assert "that process is gone" in lock.take()
    with pytest.raises(UserError, match=f"process {me.pid} on"):
        RunLock(tmp_path, 60).take()
    lock.release()


def test_what_is_no_lock_is_waited_for_and_kept(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("not ours")
    lock = RunLock(tmp_path, 0.2)
    lock.take()
    assert lock.still_mine()
    lock.release()
    (kept,) = tmp_path.iterdir()
    assert kept.read_text() == "not ours"


def test_the_owner_of_a_restarted_container_is_known_to_be_gone(tmp_path: Path) -> None:
    """Its host name was another; boot and pid namespace tell whose pid it is."""
    me = vars(ProcessIdentity.of_this_process())
    write_lock(tmp_path, me | NO_JOB | {"host": "0c1f2e3d4b5a", "started": 1.0, "token": "theirs"})
    lock = RunLock(tmp_path, 60)
    assert "that process is gone" in lock.take(give_up=lambda: True)  # without a look at whether it is renewed
    lock.release()
    write_lock(tmp_path, me | NO_JOB | {"host": "0c1f2e3d4b5a", "token": "theirs"})
    with pytest.raises(UserError, match=f"process {os.getpid()} on 0c1f2e3d4b5a"):
        RunLock(tmp_path, 60).take(give_up=lambda: True)


def test_waiting_is_said_at_once_ends_when_asked_and_an_empty_folder_does_not_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lock(tmp_path / "runs" / "a", ELSEWHERE | NO_JOB | {"token": "theirs"})
    printed: list[str] = []

    def give_up() -> bool:
        printed.append(capsys.readouterr().out)
        return True

    with pytest.raises(UserError, match="stopped while waiting for the lock of process 4242 on node7"):
        RunLock(tmp_path / "runs" / "a", 60).take(give_up)
    (line,) = printed
    assert line.startswith(f"waiting up to 60 s for the lock of process 4242 on node7 ({tmp_path / 'runs/a/lock'}): ")
    assert "renews its lock every 5 s" in line
    lock = RunLock(tmp_path / "other" / "b", 60)
    lock.take()
    lock.release()
    assert not (tmp_path / "other").exists()


def test_a_lock_that_cannot_be_read_for_a_moment_is_not_lost(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, 60)
    lock.take()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))  # no file can be opened any more
    try:
        lock._renew()
        with pytest.raises(OSError, match="Too many open files"):
            lock.still_mine()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert not lock.lost
    assert lock.still_mine()
    lock.path.unlink()
    assert not lock.still_mine()  # gone is not unreadable
    lock.release()


def compete(folder: Path, rounds: int) -> list[str]:
    """Each round: all ranks want the lock that a dead process left; say who got it."""
    ranks = start_ranks("cpu")
    stale = vars(ProcessIdentity.of_this_process()) | NO_JOB | {"started": 0.0, "token": "dead"}
    outcomes = []
    for _ in range(rounds):
        if ranks.is_first:
            write_lock(folder, stale).close()
        ranks.barrier()
        lock = RunLock(folder, 60)
        try:
            lock.take()
            outcome = "took"
        except UserError:
            outcome = "refused"
        ranks.barrier()
        outcomes.append(outcome if outcome == "refused" or lock.still_mine() else "overtaken")
        ranks.barrier()
        lock.release()
    return outcomes


def test_of_many_that_find_a_dead_ones_lock_one_takes_it(tmp_path: Path) -> None:
    found = run_ranks(4, tmp_path / "store", compete, tmp_path / "run", 12)
    for outcomes in zip(*found, strict=True):
        assert outcomes.count("took") == 1, outcomes
    assert list((tmp_path / "run").iterdir()) == []


def test_a_run_that_died_between_its_last_save_and_its_last_word_is_done(tmp_path: Path, data: Path) -> None:
    arguments = tiny_arguments(tmp_path, data, "short", "--run.max_steps=2")
    train(1, tmp_path, arguments)
    run = run_of(tmp_path, "short")
    run.state.write_text(json.dumps(json.loads(run.state.read_text()) | {"status": "running", "reason": "saved"}))
    train(1, tmp_path, arguments)
    state = json.loads(run.state.read_text())
    assert (state["status"], state["step"]) == ("done", 2)
