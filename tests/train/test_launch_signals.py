"""Ctrl-C and `train/launch.py`: the workers save and end, the terminal gets a line and no traceback."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from train import launch
from train.stopping.ctrl_c import SAME_SECONDS

PROJECT = Path(__file__).resolve().parents[2]
PATIENCE_SECONDS = 120.0
LAUNCHER = [sys.executable, str(PROJECT / "train" / "launch.py"), "--standalone", "--nproc_per_node=2"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals of a process group, as Linux has them")

# Each worker tells that it is there; a trainer's handler sets a flag, and the loop saves and ends.
SAVES = """
    import os, pathlib, signal, time
    me = pathlib.Path(__file__).parent / os.environ["RANK"]
    asked = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: asked.append(number))
    me.with_suffix(".ready").touch()
    while not asked:
        time.sleep(0.01)
    me.with_suffix(".saved").touch()
"""
IGNORES = """
    import os, pathlib, signal, time
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    (pathlib.Path(__file__).parent / os.environ["RANK"]).with_suffix(".ready").touch()
    time.sleep(600)
"""
FAILS = "raise SystemExit(3)"


def start(folder: Path, worker: str) -> "subprocess.Popen[str]":
    script = folder / "worker.py"
    script.write_text(textwrap.dedent(worker))
    return subprocess.Popen(
        [*LAUNCHER, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_until(process: "subprocess.Popen[str]", files: list[Path]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not all(file.exists() for file in files):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def interrupt(process: "subprocess.Popen[str]") -> None:
    """What the terminal does on Ctrl-C: the signal goes to the whole foreground process group."""
    os.killpg(process.pid, signal.SIGINT)


def finish(process: "subprocess.Popen[str]", family: list[psutil.Process]) -> str:
    """The output, once the process and all its descendants have ended."""
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    _, alive = psutil.wait_procs(family, timeout=PATIENCE_SECONDS)
    assert not alive
    return output


def test_ctrl_c_lets_the_workers_save_and_shows_no_traceback(tmp_path: Path) -> None:
    process = start(tmp_path, SAVES)
    wait_until(process, [tmp_path / "0.ready", tmp_path / "1.ready"])
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 3, "torchrun and two workers"

    interrupt(process)
    output = finish(process, family)

    assert process.returncode == 0
    assert output.strip() == "stopping; Ctrl-C again within 10 s drops what is not saved"
    assert sorted(path.name for path in tmp_path.glob("*.saved")) == ["0.saved", "1.saved"]


def test_a_second_ctrl_c_ends_workers_that_do_not(tmp_path: Path) -> None:
    process = start(tmp_path, IGNORES)
    wait_until(process, [tmp_path / "0.ready", tmp_path / "1.ready"])
    family = psutil.Process(process.pid).children(recursive=True)
    assert process.stdout is not None

    interrupt(process)
    while "stopping" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(2 * SAME_SECONDS)  # what comes sooner is the first one, seen twice
    interrupt(process)
    output = finish(process, family)

    assert process.returncode == 130
    assert "Traceback" not in output


def test_a_worker_that_ends_before_it_can_be_told_to_does_not_end_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = psutil.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)

    def listened_until_now(pid: int) -> bool:
        worker.kill()
        worker.wait()
        return True

    monkeypatch.setattr(launch, "listens", listened_until_now)
    monkeypatch.setattr(launch.Launch, "__init__", lambda self: None)
    monkeypatch.setattr(launch.Launch, "_children", lambda self: [worker])
    launcher = launch.Launch()  # type: ignore[call-arg]
    launcher._asked, launcher._told, launcher._end_at, launcher._started = [signal.SIGTERM], {}, None, True
    launcher.hand_on()
    assert not worker.is_running()


def test_a_workers_status_passes_through(tmp_path: Path) -> None:
    process = start(tmp_path, FAILS)
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)

    assert process.returncode == 3, output
    assert "failed first with exit status 3" in output
    assert "OMP_NUM_THREADS" not in output
