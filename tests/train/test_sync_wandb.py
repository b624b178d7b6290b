"""`train/sync_wandb.py`: one wandb run holds every step once, however often it is called."""

import json
import os
import subprocess
import sys
from pathlib import Path

from common.run_folder import RunFolder
from tests.helpers.training import PROJECT
from tests.train.test_wandb_mirror import mirrored_steps

SCRIPT = PROJECT / "train" / "sync_wandb.py"


def sync(run: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_API_KEY": "", "HOME": str(run.parent)}
    command = [sys.executable, str(SCRIPT), str(run), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def steps(*numbers: int) -> str:
    return "".join(json.dumps({"step": step, "loss": 5.0 - step / 10}) + "\n" for step in numbers)


def test_every_step_once_however_often(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    start = json.dumps({"kind": "start", "step": 2}) + "\n"
    run.metrics.write_text(steps(1, 2, 3, 4) + start + steps(3, 4, 5) + '{"step": 6, "lo')  # resumed, and torn
    assert sync(run.path).returncode == 0
    assert mirrored_steps(run) == [1, 2, 3, 4, 5]
    again = sync(run.path)
    assert "0 of 5 records added" in again.stdout, again.stderr
    assert mirrored_steps(run) == [1, 2, 3, 4, 5]
    with open(run.metrics, "a") as file:
        file.write("\n" + steps(6, 7))
    assert sync(run.path).returncode == 0
    assert mirrored_steps(run) == [1, 2, 3, 4, 5, 6, 7]
    assert len({path.name.split("-")[-1] for path in run.path.glob("wandb/offline-run-*")}) == 1


def test_a_damaged_record_and_place_cost_what_is_damaged(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    odd = {"step": 3, "loss": [], "lr": {"a": 1}, "\ud800": 0, "note": "\ud800", "time": 10**30}
    run.metrics.write_text(steps(1, 2) + json.dumps(odd) + "\n" + '{"step": "4", "loss": 1}\n' + "[" * 5_000 + "\n")
    (run.path / "wandb-mirror.json").write_text('{"id": [], "train": {}}')
    run.lock.symlink_to("/dev/zero")
    done = sync(run.path)
    assert "3 of 3 records added" in done.stdout, done.stderr
    assert mirrored_steps(run) == [1, 2, 3]


def test_what_is_no_run_is_one_line(tmp_path: Path) -> None:
    done = sync(tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "holds no record" in line
