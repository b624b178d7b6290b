"""Deadlines: a time, or a Slurm job's end, with a margin that is learned."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest

from common.checkpoint_files import list_checkpoints
from common.errors import UserError
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import PROJECT, losses, run_of, tiny_arguments, train_by_path
from train.deadline import SAFETY, Deadline, SlurmDeadline, StopMargin, check_deadline, open_deadline, slurm_end
from train.run_config import RunConfig


def scontrol(folder: Path, monkeypatch: pytest.MonkeyPatch, answer: str, status: int = 0) -> None:
    """A program of that name that answers as Slurm's does; `answer` may be changed later in the file `answer`."""
    folder.mkdir(exist_ok=True)
    (folder / "answer").write_text(answer)
    program = folder / "scontrol"
    check = 'test "$*" = "--oneliner show job 77" || exit 9'
    program.write_text(f"#!/bin/sh\n{check}\ncat {folder}/answer\necho >> {folder}/asked\nexit {status}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "77")


def wait_until(true: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not true():
        assert time.monotonic() < until
        time.sleep(0.02)


def job(end: str) -> str:
    return f"JobId=77 JobName=x StartTime=2026-01-01T00:00:00 EndTime={end} Deadline=N/A NodeList=n1\n"


def test_the_margin_is_what_was_slowest_and_some(tmp_path: Path) -> None:
    margin = StopMargin(2.0)
    assert margin.seconds() == 2.0
    for part, seconds in (("step", 1.0), ("step", 3.0), ("step", 2.0), ("validation", 5.0), ("save", 10.0)):
        margin.saw(part, seconds)
    assert margin.seconds() == SAFETY * (3 + 5 + 10 + 10)  # a save under way, and the last one
    now = time.time()
    assert Deadline(margin, now + margin.seconds() - 1).is_near()
    assert not Deadline(margin, now + margin.seconds() + 60).is_near()
    assert not Deadline(margin).is_near()


def test_slurms_answer_is_read_again_since_limits_get_extended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scontrol(tmp_path / "bin", monkeypatch, job("2026-03-01T10:00:00"))
    assert slurm_end("77") == datetime(2026, 3, 1, 10).timestamp()
    deadline = SlurmDeadline(StopMargin(0), "77", read_seconds=0.1)
    later = datetime(2026, 3, 1, 12).timestamp()
    (tmp_path / "bin" / "answer").write_text(job("2026-03-01T12:00:00"))
    wait_until(lambda: deadline.end == later)
    (tmp_path / "bin" / "answer").write_text("slurm_load_jobs error: Unable to contact slurm controller\n")
    asked = tmp_path / "bin" / "asked"
    before = asked.stat().st_size
    wait_until(lambda: asked.stat().st_size >= before + 3)  # the first of these may have read the answer before
    assert deadline.end == later  # the last answer holds
    deadline.close()


def test_a_job_named_in_another_encoding_has_its_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scontrol(tmp_path / "bin", monkeypatch, "")
    answer = job("2026-03-01T10:00:00").replace("JobName=x", "JobName=été")
    (tmp_path / "bin" / "answer").write_bytes(answer.encode("latin-1"))
    assert slurm_end("77") == datetime(2026, 3, 1, 10).timestamp()


def test_without_a_limit_or_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert open_deadline("auto", StopMargin(0)).end is None
    with pytest.raises(UserError, match="this is no Slurm job"):
        check_deadline("slurm")
    scontrol(tmp_path / "bin", monkeypatch, job("Unknown"))
    check_deadline("slurm")
    assert slurm_end("77") is None
    scontrol(tmp_path / "bin", monkeypatch, "", status=1)
    with pytest.raises(UserError, match="scontrol knows no end of job 77"):
        check_deadline("slurm")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="scontrol does not answer"):
        check_deadline("slurm")


def test_a_time_needs_to_be_one() -> None:
    assert open_deadline("2026-05-01T06:00+00:00", StopMargin(0)).end == 1777615200
    with pytest.raises(ValueError, match="give a time such as"):
        RunConfig(deadline="tomorrow")


def test_a_run_saves_and_leaves_at_its_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_token_set(tmp_path / "data", train_tokens=20_000, val_tokens=500)
    arguments = tiny_arguments(tmp_path, tmp_path / "data", "late", "--run.max_steps=100000")
    run = run_of(tmp_path, "late")
    scontrol(tmp_path / "bin", monkeypatch, job("Unknown"))
    script = tmp_path / "asks_often.py"
    lines = [
        f"import sys; sys.path.insert(0, {str(PROJECT)!r})",
        "import train.deadline; train.deadline.READ_SECONDS = 0.2",
        "from common.errors import exit_on_user_error; from train.pretrain import main; exit_on_user_error(main)",
    ]
    script.write_text("\n".join(lines))
    command, environment = [sys.executable, str(script), *arguments], os.environ | {"OMP_NUM_THREADS": "1"}
    trainer = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    while len(losses(run)) < 3:
        assert trainer.poll() is None
        time.sleep(0.05)
    soon = datetime.fromtimestamp(time.time() + 30).isoformat(timespec="seconds")  # within the margin of 60 s
    (tmp_path / "bin" / "answer").write_text(job(soon))
    assert trainer.wait(timeout=60) == 0
    state = run.read_state()
    assert state is not None
    assert (state["status"], state["stop"], state["reason"]) == ("preempted", "deadline", "deadline")
    assert list_checkpoints(run.checkpoints)[0][0] == state["step"] == max(losses(run))
    again = train_by_path(*arguments, f"--run.deadline={soon}")  # near before it begins: not one step
    assert again.returncode == 0, again.stderr
    later = run.read_state()
    assert later is not None
    assert (later["stop"], later["step"], later["started_step"]) == ("deadline", state["step"], state["step"])
