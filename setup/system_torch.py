"""Keeping the torch that a Python already has: a cluster's module, a container's, one built from source."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

from common.errors import UserError


def system_torch_folder() -> Path:
    """The folder that this process imports torch from. Raises UserError where there is none."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise UserError(
            f"TORCH=system: {sys.executable} has no torch: load your cluster's module for it, or use TORCH=pinned"
        )
    return Path(found.origin).parents[1]


def show_to(python: Path, folder: Path) -> None:
    """Let the environment of `python` import what is in `folder`; its own packages come first all the same."""
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = subprocess.run(
        [python, "-c", query], capture_output=True, text=True, encoding="utf-8", errors="replace", check=True
    ).stdout.strip()
    (Path(packages) / "system_torch.pth").write_text(f"{folder}\n", encoding="utf-8", errors="surrogateescape")


def supported_version(python: Path, requirement: str) -> str:
    """The version of the torch that `python` imports.

    Raises UserError if it does not import, or if `requirement` ("torch>=2.11,<2.14") excludes it.
    """
    query = "import torch; print(torch.__version__)"
    answer = subprocess.run([python, "-c", query], capture_output=True, text=True, encoding="utf-8", errors="replace")
    if answer.returncode:
        raise UserError(f"TORCH=system: torch can't be imported: {answer.stderr.strip().splitlines()[-1]}")
    version = answer.stdout.strip()
    low, high = (tuple(map(int, bound.split("."))) for bound in re.findall(r"[>=<]+(\d+\.\d+)", requirement))
    release = tuple(map(int, version.split(".")[:2]))  # containers have versions such as 2.12.0a0+1f2e3d: 2.12 to us
    if not low <= release < high:
        raise UserError(f"TORCH=system: torch is {version}, but Longhaul supports {requirement}: use TORCH=pinned")
    return version


def is_torch(line: str) -> bool:
    """Whether a line of a requirements or constraints file names torch itself."""
    return re.match(r"torch(?![-\w])", line) is not None
