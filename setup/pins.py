"""The files that pin packages: constraints.txt has the versions, setup/hashes*.txt the files of each."""

import re
from pathlib import Path

from common.errors import UserError
from setup.system_torch import is_torch

PIN = re.compile(r"([\w.-]+)==([^\s;\\]+)")


def hash_files(project: Path) -> tuple[Path, Path]:
    """What requirements.txt brings in, and what requirements-dev.txt adds."""
    return project / "setup" / "hashes.txt", project / "setup" / "hashes-dev.txt"


def check_pins(project: Path) -> None:
    """Raises UserError where constraints.txt and the files of hashes disagree: one of them was changed by hand."""
    versions = read_pins(project / "constraints.txt")
    hashed = {name: version for path in hash_files(project) for name, version in read_pins(path).items()}
    for name in sorted(versions.keys() | hashed.keys()):
        if versions.get(name) != hashed.get(name) and not is_torch(name):
            raise UserError(
                f"{name} is {versions.get(name, 'missing')} in constraints.txt and {hashed.get(name, 'missing')} in"
                " setup/hashes*.txt: run 'python setup/pin_packages.py', which writes all of them"
            )


def read_pins(path: Path) -> dict[str, str]:
    """Versions by package. Raises UserError where the file can't be read."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}): 'git checkout -- {path}' restores it") from None
    return {found[1]: found[2] for line in lines if (found := PIN.match(line))}
