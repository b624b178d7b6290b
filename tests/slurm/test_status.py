"""Figures of status.py, from a run's files written by hand."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from common.run_folder import RunFolder
from slurm.status import allocated_seconds, main, read_status
from tests.helpers.privileges import obey_modes
from tests.helpers.ranks import run_ranks
from tests.helpers.training import PROJECT

START = 1_700_000_000.0


def line(kind: str, seconds: float, restart: int, **more: Any) -> dict[str, Any]:
    return {"kind": kind, "time": START + seconds, "job_id": "7", "restart_count": restart, **more}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """100 s of allocation ended by a power failure after step 4, saved at 2; then 50 s, which reached 6 of 10."""
    run = RunFolder(tmp_path / "runs" / "power-failure")
    run.path.mkdir(parents=True)
    lines = [line("submission", -60, 0), line("start", 0, 0, from_step=0), line("start", 200, 1, from_step=2)]
    lines += [line("end", 250, 1, decision="requeue", reason="pre-empted", pre_empted=True, left_out=["n3"])]
    (run.path / "slurm.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    seconds = [*enumerate([25, 50, 75, 100], 1), *enumerate([210, 220, 230, 240], 3)]
    records = [
        {"step": step, "loss": 1.0, "step_seconds": 10.0, "tokens_per_second": 50.0, "time": START + at}
        for step, at in seconds
    ]
    run.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    run.config.write_text("run: {max_steps: 10}\n")
    run.write_state("preempted", reason="SIGUSR1", step=6, tokens=6)
    return run


def test_the_figures_of_an_interrupted_run(folder: RunFolder):
    status = read_status(folder, now=START + 1000)
    assert (status.run, status.status, status.job_id) == ("power-failure", "preempted", "7")
    assert (status.step, status.max_steps) == (6, 10)
    assert status.restarts == 1
    assert status.lost_steps == 2  # 3 and 4 were done twice
    assert status.allocated_seconds == pytest.approx(100 + 50)
    assert status.goodput == pytest.approx(6 * 10 / 150)
    assert (status.alive, status.eta_seconds) == ("ended", None)  # it makes no progress
    assert status.tokens_per_second == 50.0


def test_a_running_job_is_counted_until_now():
    lines = [line("start", 0, 0)]
    assert allocated_seconds(lines, [{"time": START + 30}], now=START + 70) == pytest.approx(70)
    assert allocated_seconds(lines, [{"time": START + 30}], now=None) == pytest.approx(30)
    assert allocated_seconds([], [], now=None) == 0


def test_the_command_prints_a_line_a_run_and_writes_json(folder: RunFolder, tmp_path: Path):
    figures = tmp_path / "status.json"
    done = subprocess.run(
        [
            sys.executable,
            str(PROJECT / "slurm" / "status.py"),
            "--root",
            str(folder.path.parent),
            "--json",
            str(figures),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    head, row, _, said, parts, times = done.stdout.splitlines()
    assert head.split()[:4] == ["run", "status", "job", "Slurm"]
    assert {"power-failure", "preempted", "6/10", "40%"} <= set(row.split())
    assert row.endswith("SIGUSR1 (without n3)")
    (figures_of_run,) = json.loads(figures.read_text())
    assert (figures_of_run["lost_steps"], figures_of_run["skips"], figures_of_run["suspect"]) == (2, 0, "")
    assert said == "where the time went, over all starts:"
    assert parts.split()[:3] == ["run", "time", "computing"] and times.split()[0] == "power-failure"
    seconds = figures_of_run["seconds"]
    assert (seconds["compute"], seconds["done_again"]) == (60.0, 20.0)
    assert sum(seconds.values()) == pytest.approx(2 * seconds["total"])


def test_a_damaged_run_does_not_hide_the_others(folder: RunFolder):
    root = folder.path.parent
    for name, state in (("torn", '{"status": "runn'), ("foreign", "[]")):
        (root / name).mkdir()
        (root / name / "state").write_text(state)
    with open(folder.path / "slurm.jsonl", "a") as file:
        file.write('{"kind": "start", "ti\n{"of": "somebody else"}\n')
    done = subprocess.run(
        [sys.executable, str(PROJECT / "slurm" / "status.py"), "--root", str(root)], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    rows = {row.split()[0]: row for row in done.stdout.split("\n\n")[0].splitlines()[1:]}
    assert "6/10" in rows["power-failure"]
    for name in ("torn", "foreign"):
        assert "unreadable" in rows[name]
        assert f"{root / name / 'state'} is damaged (it is not " in rows[name]
        assert rows[name].endswith("): move it away and start again")


def status_without_privileges(root: Path, figures: Path) -> str:
    """`slurm/status.py`, by a process that modes hold back; what it printed."""
    obey_modes()
    sys.argv = ["status.py", "--root", str(root), "--json", str(figures)]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main() == 0
    return printed.getvalue()


def test_runs_that_are_private_or_hostile_cost_their_own_lines(folder: RunFolder, tmp_path: Path):
    """Another user's run, and others whose files are a pipe, a device, or of other types."""
    root = folder.path.parent
    shutil.copytree(folder.path, root / "private")
    (root / "private").chmod(0)
    hostile = {"piped": "metrics.jsonl", "endless": "slurm.jsonl", "locked": "lock", "folded": "state"}
    for name, file in hostile.items():
        shutil.copytree(folder.path, root / name)
        (root / name / file).unlink(missing_ok=True)
    os.mkfifo(root / "piped" / "metrics.jsonl")
    (root / "endless" / "slurm.jsonl").symlink_to("/dev/zero")
    (root / "locked" / "lock").symlink_to("/dev/zero")
    (root / "folded" / "state").mkdir()
    odd = RunFolder(root / "odd")
    shutil.copytree(folder.path, odd.path)
    wrong = [
        {"step": 7, "step_seconds": [], "time": "late", "tokens_per_second": {}},
        {"step": "8", "step_seconds": 1.0},
    ]
    with open(odd.metrics, "a") as metrics:
        metrics.write("".join(json.dumps(record) + "\n" for record in wrong) + "[" * 5_000)
    figures = tmp_path / "figures.json"
    (printed,) = run_ranks(1, tmp_path / "store", status_without_privileges, root, figures)
    runs, times = printed.split("\n\n")
    assert (len(runs.splitlines()), len(times.splitlines())) == (8, 7)  # piped and private have no times
    found = {row["run"]: row for row in json.loads(figures.read_text())}
    assert {name for name, row in found.items() if row["status"] == "unreadable"} == {
        "private", "piped", "endless", "folded",
    }  # fmt: skip
    assert "state can't be read (Permission denied)" in found["private"]["reason"]
    assert "metrics.jsonl can't be read (it is a pipe, not a file)" in found["piped"]["reason"]
    assert "slurm.jsonl can't be read (it is a device, not a file)" in found["endless"]["reason"]
    assert "state can't be read (it is a folder, not a file)" in found["folded"]["reason"]
    assert found["folded"]["goodput"] == pytest.approx(6 * 10 / 150), "what can be read is told"
    for name in ("odd", "locked", "power-failure"):
        assert (found[name]["step"], found[name]["lost_steps"]) == (6, 2)
        assert found[name]["goodput"] == pytest.approx(6 * 10 / 150)
    (root / "private").chmod(0o700)


def test_no_runs_is_one_line(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, str(PROJECT / "slurm" / "status.py"), "--root", str(tmp_path)], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: no runs in")
