"""Paths as people write them: `~`, `$VARIABLE`, and relative ones that may be meant from the project's folder."""

import os
import re
from pathlib import Path

from common.errors import UserError

PROJECT = Path(__file__).resolve().parents[1]
MOST_PARTS = 300  # each takes frames of Python's when the folders are made
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|([A-Za-z_]\w*))")


def expand_path(path: str | Path) -> Path:
    """A path with `~`, `~user`, `$VARIABLE` and `${VARIABLE}` replaced, as a shell does it where it gets to see them.

    Also the type of a command's path argument: a shell leaves the `~` of `--out=~/x` as it is.

    Raises UserError for a variable that is not set, or empty, for a user that does not exist, and for a path of more
    folders than Python can make within each other.
    """
    text = str(path)

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if not os.environ.get(name):
            raise UserError(f"{text}: the variable {name} is not set here: set it, or write the path out")
        return os.environ[name]

    expanded = Path(_VARIABLE.sub(value, text))
    if text.startswith("~"):
        try:
            expanded = expanded.expanduser()
        except RuntimeError:
            raise UserError(f"{text}: there is no such user here: write the path out") from None
    if len(expanded.parts) > MOST_PARTS:
        raise UserError(f"{text[:80]}… has {len(expanded.parts):,} parts: give a path of at most {MOST_PARTS}")
    return expanded


def find_path(path: str | Path) -> Path:
    """An expanded path as a configuration names it: a relative one in the working directory, or else in the project."""
    here = expand_path(path)
    return here if here.is_absolute() or here.exists() else PROJECT / here
