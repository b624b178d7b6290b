"""Deadlines: a time, or a Slurm job's end, with a margin that is learned."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from common.checkpoint_files import list_checkpoints
from common.errors import UserError
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import PROJECT, losses, run_of, tiny_arguments, train_by_path
from train.settings.sections import RunConfig
from train.stopping.deadline import (
    SAFETY,
    Deadline,
    SlurmDeadline,
    StopMargin,
    check_deadline,
    open_deadline,
    slurm_end,
)


def scontrol(folder: Path, monkeypatch: pytest.MonkeyPatch, answer: str, status: int = 0) -> None:
    """A program of that name that answers as Slurm's does; `answer` may be changed later in the file `answer`."""
    folder.mkdir(exist_ok=True)
    (folder / "answer").write_text(answer)
    program = folder / "scontrol"
    check = 'test "$*" = "--oneliner show job 77" && test "$SLURM_TIME_FORMAT" = %s || exit 9'
    program.write_text(f"#!/bin/sh\n{check}\ncat {folder}/answer\necho >> {folder}/asked\nexit {status}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)


@pytest.fixture
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where 2:30 comes twice on 2026-10-25: at 0:30 and at 1:30 UTC."""
    with monkeypatch.context() as context:
        context.setenv("TZ", "Europe/Berlin")
        time.tzset()
        yield
    time.tzset()


def wait_until(true: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not true():
        assert time.monotonic() < until
        time.sleep(0.02)


def job(end: str | float) -> str:
    """As scontrol shows a job whose end is `end`: in seconds since the epoch (%s), or as old versions write it."""
    end = end if isinstance(end, str) else round(end)
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
    scontrol(tmp_path / "bin", monkeypatch, job(1_772_359_200.0))
    assert slurm_end("77") == 1_772_359_200.0
    deadline = SlurmDeadline(StopMargin(0), "77", read_seconds=0.1)
    later = 1_772_366_400.0
    (tmp_path / "bin" / "answer").write_text(job(later))
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
    with pytest.raises(UserError, match="this is not a Slurm job"):
        check_deadline("slurm")
    scontrol(tmp_path / "bin", monkeypatch, job("Unknown"))
    check_deadline("slurm")
    assert slurm_end("77") is None
    scontrol(tmp_path / "bin", monkeypatch, job("10:30:00"))  # of today, as SLURM_TIME_FORMAT=relative has it
    with pytest.raises(UserError, match="scontrol gives 10:30:00 as the end of job 77, which is not a time"):
        check_deadline("slurm")
    scontrol(tmp_path / "bin", monkeypatch, "", status=1)
    with pytest.raises(UserError, match="scontrol gives no end of job 77"):
        check_deadline("slurm")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="scontrol does not answer"):
        check_deadline("slurm")


@pytest.mark.usefixtures("berlin")
def test_the_hour_that_comes_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second = datetime(2026, 10, 25, 1, 30, tzinfo=UTC).timestamp()
    scontrol(tmp_path / "bin", monkeypatch, job(second))
    assert slurm_end("77") == second
    scontrol(tmp_path / "bin", monkeypatch, job("2026-10-25T02:30:00"))  # a version that does not know the format:
    assert slurm_end("77") == second - 3600  # too early costs an hour, too late the work


def reports(deadline: Deadline) -> list[str]:
    """What a deadline reports at the first boundary after its first question."""
    lines: list[str] = []
    deadline.report = lines.append
    wait_until(lambda: deadline.is_near() or bool(lines) or deadline.end is not None)
    deadline.is_near()
    deadline.close()
    return lines


def test_where_scontrol_does_not_answer_the_environment_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scontrol(tmp_path / "bin", monkeypatch, "", status=1)
    end = round(time.time()) + 7200
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(end))
    check_deadline("slurm")
    deadline = open_deadline("auto", StopMargin(0))
    (line,) = reports(deadline)
    assert deadline.end == end
    assert "the job's end is SLURM_JOB_END_TIME's" in line
    scontrol(tmp_path / "bin", monkeypatch, job(end + 60.0))  # what scontrol gives comes first
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(end))
    deadline = open_deadline("auto", StopMargin(0))
    assert reports(deadline) == []
    assert deadline.end == end + 60


@pytest.mark.parametrize("left_over", ["", "soon", "1772359200", "9" * 30])
def test_a_run_that_does_not_know_when_its_job_ends_reports_it(
    left_over: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scontrol(tmp_path / "bin", monkeypatch, "", status=1)
    monkeypatch.setenv("SLURM_JOB_END_TIME", left_over)
    deadline = open_deadline("auto", StopMargin(0))
    (line,) = reports(deadline)
    assert line.startswith("WARNING: ")
    assert "the run does not know when its job ends. Give run.deadline a time" in line
    assert deadline.end is None


def test_a_time_needs_to_be_one() -> None:
    assert open_deadline("2026-05-01T06:00+00:00", StopMargin(0)).end == 1777615200
    with pytest.raises(ValueError, match="use a time such as"):
        RunConfig(deadline="tomorrow")


def test_a_run_saves_and_leaves_at_its_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_token_set(tmp_path / "data", train_tokens=20_000, val_tokens=500)
    arguments = tiny_arguments(tmp_path, tmp_path / "data", "late", "--run.max_steps=100000")
    run = run_of(tmp_path, "late")
    scontrol(tmp_path / "bin", monkeypatch, "")  # no answer at first
    script = tmp_path / "asks_often.py"
    lines = [
        f"import sys; sys.path.insert(0, {str(PROJECT)!r})",
        "import train.stopping.deadline; train.stopping.deadline.READ_SECONDS = 0.2",
        "from common.errors import exit_on_user_error; from train.pretrain import main; exit_on_user_error(main)",
    ]
    script.write_text("\n".join(lines))
    command, environment = [sys.executable, str(script), *arguments], os.environ | {"OMP_NUM_THREADS": "1"}
    trainer = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    while len(losses(run)) < 3:
        assert trainer.poll() is None
        time.sleep(0.05)
    end = time.time() + 30  # within the margin of 60 s
    (tmp_path / "bin" / "answer").write_text(job(end))
    assert trainer.wait(timeout=60) == 0
    state = run.read_state()
    assert state is not None
    assert (state["status"], state["stop"], state["reason"]) == ("preempted", "deadline", "deadline")
    assert run.log.read_text().count("the run does not know when its job ends") == 1
    assert list_checkpoints(run.checkpoints)[0][0] == state["step"] == max(losses(run))
    soon = datetime.fromtimestamp(end).isoformat(timespec="seconds")
    again = train_by_path(*arguments, f"--run.deadline={soon}")  # near before it begins: not one step
    assert again.returncode == 0, again.stderr
    later = run.read_state()
    assert later is not None
    assert (later["stop"], later["step"], later["started_step"]) == ("deadline", state["step"], state["step"])
