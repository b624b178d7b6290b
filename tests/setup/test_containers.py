"""The container recipes: linted, held to each other, and the Dockerfile built with installers that install nothing.

docs/install.md says what was built in full, and how.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
# what tests/setup/test_make_environment.py makes an environment from
NEEDED = {"Makefile", "requirements.txt", "requirements-dev.txt", "constraints.txt", "setup", "common"}
DOCKERFILE = (PROJECT / "Dockerfile").read_text(encoding="utf-8")
DEFINITION = (PROJECT / "slurm" / "longhaul.def").read_text(encoding="utf-8")


def section(name: str) -> list[str]:
    """The lines of a section of the Apptainer recipe."""
    found = re.search(rf"^%{name}\n(.*?)(?=^%|\Z)", DEFINITION, flags=re.MULTILINE | re.DOTALL)
    assert found is not None
    return [line.strip() for line in found[1].splitlines() if line.strip()]


@pytest.mark.parametrize(
    ("command", "text"),
    [
        (["hadolint", "-"], DOCKERFILE),
        *((["shellcheck", "-s", "sh", "-"], "\n".join(section(name))) for name in ("post", "environment", "runscript")),
    ],
)
def test_linters_find_nothing(command: list[str], text: str) -> None:
    done = subprocess.run(
        [BIN / command[0], *command[1:]], input=text, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_both_copy_what_the_environment_is_made_from_and_make_it() -> None:
    before, _, _ = DOCKERFILE.partition("RUN make environment")
    copied = {word for line in re.findall(r"^COPY (.*)", before, re.MULTILINE) for word in line.split()[:-1]}
    files = dict(line.split() for line in section("files"))

    assert copied == files.keys() == NEEDED
    assert {Path(target) for target in files.values()} == {Path("/opt/longhaul") / name for name in NEEDED}
    assert "make environment PYTHON=python3 FREE_GIB=0" in section("post")
    for base in (
        re.search("^ARG BASE=(.*)\nFROM \\$BASE$", DOCKERFILE, re.M),
        re.search("^From: (.*)", DEFINITION, re.M),
    ):
        assert base is not None and base[1] == "python:3.12-slim-bookworm"


@pytest.mark.skipif(
    shutil.which("buildah") is None or os.geteuid() != 0, reason="needs buildah (apt-get install buildah) and root"
)
def test_the_dockerfile_builds_on_a_base_whose_installers_install_nothing(tmp_path: Path) -> None:
    """A shell, and programs that write down what they are asked: what is copied, in which order, what is left out."""
    base = tmp_path / "base"
    tools = ["buildah", "--root", tmp_path / "root", "--runroot", tmp_path / "run", "--storage-driver", "vfs"]
    shell = Path(shutil.which("dash") or "/bin/sh").resolve()
    libraries = re.findall(r"(/\S+) \(0x", subprocess.check_output(["ldd", shell], text=True, encoding="utf-8"))
    for source, target in [(str(shell), "/bin/sh"), *((library, library) for library in libraries)]:
        (base / target.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(source).resolve(), base / target.lstrip("/"))
    for program in ("apt-get", "make", "rm"):
        (base / "bin" / program).write_text(f'#!/bin/sh\necho {program} "$@" >> /asked\n')
        (base / "bin" / program).chmod(0o755)
    (tmp_path / "Base").write_text("FROM scratch\nCOPY . /\nENV PATH=/bin\n")

    def start(*words: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*map(str, (*tools, *words))], capture_output=True, text=True, encoding="utf-8")

    def buildah(*words: object) -> str:
        done = start(*words)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    buildah("bud", "-q", "-f", tmp_path / "Base", "-t", "localhost/base", base)
    runs = start("run", "--isolation", "chroot", buildah("from", "localhost/base"), "/bin/sh", "-c", ":")
    if runs.returncode:
        pytest.skip(f"buildah can't run a shell in an image here: {runs.stderr.strip()[-200:]}")
    how = ("--isolation", "chroot", "--build-arg", "BASE=localhost/base", "--build-arg", "TORCH_INDEX=https://index")
    buildah("bud", "-q", *how, "-t", "localhost/longhaul", PROJECT)
    container = buildah("from", "localhost/longhaul")
    root = Path(buildah("mount", container))

    asked = (root / "asked").read_text(encoding="utf-8").splitlines()
    inside = {path.name for path in (root / "opt" / "longhaul").iterdir()}
    buildah("umount", container)
    assert "apt-get install -y --no-install-recommends g++ git make" in asked
    assert "make environment PYTHON=python3 TORCH_INDEX=https://index FREE_GIB=0" in asked
    assert {"longhaul.py", "train", "eval", "model", "slurm", "docs", *NEEDED} <= inside
    assert not inside & {".git", ".venv", "tests", "records", "data", "runs"}
    entry = buildah("inspect", "--type", "image", "--format", "{{.OCIv1.Config.Entrypoint}}", "localhost/longhaul")
    path = buildah("inspect", "--type", "image", "--format", "{{.OCIv1.Config.Env}}", "localhost/longhaul")
    assert entry == "[python]" and "PATH=/opt/longhaul/.venv/bin:/bin" in path


def test_a_job_can_use_the_image_as_the_recipe_says(tmp_path: Path) -> None:
    shutil.copy(PROJECT / "slurm" / "site_environment.sh", tmp_path)
    lines = [line for line in section("help") if line.startswith(("in_container=", "LONGHAUL_PYTHON="))]
    (tmp_path / "site.sh").write_text("\n".join(lines))
    shell = f'. "{tmp_path}/site_environment.sh"; printf "%s\\n" "${{in_container[@]}}" "$LONGHAUL_PYTHON"'
    done = subprocess.run(["bash", "-c", shell], cwd=tmp_path, capture_output=True, text=True, encoding="utf-8")

    words = ["apptainer", "exec", "--nv", "--bind", str(tmp_path), "/shared/images/longhaul.sif"]
    assert done.stdout.splitlines() == [*words, "/opt/longhaul/.venv/bin/python"], done.stderr
