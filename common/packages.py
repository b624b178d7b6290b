"""Packages that only some commands need: what is missing is reported before a command reads or loads anything."""

from collections.abc import Mapping
from importlib.util import find_spec

from common.errors import UserError
from common.missing_packages import install_command


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
