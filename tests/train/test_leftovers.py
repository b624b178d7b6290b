"""What a killed process leaves aside is swept by the next start, and what a living one has there is not."""

import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from common.publish import LEFT_SECONDS, sweep_temporaries, write_whole
from common.scratch_folder import scratch_folder
from tests.helpers.ranks import RankGroup
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import PROJECT, run_of, tiny_arguments, train, train_as_rank


def train_until_killed_writing(arguments: list[str], name: str) -> None:
    """A trainer that is killed between writing a file aside and giving it its name."""
    replace = os.replace

    def killed(source: Path, target: Path) -> None:
        if target.name == name:
            os.kill(os.getpid(), 9)
        replace(source, target)

    setattr(os, "replace", killed)  # noqa: B010
    train_as_rank(arguments)


def left_aside(folder: Path) -> list[str]:
    return sorted(path.name.partition(".")[0] for path in folder.rglob("*.tmp"))


def test_files_that_a_kill_left_aside_go_at_the_next_start(tmp_path: Path) -> None:
    make_token_set(tmp_path / "data", train_tokens=2_001, val_tokens=500)
    arguments = tiny_arguments(tmp_path, tmp_path / "data", "killed", "--run.max_steps=5")
    run = run_of(tmp_path, "killed")
    for name in ("config.yaml", "provenance.json", "state"):
        group = RankGroup(1, tmp_path / "store", train_until_killed_writing, arguments, name)
        assert group.join() == [-9]
        assert left_aside(run.path) == [name.partition(".")[0]]  # of this kill alone: the start swept the one before
    somebody_elses = run.path / "notes.0123abcd.tmp"
    somebody_elses.write_text("not ours to delete")
    train(1, tmp_path, arguments)
    assert left_aside(run.path) == ["notes"]


def test_what_a_living_writer_has_aside_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As two reports of the same runs at once."""
    path = tmp_path / "report.html"
    old = tmp_path / "report.html.0123abcd.tmp"
    old.write_text("of a report that was killed")
    os.utime(old, (time.time() - 2 * LEFT_SECONDS,) * 2)
    writes, goes_on = threading.Event(), threading.Event()

    def wanted() -> bool:
        writes.set()
        return goes_on.wait(60)

    writer = threading.Thread(target=lambda: write_whole(path, "whole", wanted))
    writer.start()
    assert writes.wait(60)
    sweep_temporaries(tmp_path, [path.name], older_than_seconds=LEFT_SECONDS)
    goes_on.set()
    writer.join()
    assert [found.name for found in tmp_path.iterdir()] == ["report.html"]
    assert path.read_text() == "whole"


HOLDER = """
import sys
sys.path.insert(0, sys.argv[1])
from common.scratch_folder import scratch_folder
with scratch_folder("longhaul-test-") as folder:
    (folder / "something").touch()
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_a_temporary_folder_outlives_a_kill_only_until_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def hold() -> tuple[subprocess.Popen[str], Path]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(PROJECT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"TMPDIR": str(tmp_path)},
        )
        assert process.stdout is not None
        return process, Path(process.stdout.readline().strip())

    (killed, left), (living, used) = hold(), hold()
    killed.kill()
    killed.wait()
    assert left.is_dir()
    with scratch_folder("longhaul-test-") as mine:
        assert set(tmp_path.iterdir()) == {mine, used}
        assert (used / "something").exists()
    living.communicate("")
    assert list(tmp_path.iterdir()) == []


def test_a_start_of_the_launcher_leaves_no_temporary_folder(tmp_path: Path) -> None:
    script, temporary = tmp_path / "script.py", tmp_path / "temporary"
    script.write_text("")
    temporary.mkdir()
    command = [sys.executable, str(PROJECT / "train" / "launch.py"), "--standalone", "--nproc_per_node=1", str(script)]
    done = subprocess.run(
        command, env=os.environ | {"TMPDIR": str(temporary)}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert list(temporary.iterdir()) == []
