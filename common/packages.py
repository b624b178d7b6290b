"""Packages that only some commands need: what is missing is reported before a command reads or loads anything."""

import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec

from common.errors import UserError
from common.paths import PROJECT


def require_packages(packages: Mapping[str, str], purpose: str) -> None:
    """Raises UserError naming the packages that can't be imported here, with the command that installs them.

    Args:
        packages: what pip installs them by, by the names that they are imported by.
        purpose: what needs them, as the subject of "needs".
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        command = install_command(list(dict.fromkeys(packages[name] for name in missing)))
        raise UserError(f"{purpose} needs {' and '.join(missing)}, not installed here: {command}")


def install_command(requirements: Sequence[str]) -> str:
    """A shell command that installs packages for this Python, at the versions that Longhaul is tested with."""
    python, constraints = shlex.quote(sys.executable), shlex.quote(str(PROJECT / "constraints.txt"))
    if find_spec("pip") is not None:
        command = f"{python} -m pip install"
    elif shutil.which("uv"):
        command = f"uv pip install --python {python}"
    else:
        command = f"{python} -m ensurepip && {python} -m pip install"
    return f"{command} {' '.join(requirements)} -c {constraints}"
