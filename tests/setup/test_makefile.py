"""Which Python make takes, and what it would run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from common.host_limits import allowed_cores

PROJECT = Path(__file__).resolve().parents[2]
NEEDED = ("sh", "sed", "awk", "uname", "nproc", "getconf")

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def old_python(path: Path) -> None:
    """A program that answers as Python 3.9 would."""
    path.write_text('#!/bin/sh\ncase "$2" in *exit*) exit 1 ;; *) echo 3.9.2 ;; esac\n')
    path.chmod(0o755)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A folder with the few tools that make needs and no Python: all of PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in NEEDED:
        if found := shutil.which(name):
            (folder / name).symlink_to(found)
    return folder


def find_python(path: Path, named: str = "") -> "subprocess.CompletedProcess[str]":
    command = ["/bin/sh", str(PROJECT / "setup" / "find_python.sh"), named]
    return subprocess.run(command, capture_output=True, text=True, env={"PATH": str(path)})


def make(*arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """As in a terminal, also where these tests are run by `make test JOBS=1`, which hands its variables on."""
    mine = re.findall(r"^(\w+) \?=", (PROJECT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS")) and key not in mine
    }
    return subprocess.run(
        ["make", "-C", str(PROJECT), *arguments], capture_output=True, text=True, env=environment | variables
    )


def test_python3_comes_first(path: Path) -> None:
    (path / "python3").symlink_to(sys.executable)
    (path / "python3.12").symlink_to(sys.executable)

    assert find_python(path).stdout.strip() == str(path / "python3")


def test_a_newer_python_stands_in_for_an_old_python3(path: Path) -> None:
    old_python(path / "python3")
    (path / "python3.12").symlink_to(sys.executable)

    assert find_python(path).stdout.strip() == str(path / "python3.12")


@pytest.mark.parametrize("named", [False, True])
def test_an_old_python_alone_is_one_line(path: Path, named: bool) -> None:
    old_python(path / "python3")
    (path / "python3.13").symlink_to(sys.executable) if named else None

    result = find_python(path, str(path / "python3") if named else "")

    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert "python3 is 3.9.2" in line
    assert "make PYTHON=" in line


def test_no_python_at_all_is_one_line(path: Path) -> None:
    result = find_python(path)

    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "Python 3.11 or newer" in line


def test_make_stops_where_there_is_no_python(path: Path) -> None:
    result = make("environment", f"PYTHON={path / 'python3'}")

    assert result.returncode == 2
    assert len([line for line in result.stderr.splitlines() if line.startswith("error: ")]) == 1
    assert result.stdout.strip().count("\n") <= 1, "nothing else was begun"


def test_help_names_every_target_and_variable() -> None:
    result = make("help")

    for word in (
        "demo",
        "test",
        "test-slurm",
        "lint",
        "clean",
        "help",
        "PYTHON=",
        "TORCH=system",
        "TORCH_INDEX=",
        "RANKS=",
        "TESTS=",
    ):
        assert word in result.stdout
    assert make().stdout == result.stdout, "make alone shows the help"


def test_the_number_of_test_processes_follows_the_cores_and_not_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """nproc takes OMP_NUM_THREADS, which many shells set to 1, for the number of cores."""
    monkeypatch.setenv("JOBS", "77")  # of an outer `make test JOBS=77`
    planned = make("--dry-run", "test", OMP_NUM_THREADS="1", OMP_THREAD_LIMIT="1").stdout
    assert f"pytest -n {min(8, allowed_cores() + 1)} " in planned


@pytest.mark.parametrize(
    ("ranks", "launcher"),
    [("1", r"\.venv/bin/python train"), ("3", r"train/launch\.py --standalone --nproc_per_node=3 train")],
)
def test_demo_takes_a_launcher_for_more_than_one_process(ranks: str, launcher: str) -> None:
    planned = make("--dry-run", "demo", f"RANKS={ranks}").stdout

    assert re.search(rf"{launcher}/pretrain\.py --config train/configs/demo\.yaml", planned)
    assert ("launch.py" in planned) == (ranks != "1")
    assert "docstrings.py --tokenizer gpt2-8k --out data/demo" in planned
    has_gpus = any(Path(device).exists() for device in ("/dev/nvidia0", "/dev/kfd"))
    assert ("--nproc_per_node=auto:8" in make("--dry-run", "demo").stdout) == has_gpus
    steps = [planned.index(name) for name in ("docstrings.py", "pretrain.py", "plot_loss.py", "summary.py")]
    assert steps == sorted(steps)


def test_a_mistaken_option_of_the_demo_is_told_before_its_corpus() -> None:
    plan = make("-n", "-o", "environment", "demo", DEMO_OPTIONS="--run.steps 3").stdout
    first, second, *_ = (line for line in plan.splitlines() if line.startswith(".venv"))

    done = subprocess.run(["sh", "-c", first], cwd=PROJECT, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "did you mean --run.max_steps" in done.stderr
    assert "docstrings.py" in second


@pytest.mark.parametrize(("options", "asked"), [("", True), ("--run.max_steps 60", False)])
def test_a_shortened_demo_is_not_asked_for_the_margin(options: str, asked: bool) -> None:
    plan = make("-n", "-o", "environment", "demo", DEMO_OPTIONS=options).stdout

    assert ("--require-margin 1.0" in plan) == asked
    assert ("is not asked for" in plan) != asked


@pytest.mark.parametrize("options", ["", "--run.name 'the first' --run.root elsewhere"])
def test_the_demo_plots_and_sums_up_the_run_that_it_trains(options: str, tmp_path: Path) -> None:
    plan = make("-n", "-o", "environment", "demo", DEMO_OPTIONS=options).stdout
    looks = [
        line.replace(".venv/bin/python eval/", "printf '%s\\n' ", 1) for line in plan.splitlines() if "eval/" in line
    ]
    assert len(looks) == 2
    for look in looks:
        said = subprocess.run(["sh", "-c", look], cwd=PROJECT, capture_output=True, text=True, check=True).stdout
        assert said.splitlines()[1] == ("elsewhere/the first" if options else "runs/demo")
