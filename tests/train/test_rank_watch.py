"""The launcher names a worker that stands still where no other rank can, and ends a single one."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from common.metrics_table import read_metrics_table
from common.run_folder import RunFolder
from common.run_note import NOTES_FOLDER, leave_note, read_note
from common.time_spent import time_spent
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import PRETRAIN, PROJECT, run_of, tiny_arguments
from train.launching import rank_watch
from train.launching.rank_watch import RankWatch


@pytest.fixture(autouse=True)
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_watch, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(rank_watch, "STILL_SECONDS", 1.0)


def look_until(watch: RankWatch, worker: subprocess.Popen[bytes], condition: Callable[[], Any]) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until
        watch.look([psutil.Process(worker.pid)])
        time.sleep(0.05)


def suspect_of(run: RunFolder) -> str:
    return str((run.read_state() or {}).get("suspect", ""))


def test_a_single_rank_that_stands_still_is_named_until_it_moves(tmp_path: Path) -> None:
    make_token_set(tmp_path / "tokens", train_tokens=20_000, val_tokens=1_000)
    run, notes = run_of(tmp_path, "single"), tmp_path / "notes"
    notes.mkdir()
    arguments = tiny_arguments(tmp_path, tmp_path / "tokens", "single", "--run.max_steps=100000")
    environment = os.environ | {"OMP_NUM_THREADS": "1", NOTES_FOLDER: str(notes)}
    worker = subprocess.Popen([sys.executable, str(PRETRAIN), *arguments], env=environment, stdout=subprocess.DEVNULL)
    try:
        watch = RankWatch(notes)
        look_until(watch, worker, lambda: run.state.exists() and (run.read_state() or {}).get("step", 0) > 0)
        worker.send_signal(signal.SIGSTOP)
        look_until(watch, worker, lambda: suspect_of(run))
        assert suspect_of(run).startswith("rank 0 on ") and f"(pid {worker.pid}), stopped for " in suspect_of(run)
        assert "WARNING: training hangs, and waits for: rank 0 on " in run.log.read_text(encoding="utf-8")

        worker.send_signal(signal.SIGCONT)
        look_until(watch, worker, lambda: not suspect_of(run))
        look_until(watch, worker, lambda: "the rank moves again" in run.log.read_text(encoding="utf-8"))
        assert (run.read_state() or {})["status"] == "running"
    finally:
        worker.kill()
        worker.wait()


def test_a_rank_that_has_met_no_other_is_named_on_the_terminal_and_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_watch, "LIMIT_SECONDS", 2.0)
    worker = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env=os.environ | {"RANK": "3"})
    try:
        watch, told = RankWatch(tmp_path), [""]

        def has_told_of(words: str) -> bool:
            told[0] += capsys.readouterr().err
            return words in told[0]

        worker.send_signal(signal.SIGSTOP)
        look_until(watch, worker, lambda: has_told_of("hangs"))
        assert told[0].startswith("WARNING: training hangs, and waits for: rank 3 on ")
        assert told[0].count("\n") == 1

        look_until(watch, worker, lambda: worker.poll() is not None)
        assert worker.returncode == -signal.SIGKILL
        assert has_told_of("failed: hung for 2 s: rank 3 on "), told
        assert told[0].count("\n") == 2
    finally:
        worker.kill()
        worker.communicate()


def test_ranks_that_have_met_watch_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher keeps out of it, until they part."""
    monkeypatch.setenv(NOTES_FOLDER, str(tmp_path))
    leave_note(tmp_path / "run", 1, 2, 600.0)
    note = read_note(tmp_path, os.getpid())
    assert note == {"run": str(tmp_path / "run"), "rank": 1, "world_size": 2, "limit_seconds": 600.0}
    assert read_note(tmp_path, 1) is None
    monkeypatch.setattr(psutil.Process, "status", lambda self: psutil.STATUS_STOPPED)
    watch = RankWatch(tmp_path)
    until = time.monotonic() + 3 * rank_watch.STILL_SECONDS
    while time.monotonic() < until:
        watch.look([psutil.Process()])
    assert not watch._standing
    leave_note(None, 1, 2, 600.0)
    watch._looked = 0.0
    watch.look([psutil.Process()])
    assert watch._standing


def test_the_launcher_ends_a_single_rank_that_stays_frozen_and_its_time_is_accounted_for(tmp_path: Path) -> None:
    """Two starts: a hang that is ended, and a kill."""
    make_token_set(tmp_path / "tokens", train_tokens=20_000, val_tokens=1_000)
    run = run_of(tmp_path, "frozen")
    more = ["--run.max_steps=100000", "--run.hang_limit_seconds=31"]
    command = [sys.executable, str(PROJECT / "train" / "launch.py"), "--nproc_per_node=1", str(PRETRAIN)]
    command += tiny_arguments(tmp_path, tmp_path / "tokens", "frozen", *more)
    began = time.time()
    launcher, pid = launch_and_wait_for_a_step(command, run)
    os.kill(pid, signal.SIGSTOP)
    frozen = time.time()
    _, errors = launcher.communicate(timeout=120)
    ended = time.time()

    assert launcher.returncode != 0
    state = run.read_state() or {}
    assert (state["status"], state["failure"]) == ("failed", "hung"), errors
    assert state["culprit_node"] == os.uname().nodename
    assert state["reason"].startswith("hung for ") and ", stopped for " in state["reason"]
    assert f"failed: {state['reason']}" in errors
    assert f"failed: {state['reason']}" in run.log.read_text(encoding="utf-8")

    again = time.time()
    launcher, pid = launch_and_wait_for_a_step(command, run)
    os.kill(pid, signal.SIGKILL)
    launcher.communicate(timeout=120)
    clock = os.stat(run.metrics).st_mtime - began
    spent = time_spent(read_metrics_table(run.metrics))
    assert spent.total == pytest.approx(clock, rel=0.01)
    assert sum(spent.parts.values()) == pytest.approx(clock, rel=0.01)
    assert 31.0 < spent.hung <= ended - frozen
    assert 0.0 <= spent.stopped - (again - ended) < 0.01 * clock + ended - frozen - spent.hung


def launch_and_wait_for_a_step(command: list[str], run: RunFolder) -> tuple[subprocess.Popen[str], int]:
    """Start a run or resume it; the launcher, and its rank's pid once it trains."""
    before = run.metrics.read_text(encoding="utf-8").count("step_seconds") if run.metrics.exists() else 0
    launcher = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, encoding="utf-8")
    until = time.monotonic() + 120
    while not run.metrics.exists() or run.metrics.read_text(encoding="utf-8").count("step_seconds") <= before:
        assert launcher.poll() is None and time.monotonic() < until
        time.sleep(0.1)
    return launcher, int((run.read_state() or {})["pid"])
