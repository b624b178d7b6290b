"""The project's own pins are complete, and setup/pin_packages.py writes them from what uv resolves."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from uv import find_uv_bin

from data_prep.corpora.docstring_sources import required_distributions
from setup.pin_packages import OF_TORCH, read_resolved, uv_settings
from setup.pins import check_pins, hash_files
from tests.setup.local_packages import make_wheel

PROJECT = Path(__file__).resolve().parents[2]
NOT_OF_THIS_MACHINE = {"UV_NO_CONFIG": "0", "UV_FIND_LINKS": ""}

RESOLVED = """\
alpha==1.0 \\
    --hash=sha256:aa \\
    --hash=sha256:ab
beta==2.0 ; sys_platform == 'win32' \\
    --hash=sha256:ba
browser==1.0 ; python_full_version >= '3.12' and sys_platform == 'emscripten' \\
    --hash=sha256:ee
nvidia-cublas==13.1 ; sys_platform == 'linux' \\
    --hash=sha256:ca
torch==2.13.0 \\
    --hash=sha256:da
torch-helper==1.0 \\
    --hash=sha256:db
triton==3.7 ; sys_platform == 'linux' \\
    --hash=sha256:ea
"""
DEV_RESOLVED = RESOLVED.replace(" ; sys_platform == 'win32'", "") + "tool==3.0 \\\n    --hash=sha256:fa\n"


def test_versions_and_hashes_agree() -> None:
    check_pins(PROJECT)


def test_uv_sync_takes_the_same_versions(tmp_path: Path) -> None:
    lines = (PROJECT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    ours = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["uv"]
    assert ours == {"constraint-dependencies": pins}
    assert len({pin.split("==")[0] for pin in pins}) == len(pins), "pip finds no version that is two"

    wheels = tmp_path / "wheels"
    for version in ("1.0", "1.1"):
        make_wheel(wheels, "alpha", version)
    project = '[project]\nname = "p"\nversion = "1"\nrequires-python = ">=3.11"\ndependencies = ["alpha>=1"]\n\n'
    (tmp_path / "pyproject.toml").write_text(project + uv_settings(["alpha==1.0"]))
    command = [find_uv_bin(), "lock", "--offline", "--no-index", "--find-links", str(wheels)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | NOT_OF_THIS_MACHINE)
    assert done.returncode == 0, done.stderr
    assert 'name = "alpha"\nversion = "1.0"' in (tmp_path / "uv.lock").read_text()


def requirements_of(lines: list[str]) -> set[str]:
    """Each as packaging writes it, without the project's own."""
    found = {str(Requirement(line)) for text in lines if (line := text.split("#")[0].strip())}
    return {line for line in found if not line.startswith("longhaul[")}


def test_the_parts_of_an_installation_are_the_requirements() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras: dict[str, list[str]] = project["optional-dependencies"]

    def with_named(extra: str) -> set[str]:
        others = [name for line in extras[extra] if line.startswith("longhaul[") for name in line[9:-1].split(",")]
        return requirements_of(extras[extra]).union(*map(with_named, others))

    needed = requirements_of((PROJECT / "requirements.txt").read_text(encoding="utf-8").splitlines())
    tools = requirements_of((PROJECT / "requirements-dev.txt").read_text(encoding="utf-8").splitlines())
    base = requirements_of(project["dependencies"])
    assert base | with_named("all") == needed and not base & with_named("all")
    assert with_named("dev") == with_named("all") | tools
    install = (PROJECT / "docs" / "install.md").read_text(encoding="utf-8")
    assert [extra for extra in extras if f"`{extra}`" not in install] == []


def test_everything_that_comes_in_here_is_pinned_by_hash() -> None:
    """What is not would be fetched without one by the last step of `make`, which brings torch."""
    for requirements, files in (
        ("requirements.txt", hash_files(PROJECT)[:1]),
        ("requirements-dev.txt", hash_files(PROJECT)),
    ):
        pins = [pin for path in files for pin in read_resolved(path.read_text())]
        assert all(pin.hashes for pin in pins)
        applicable = [Requirement(pin.line) for pin in pins]
        pinned = {canonicalize_name(r.name) for r in applicable if r.marker is None or r.marker.evaluate()}
        found = {name for name in required_distributions(PROJECT / requirements) if not OF_TORCH.match(f"{name}==")}
        assert found - pinned == {"torch"}


def test_conda_takes_the_same_versions() -> None:
    """conda hands the lines to pip in a file beside environment.yml."""
    content = yaml.safe_load((PROJECT / "environment.yml").read_text(encoding="utf-8"))
    python, pip, by_pip = content["dependencies"]
    assert pip == "pip" and by_pip == {"pip": ["-r requirements.txt", "-c constraints.txt"]}
    supported = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["requires-python"]
    assert SpecifierSet(supported).contains(python.removeprefix("python="))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    root = tmp_path / "copy"
    for folder in ("setup", "common"):
        shutil.copytree(PROJECT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__", "hashes*"))
    for name in ("requirements.txt", "requirements-dev.txt", "constraints.txt", "pyproject.toml"):
        shutil.copy(PROJECT / name, root)
    return root


def pin_packages(copy: Path, path: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(copy / "setup" / "pin_packages.py")]
    return subprocess.run(command, env=os.environ | {"PATH": str(path)}, capture_output=True, text=True)


def test_all_files_are_written_but_what_torch_pins(copy: Path, tmp_path: Path) -> None:
    """uv itself needs a network: one that knows two answers stands in."""
    stand_in = tmp_path / "bin" / "uv"
    stand_in.parent.mkdir()
    (tmp_path / "needed").write_text(RESOLVED)
    (tmp_path / "all").write_text(DEV_RESOLVED)
    stand_in.write_text(
        '#!/bin/sh\nanswer=needed; case "$*" in *requirements-dev.txt*) answer=all ;; esac\n'
        f'while [ "$1" != --output-file ]; do shift; done; while read -r line; do echo "$line"; done'
        f' < "{tmp_path}/$answer" > "$2"\n'
    )
    stand_in.chmod(0o755)

    result = pin_packages(copy, stand_in.parent)

    assert result.returncode == 0, result.stderr
    lines = [line for line in (copy / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert lines == ["alpha==1.0", "beta==2.0", "torch==2.13.0", "torch-helper==1.0", "tool==3.0"]
    settings = tomllib.loads((copy / "pyproject.toml").read_text())
    assert settings["tool"]["uv"] == {"constraint-dependencies": lines} and settings["project"]["name"] == "longhaul"
    needed, added = (read_resolved(path.read_text()) for path in hash_files(copy))
    assert [pin.line for pin in needed] == ["alpha==1.0", "beta==2.0 ; sys_platform == 'win32'", "torch-helper==1.0"]
    assert [pin.line for pin in added] == ["beta==2.0", "tool==3.0"], "on more systems than without the tools"
    assert needed[0].hashes == ("sha256:aa", "sha256:ab")
    check_pins(copy)


def test_without_uv_it_is_one_line_and_nothing_is_changed(copy: Path, tmp_path: Path) -> None:
    before = (copy / "constraints.txt").read_text()

    result = pin_packages(copy, tmp_path)

    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "pip install uv" in result.stderr
    assert (copy / "constraints.txt").read_text() == before
