"""Make the virtual environment `.venv`, once, and again only when what it was made from changes.

Runs with nothing but Python's standard library. `.venv/longhaul.json` records what the environment was made from and
whether it is whole; one that was left half-built (a killed pip, a full disk) is recognised by that and rebuilt.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # noqa: UP036  (make looks for a newer one; this is for calls of the script itself)
    sys.exit("error: Longhaul needs Python 3.11 or newer; this is " + sys.version.split()[0])

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.command_line import CommandParser
from common.errors import UserError, exit_on_user_error
from common.paths import PROJECT
from setup.pins import check_pins, hash_files
from setup.pip_install import pip_install
from setup.system_torch import is_torch, show_to, supported_version, system_torch_folder
from setup.uv_install import find_uv, uv_install

RECORD = "longhaul.json"
CHECKED = ("--require-hashes", "--no-deps")  # all that is needed is listed: nothing comes in without a hash


@dataclass(frozen=True)
class Recipe:
    """What an environment is made from. Another `python`, `torch` or `torch_index` needs a new one."""

    python: str  # "3.11"
    torch: str  # "pinned": constraints.txt's; "system": the one this Python already has
    torch_index: str  # package index that torch comes from; "": pip's own
    packages: str  # SHA-256 of requirements.txt, constraints.txt and hashes.txt

    def fits_into(self, other: Recipe) -> bool:
        """Whether an environment made by `other` can be brought up to date in place."""
        return (self.python, self.torch, self.torch_index) == (other.python, other.torch, other.torch_index)


@dataclass(frozen=True)
class Record:
    """The content of `.venv/longhaul.json`."""

    whole: bool
    location: str
    recipe: Recipe
    dev: str  # SHA-256 of requirements-dev.txt, constraints.txt and hashes-dev.txt; "": no test tools

    def write(self, folder: Path) -> None:
        temporary = folder / (RECORD + ".new")
        temporary.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        temporary.replace(folder / RECORD)

    @staticmethod
    def read(folder: Path) -> Record | None:
        try:
            content: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            return Record(**{**content, "recipe": Recipe(**content["recipe"])})
        except (OSError, ValueError, TypeError, KeyError):
            return None


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser("Make the virtual environment .venv, or bring it up to date.")
    parser.add_argument("--dev", action="store_true", help="install the tools for tests and checks as well")
    parser.add_argument(
        "--torch",
        choices=["", "pinned", "system"],
        default="",
        help="pinned: the version in constraints.txt; system: keep the one this Python has (a cluster's module, a"
        " container's); default: as the environment was made, pinned for a new one",
    )
    parser.add_argument(
        "--torch-index",
        metavar="URL",
        default="",
        help="package index to take torch from, such as PyTorch's index of CPU builds (the --index-url that the"
        " installation page of PyTorch shows); default: as the environment was made, pip's own for a new one",
    )
    parser.add_argument(
        "--uv",
        metavar="PROGRAM",
        default="uv",
        help="install with this uv where it is there, else with pip (default: uv, '' refuses it); with --torch system"
        " always with pip, which sees packages of another folder",
    )
    parser.add_argument("--match-python", action="store_true", help="rebuild if .venv has another Python than this")
    parser.add_argument(
        "--free-gib",
        type=float,
        metavar="GIB",
        help="disk space that must be free before anything is installed; default: what is usually needed, 0: any",
    )
    parser.add_argument("--folder", type=Path, default=PROJECT / ".venv", help="its folder (default: .venv)")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    with only_one_at_a_time(arguments.folder.parent) as lock:
        make_environment(arguments, lock)
    return 0


def make_environment(arguments: argparse.Namespace, lock: int | None) -> None:
    folder: Path = arguments.folder
    record = Record.read(folder)
    if record is None and folder.exists() and not is_empty(folder):
        raise UserError(f"{folder} was not made by Longhaul's make: move or delete it, then run make again")
    usable = record if record and record.whole and still_there(folder, record) else None
    check_pins(PROJECT)
    recipe = wanted_recipe(arguments, record)
    dev = digest("requirements-dev.txt", "constraints.txt", "setup/hashes-dev.txt") if arguments.dev else ""
    if usable and usable.recipe == recipe and dev in ("", usable.dev):
        return

    check_venv_module()
    if usable and not recipe.fits_into(usable.recipe):
        usable = None
    check_disk(folder, free_gib(arguments.free_gib, recipe, new=usable is None))
    unfinished = Record(whole=False, location=str(folder), recipe=recipe, dev="")
    if usable:
        unfinished.write(folder)
    else:
        if record:
            print(f"{folder.name} is {'out of date' if record.whole else 'half-built'}: rebuilding it", flush=True)
        create(folder, unfinished)
    uv = find_uv(arguments.uv) if recipe.torch == "pinned" else None
    if usable is None or usable.recipe.packages != recipe.packages:
        install_packages(folder, recipe, lock, uv)
    if dev:
        install_dev_tools(folder, recipe, lock, uv)
    replace(unfinished, whole=True, dev=dev).write(folder)


def is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def wanted_recipe(arguments: argparse.Namespace, record: Record | None) -> Recipe:
    """What is asked for; what isn't asked for stays as the environment was made."""
    this_python = "{}.{}".format(*sys.version_info)
    old = record.recipe if record else Recipe(python=this_python, torch="pinned", torch_index="", packages="")
    usable = record is not None and record.whole
    return Recipe(
        python=old.python if usable and not arguments.match_python else this_python,
        torch=arguments.torch or old.torch,
        torch_index=arguments.torch_index or ("" if arguments.torch else old.torch_index),
        packages=digest("requirements.txt", "constraints.txt", "setup/hashes.txt"),
    )


def digest(*names: str) -> str:
    return hashlib.sha256(b"\0".join((PROJECT / name).read_bytes() for name in names)).hexdigest()


def still_there(folder: Path, record: Record) -> bool:
    """Whether the environment is where it was made (its scripts hold that path) and its Python still exists."""
    made_at = Path(record.location)
    return made_at.exists() and made_at.samefile(folder) and venv_python(folder).exists()


def check_venv_module() -> None:
    try:
        import ensurepip  # noqa: F401  (Debian and Ubuntu leave it out of python3, and venv fails half-way without it)
        import venv  # noqa: F401
    except ImportError:
        version = "{}.{}".format(*sys.version_info)
        raise UserError(
            f"{sys.executable} cannot make virtual environments: install its venv module (Debian, Ubuntu: apt-get"
            f" install python{version}-venv), or name another Python: make PYTHON=/path/to/python3"
        ) from None


def free_gib(asked: float | None, recipe: Recipe, *, new: bool) -> float:
    """GiB that must be free. A CUDA build of torch unpacks to about 8, all the rest to about 2."""
    if asked is not None:
        return asked
    if not new:
        return 1.0
    cuda = sys.platform == "linux" and recipe.torch == "pinned" and not recipe.torch_index.rstrip("/").endswith("cpu")
    return 10.0 if cuda else 3.0


def check_disk(folder: Path, need_gib: float) -> None:
    """Fail now instead of in pip after ten minutes, which unpacks downloads in the folder for temporary files."""
    temporary, parent = Path(tempfile.gettempdir()), folder.resolve().parent  # it may be a link to a larger disk
    while not parent.exists():
        parent = parent.parent
    for place, gib, remedy in (
        (parent, need_gib, "on Linux without an NVIDIA driver TORCH_INDEX with PyTorch's CPU index needs 3"),
        (temporary, 0.4 * need_gib, "or name a larger folder for temporary files with TMPDIR"),
    ):
        free = shutil.disk_usage(place).free / 2**30
        if free < gib:
            raise UserError(
                f"{place} has {free:.1f} GiB free and the installation needs about {gib:.1f}: free some space;"
                f" {remedy} (FREE_GIB=0 installs anyway)"
            )


def create(folder: Path, unfinished: Record) -> None:
    """A new environment, marked as unfinished before anything is in it."""
    torch_folder = system_torch_folder() if unfinished.recipe.torch == "system" else None
    print(f"making {folder} with {sys.executable}", flush=True)
    real = folder.resolve()  # a link stays (venv itself refuses one): .venv may be on a larger disk than home
    try:
        if real.exists():
            shutil.rmtree(real)
        real.mkdir(parents=True)
        unfinished.write(folder)
    except OSError as error:  # NFS keeps files that a running program still uses
        raise UserError(f"{folder} can't be rebuilt ({error}): end programs that run from it, or move it") from None
    made = subprocess.run(
        [sys.executable, "-m", "venv", str(real)], capture_output=True, text=True, encoding="utf-8", errors="replace"
    )
    if made.returncode:
        said = (made.stdout + made.stderr).strip().splitlines() or [f"exit status {made.returncode}"]
        raise UserError(f"python -m venv {folder} failed: {said[-1]}")
    if torch_folder:
        show_to(venv_python(folder), torch_folder)


def venv_python(folder: Path) -> Path:
    return folder / "Scripts" / "python.exe" if os.name == "nt" else folder / "bin" / "python"


def install_packages(folder: Path, recipe: Recipe, lock: int | None, uv: str | None) -> None:
    """What is pinned, from files whose hashes are known; then torch, and what was added to the requirements since."""
    requirements = (PROJECT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    torch = next(line.split("#")[0].strip() for line in requirements if is_torch(line))
    constraints = PROJECT / "constraints.txt"
    if recipe.torch == "system":
        version = supported_version(venv_python(folder), torch)
        requirements = [line for line in requirements if not is_torch(line)]
        others = [line for line in constraints.read_text(encoding="utf-8").splitlines() if not is_torch(line)]
        constraints = write_lines(folder / "constraints.txt", [*others, f"torch=={version}"])
    if recipe.torch_index:
        # Without its dependencies: such an index holds few other packages, and old ones.
        index = ["--no-deps", "--index-url", recipe.torch_index, torch]
        install(folder, f"torch from {recipe.torch_index}", [*index, "--constraint", str(constraints)], lock, uv)
    hashes, _ = hash_files(PROJECT)
    install(folder, "packages", ["--requirement", str(hashes), *CHECKED], lock, uv)
    listed = write_lines(folder / "requirements.txt", requirements)
    install(folder, "remaining packages", ["--requirement", str(listed), "--constraint", str(constraints)], lock, uv)


def install_dev_tools(folder: Path, recipe: Recipe, lock: int | None, uv: str | None) -> None:
    _, hashes = hash_files(PROJECT)
    # Some come as source only: built with the pinned setuptools of this environment, not with one that pip fetches.
    build = ["--use-pep517", "--no-build-isolation"]
    install(folder, "test tools", ["--requirement", str(hashes), *CHECKED, *build], lock, uv)
    constraints = (folder if recipe.torch == "system" else PROJECT) / "constraints.txt"
    listed = PROJECT / "requirements-dev.txt"
    install(folder, "remaining tools", ["--requirement", str(listed), "--constraint", str(constraints)], lock, uv)


def install(folder: Path, what: str, arguments: list[str], lock: int | None, uv: str | None) -> None:
    """Args: uv: the program to install with; None: pip."""
    python, log = venv_python(folder), folder / "pip.log"
    if uv is None:
        pip_install(python, arguments, log=log, what=what, lock=lock)
    else:
        uv_install(uv, python, arguments, log=log, what=what, lock=lock)


def write_lines(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@contextlib.contextmanager
def only_one_at_a_time(project: Path) -> Iterator[int | None]:
    """Hold a lock on the project's folder. pip inherits it, so that one that outlives a killed make is waited for."""
    try:
        import fcntl

        lock = os.open(project, os.O_RDONLY)
    except (ImportError, OSError):  # Windows
        yield None
        return
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another make is working on .venv: waiting for it", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            pass
        yield lock
    finally:
        os.close(lock)


if __name__ == "__main__":
    exit_on_user_error(main)
