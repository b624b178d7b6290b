"""Pin every package that Longhaul needs, with the SHA-256 of its files: constraints.txt, setup/hashes*.txt,
and pyproject.toml's last part.

Run it after a change of requirements.txt or requirements-dev.txt. Versions that constraints.txt has are kept: delete a
line there for the newest one that fits. Needs a network and the resolver uv (pip install uv, in any environment).

Every file that the package index offers of a version gets its hash: wheels for all systems and Pythons, and the source.
Without hashes are torch and what it pins (CUDA libraries, Triton): these differ by index and machine.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.command_line import CommandParser
from common.errors import UserError, exit_on_user_error
from common.paths import PROJECT
from common.publish import write_whole
from setup.pins import hash_files
from setup.system_torch import is_torch

OLDEST_PYTHON = "3.11"
OF_TORCH = re.compile(r"(nvidia|cuda)-|triton=")
ELSEWHERE = "sys_platform == 'emscripten'"  # Python in a browser

CONSTRAINTS_HEAD = """\
# Every package that requirements.txt and requirements-dev.txt bring in, at the version that is tested (CPython 3.11,
# Linux): pip install -r requirements.txt -c constraints.txt. What torch's CUDA builds add (nvidia-*, triton) torch
# itself pins. `make` installs these versions from files whose SHA-256 setup/hashes.txt or setup/hashes-dev.txt has. The
# hashes are not here, for with a single one pip demands them of everything, torch included, whose files differ by
# index. Written by setup/pin_packages.py, which keeps the versions that it finds here.
"""
# of the last part of pyproject.toml: uv reads it only there, not in a uv.toml
UV_HEAD = """\
# The versions of constraints.txt for `uv sync`, to the end of this file. Written by setup/pin_packages.py.
[tool.uv]
"""
HASHES_HEAD = """\
# {what}, without torch and what it pins (nvidia-*, cuda-*, triton), whose files
# differ by index and machine. Written by setup/pin_packages.py; the versions are those of constraints.txt.
"""


@dataclass(frozen=True)
class Pin:
    """A package at one version."""

    line: str  # "name==version", with " ; marker" where not every machine needs it
    hashes: tuple[str, ...]  # "sha256:…"

    @property
    def plain(self) -> str:
        return self.line.split(" ;")[0]

    def with_hashes(self) -> str:
        return " \\\n".join([self.line, *(f"    --hash={value}" for value in self.hashes)])


def main() -> int:
    CommandParser(__doc__).parse_args()
    requirements, dev = PROJECT / "requirements.txt", PROJECT / "requirements-dev.txt"
    constraints, (hashes, hashes_dev) = PROJECT / "constraints.txt", hash_files(PROJECT)
    everything = resolve([requirements, dev], constraints)
    write_whole(constraints, CONSTRAINTS_HEAD + text(pin.plain for pin in everything))
    settings = PROJECT / "pyproject.toml"
    rest = settings.read_text(encoding="utf-8").partition(UV_HEAD)[0].rstrip()
    write_whole(settings, f"{rest}\n\n{uv_settings(pin.plain for pin in everything)}")
    needed = [pin for pin in resolve([requirements], constraints) if not is_torch(pin.line)]
    known = {pin.line for pin in needed}  # markers included: what the tools need on more systems is in both
    added = [pin for pin in everything if pin.line not in known and not is_torch(pin.line)]
    for path, what, pins in (
        (hashes, "What requirements.txt brings in", needed),
        (hashes_dev, "What requirements-dev.txt adds to hashes.txt", added),
    ):
        write_whole(path, HASHES_HEAD.format(what=what) + text(pin.with_hashes() for pin in pins))
        print(f"{path.relative_to(PROJECT)}: {len(pins)} packages, {sum(len(pin.hashes) for pin in pins):,} files")
    return 0


def uv_settings(pins: Iterable[str]) -> str:
    """What makes `uv sync` take the tested versions."""
    listed = "".join(f'    "{pin}",\n' for pin in pins)
    return f"{UV_HEAD}constraint-dependencies = [\n{listed}]\n"


def text(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def resolve(requirements: list[Path], constraints: Path) -> list[Pin]:
    """What they bring in on any system and Python that Longhaul runs on, torch included, sorted by name."""
    uv = shutil.which("uv")
    if uv is None:
        raise UserError("uv is not on PATH: pip install uv (in any environment), it resolves for all systems at once")
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.txt"
        command = [uv, "pip", "compile", *map(str, requirements), "--constraints", str(constraints)]
        command += ["--universal", "--python-version", OLDEST_PYTHON, "--generate-hashes"]
        done = subprocess.run(
            [*command, "--no-header", "--no-annotate", "--output-file", str(found)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        if done.returncode:
            raise UserError(f"uv could not resolve the requirements: {' '.join(done.stderr.split())}")
        return read_resolved(found.read_text(encoding="utf-8"))


def read_resolved(resolved: str) -> list[Pin]:
    """The pins of uv's output, or of a file of hashes: a line for each package, continued by lines of one hash each."""
    pins = []
    for line in resolved.replace("\\\n", "").splitlines():
        pin, *hashes = re.split(r"\s+--hash=", line.rstrip())
        if pin and not pin.startswith("#") and not OF_TORCH.match(pin) and ELSEWHERE not in pin:
            pins.append(Pin(pin, tuple(hashes)))
    return pins


if __name__ == "__main__":
    exit_on_user_error(main)
