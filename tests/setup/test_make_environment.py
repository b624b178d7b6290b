"""`make environment` with the real make, venv and pip, in a copy of the project that requires tiny local packages."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from uv import find_uv_bin

from setup.uv_install import environment_for_uv, read_configuration
from tests.setup.local_packages import (
    hash_line,
    install_by_hand,
    make_index,
    make_sdist,
    make_wheel,
    pip_environment,
)

PROJECT = Path(__file__).resolve().parents[2]
PATIENCE_SECONDS = 120.0

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@dataclass
class Copy:
    """A copy of what makes the environment. Two packages are required, one more for the tests."""

    root: Path
    wheels: Path
    environment: dict[str, str]

    def command(self, *arguments: str) -> list[str]:
        return ["make", "-C", str(self.root), *arguments]

    def make(self, *arguments: str, python: str | None = sys.executable) -> "subprocess.CompletedProcess[str]":
        named = [f"PYTHON={python}"] if python else []
        return subprocess.run(
            self.command(*arguments, *named),
            capture_output=True,
            text=True,
            env=self.environment,
            timeout=PATIENCE_SECONDS,
        )

    def require(self, text: str) -> None:
        (self.root / "requirements.txt").write_text(text)

    def pin(self, *packages: Path, dev: tuple[Path, ...]) -> None:
        """What setup/pin_packages.py writes: versions, and the hashes of the files as they are now."""
        for name, files in (("hashes.txt", packages), ("hashes-dev.txt", dev)):
            (self.root / "setup" / name).write_text("# a comment\n" + "".join(map(hash_line, files)))
        versions = [hash_line(path).split(" ")[0] for path in (*packages, *dev)]
        (self.root / "constraints.txt").write_text("\n".join(["torch==2.13.0", *versions]) + "\n")

    def wheel(self, name: str, version: str) -> Path:
        return self.wheels / f"{name}-{version}-py3-none-any.whl"

    def version_of(self, package: str) -> str:
        """The version that .venv's Python imports; "" where it has none."""
        query = f"import {package}; print({package}.__version__)"
        python = self.root / ".venv" / "bin" / "python"
        return subprocess.run([python, "-c", query], capture_output=True, text=True).stdout.strip()

    def record(self) -> dict[str, object]:
        content = json.loads((self.root / ".venv" / "longhaul.json").read_text())
        assert isinstance(content, dict)
        return content

    def log(self) -> str:
        return (self.root / ".venv" / "pip.log").read_text()


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    root, wheels = tmp_path / "a clone", tmp_path / "wheels"
    root.mkdir()
    shutil.copy(PROJECT / "Makefile", root)
    for folder in ("setup", "common"):
        shutil.copytree(PROJECT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name, version in (("torch", "2.13.0"), ("alpha", "1.0"), ("alpha", "1.1"), ("tool", "3.0")):
        make_wheel(wheels, name, version)
    (root / "requirements.txt").write_text("# a comment\ntorch>=2.11,<2.14\nalpha>=1.0  # why\n")
    (root / "requirements-dev.txt").write_text("tool\n")
    index = make_index(tmp_path / "empty index", make_wheel(tmp_path / "unused", "unused", "1.0"))
    made = Copy(root, wheels, pip_environment(wheels, index))
    made.pin(made.wheel("alpha", "1.0"), dev=(made.wheel("tool", "3.0"),))
    return made


def error_lines(result: "subprocess.CompletedProcess[str]") -> list[str]:
    """Standard error without make's own closing line."""
    return [line for line in result.stderr.splitlines() if not line.startswith("make")]


def assert_one_error(result: "subprocess.CompletedProcess[str]", *words: str) -> None:
    assert result.returncode == 2, result.stdout
    (line,) = error_lines(result)
    assert line.startswith("error: ")
    for word in words:
        assert word in line


def test_made_once_and_brought_up_to_date_when_the_files_change(copy: Copy) -> None:
    first = copy.make("environment")
    assert first.returncode == 0, first.stderr
    assert (copy.version_of("torch"), copy.version_of("alpha")) == ("2.13.0", "1.0")
    assert copy.version_of("tool") == "", "the demo needs no test tools"
    made = copy.log()

    os.utime(copy.root / "requirements.txt")  # as a checkout does
    again = copy.make("environment")
    assert (again.returncode, error_lines(again), copy.log()) == (0, [], made)
    assert "install" not in again.stdout

    dev = copy.make("dev-environment")
    assert dev.returncode == 0, dev.stderr
    assert copy.version_of("tool") == "3.0"
    assert copy.log().startswith(made), "built on, not rebuilt"
    with_tools = copy.log()
    assert copy.make("environment").returncode == 0
    assert copy.make("dev-environment").returncode == 0
    assert copy.log() == with_tools

    copy.pin(copy.wheel("alpha", "1.1"), dev=(copy.wheel("tool", "3.0"),))
    changed = copy.make("environment")
    assert changed.returncode == 0, changed.stderr
    assert copy.version_of("alpha") == "1.1"
    assert copy.log().startswith(with_tools)


def start_make(copy: Copy) -> "subprocess.Popen[str]":
    """A make in a session of its own."""
    return subprocess.Popen(
        copy.command("environment", f"PYTHON={sys.executable}"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=copy.environment,
        start_new_session=True,
    )


def begin_make(copy: Copy) -> "subprocess.Popen[str]":
    """A make that has begun to fill .venv."""
    process = start_make(copy)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (copy.root / ".venv" / "longhaul.json").exists():
        assert process.poll() is None, "make ended before it began"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def test_an_environment_left_half_built_is_rebuilt(copy: Copy) -> None:
    process = begin_make(copy)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert copy.record()["whole"] is False

    again = copy.make("environment")

    assert again.returncode == 0, again.stderr
    assert "half-built" in again.stdout
    assert (copy.record()["whole"], copy.version_of("alpha")) == (True, "1.0")


def test_a_second_make_waits_for_the_first(copy: Copy) -> None:
    first = begin_make(copy)
    os.killpg(first.pid, signal.SIGSTOP)
    second = start_make(copy)
    assert second.stdout is not None
    assert any("another make is working on .venv" in line for line in iter(second.stdout.readline, ""))
    os.killpg(first.pid, signal.SIGCONT)
    outputs = [process.communicate(timeout=PATIENCE_SECONDS)[0] for process in (first, second)]

    assert (first.returncode, second.returncode) == (0, 0), outputs
    assert copy.log().count("Successfully installed alpha") == 1


def make_system_python(folder: Path, torch_version: str | None) -> Path:
    """A Python with a torch of its own, such as a cluster's module gives."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    if torch_version:
        (site_packages,) = folder.glob("lib/python3*/site-packages")
        install_by_hand(site_packages, "torch", torch_version)
    return folder / "bin" / "python"


def test_system_torch_is_kept(copy: Copy, tmp_path: Path) -> None:
    """Also a container's, whose version no package index has and which pip by itself would find too old."""
    python = make_system_python(tmp_path / "module", "2.11.0a0+1f2e3d")
    tool = make_wheel(copy.wheels, "tool", "3.0", requires="torch>=2.0")
    copy.pin(copy.wheel("alpha", "1.0"), dev=(tool,))

    result = copy.make("dev-environment", "TORCH=system", python=str(python))

    assert result.returncode == 0, result.stderr
    assert copy.version_of("torch") == "2.11.0a0+1f2e3d"
    assert (copy.version_of("alpha"), copy.version_of("tool")) == ("1.0", "3.0")
    assert not list(copy.root.glob(".venv/lib/*/site-packages/torch"))
    made = copy.log()
    assert copy.make("environment", python=None).returncode == 0
    assert copy.log() == made, "the choice need not be repeated"


@pytest.mark.parametrize("version", ["2.10.1", "2.14.0", None])
def test_system_torch_that_will_not_do_is_one_line(copy: Copy, tmp_path: Path, version: str | None) -> None:
    python = make_system_python(tmp_path / "module", version)

    result = copy.make("environment", "TORCH=system", python=str(python))

    assert_one_error(result, "TORCH=system", f"torch is {version}" if version else "has no torch")


def test_torch_from_another_index(copy: Copy, tmp_path: Path) -> None:
    index = make_index(tmp_path / "cpu", make_wheel(tmp_path / "builds", "torch", "2.13.0+cpu"))

    result = copy.make("environment", f"TORCH_INDEX={index}")

    assert result.returncode == 0, result.stderr
    assert (copy.version_of("torch"), copy.version_of("alpha")) == ("2.13.0+cpu", "1.0")
    made = copy.log()
    assert copy.make("environment").returncode == 0
    assert copy.log() == made, "the choice need not be repeated"


def test_a_failing_pip_is_one_line_and_can_be_put_right(copy: Copy) -> None:
    copy.require("torch>=2.11,<2.14\nmissing>=1\n")
    assert_one_error(copy.make("environment"), "No matching distribution found for missing", "pip.log")

    copy.require("torch>=2.11,<2.14\n")
    again = copy.make("environment")

    assert again.returncode == 0, again.stderr
    assert "half-built" in again.stdout


def test_a_package_that_is_not_the_tested_file_is_refused_by_name(copy: Copy, tmp_path: Path) -> None:
    """From a folder, and from an index that tells the hash of what it gives. Nothing of it is installed."""
    make_wheel(copy.wheels, "alpha", "1.0", requires="something-else")
    assert_one_error(copy.make("environment"), "alpha==1.0: the SHA-256 of alpha-1.0-py3-none-any.whl", "pip.log")
    assert (copy.version_of("alpha"), copy.version_of("torch")) == ("", "")

    copy.pin(copy.wheel("alpha", "1.0"), dev=(copy.wheel("tool", "3.0"),))
    other_tool = make_wheel(tmp_path / "builds", "tool", "3.0", requires="something-else")
    copy.environment["PIP_INDEX_URL"] = make_index(tmp_path / "index", other_tool)
    copy.wheel("tool", "3.0").unlink()
    copy.require("torch>=2.11,<2.14\n")
    assert_one_error(copy.make("dev-environment"), "tool==3.0: the SHA-256 of tool-3.0-py3-none-any.whl")
    assert copy.version_of("tool") == ""


def test_what_builds_a_package_from_its_source_is_not_fetched(copy: Copy) -> None:
    """pip would get it without a hash, and run it."""
    copy.wheel("tool", "3.0").unlink()
    copy.pin(copy.wheel("alpha", "1.0"), dev=(make_sdist(copy.wheels, "tool", "3.0", build_requires="unpinned"),))

    result = copy.make("dev-environment")

    assert result.returncode == 0, result.stderr
    assert (copy.version_of("tool"), "unpinned" in copy.log()) == ("3.0", False)


def test_a_package_that_has_nothing_for_this_python_is_one_line(copy: Copy) -> None:
    other = copy.wheels / "alpha-1.0-cp39-cp39-win_amd64.whl"
    copy.pin(copy.wheel("alpha", "1.0").rename(other), dev=(copy.wheel("tool", "3.0"),))
    assert_one_error(copy.make("environment"), "No matching distribution found for alpha==1.0", "PYTHON=")

    broken = make_sdist(copy.wheels, "alpha", "1.0", build_requires="nothing-that-is-here")
    copy.pin(broken, dev=(copy.wheel("tool", "3.0"),))
    assert_one_error(copy.make("environment"), "alpha-1.0.tar.gz", "can't be built", "PYTHON=")


def test_versions_and_hashes_that_disagree_are_one_line_before_anything_is_made(copy: Copy) -> None:
    (copy.root / "constraints.txt").write_text("torch==2.13.0\nalpha==1.1\ntool==3.0\n")

    assert_one_error(copy.make("environment"), "alpha", "1.1", "setup/pin_packages.py")

    assert not (copy.root / ".venv").exists()


def test_too_little_disk_is_one_line_before_anything_is_made(copy: Copy) -> None:
    assert_one_error(copy.make("environment", "FREE_GIB=1e9"), "GiB free", "TORCH_INDEX", "FREE_GIB=0")
    assert not (copy.root / ".venv").exists()


def test_a_python_without_venv_is_one_line(copy: Copy, tmp_path: Path) -> None:
    """Debian's python3 without python3-venv: the venv module is there, ensurepip is not."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text("import sys\nsys.modules['ensurepip'] = None\n")
    wrapper = tmp_path / "python3"
    wrapper.write_text(f'#!/bin/sh\nPYTHONPATH="{hidden}" exec "{sys.executable}" "$@"\n')
    wrapper.chmod(0o755)

    assert_one_error(copy.make("environment", python=str(wrapper)), "python3.", "-venv", "PYTHON=")
    assert not (copy.root / ".venv").exists()


def test_somebody_elses_environment_is_left_alone(copy: Copy) -> None:
    (copy.root / ".venv").mkdir()
    (copy.root / ".venv" / "precious").write_text("mine")

    assert_one_error(copy.make("environment"), "was not made by Longhaul")
    assert (copy.root / ".venv" / "precious").read_text() == "mine"


def test_a_link_to_a_larger_disk_stays_one(copy: Copy, tmp_path: Path) -> None:
    """.venv outside of a home folder with a small quota: nothing there yet, then half-built."""
    link, target = copy.root / ".venv", tmp_path / "scratch" / "venv"
    link.symlink_to(target)
    assert copy.make("environment").returncode == 0
    (target / "longhaul.json").write_text(json.dumps({**copy.record(), "whole": False}))
    (target / "left over").touch()

    again = copy.make("environment")

    assert again.returncode == 0, again.stderr
    assert (copy.version_of("alpha"), link.is_symlink()) == ("1.0", True)
    assert not (target / "left over").exists()


def test_a_moved_clone_gets_an_environment_of_its_own(copy: Copy) -> None:
    """A virtual environment's scripts hold the path that it was made in."""
    assert copy.make("environment").returncode == 0
    moved = copy.root.rename(copy.root.with_name("moved"))
    copy.root = moved

    assert copy.make("environment").returncode == 0

    assert copy.record()["location"] == str(moved / ".venv")
    pip = subprocess.run([moved / ".venv" / "bin" / "pip", "--version"], capture_output=True, text=True)
    assert str(moved) in pip.stdout


def test_uv_installs_the_same_where_it_is_there(copy: Copy, tmp_path: Path) -> None:
    """By pip's settings, which uv does not read by itself; with hashes; and in one line where that fails."""
    uv = f"UV={find_uv_bin()}"
    made = copy.make("dev-environment", uv)
    assert made.returncode == 0, made.stderr
    assert "uv has ended" in made.stdout and "pip has ended" not in made.stdout
    assert [copy.version_of(name) for name in ("torch", "alpha", "tool")] == ["2.13.0", "1.0", "3.0"]

    copy.require("torch>=2.11,<2.14\nmissing>=1\n")
    assert_one_error(copy.make("environment", uv), "missing: the index lacks it", "UV= takes pip")
    copy.require("torch>=2.11,<2.14\n")
    refused = copy.make("environment", "UV=")
    assert refused.returncode == 0 and "pip has ended" in refused.stdout

    other = make_wheel(tmp_path / "builds", "alpha", "1.1", requires="something-else")
    copy.pin(copy.wheel("alpha", "1.1"), dev=(copy.wheel("tool", "3.0"),))
    shutil.copy(other, copy.wheel("alpha", "1.1"))
    assert_one_error(copy.make("environment", uv), "alpha==1.1: its SHA-256 is not in setup/hashes.txt")
    assert copy.version_of("alpha") == "1.0"


def test_pips_settings_are_handed_to_uv() -> None:
    listed = "global.index-url='https://first'\n:env:.index-url='https://mirror'\ninstall.find-links='/a\\n/b'\n"
    environment = environment_for_uv({"UV_INSECURE_HOST": "mine"}, read_configuration(listed + "global.no-index='0'"))

    assert environment == {
        "UV_DEFAULT_INDEX": "https://mirror",
        "UV_FIND_LINKS": "/a,/b",
        "UV_INSECURE_HOST": "mine",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
    }


def test_uv_runs_a_command_by_its_path() -> None:
    """`uv run` finds project and Python by pyproject.toml; the environment here is that of the tests."""
    environment = os.environ | {"UV_PROJECT_ENVIRONMENT": sys.prefix}
    command = [find_uv_bin(), "run", "--no-sync", "--offline", "train/plan.py", "--help"]
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: plan.py")
