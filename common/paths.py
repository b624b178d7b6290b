"""Paths as people write them (`~`, `$VARIABLE`, relative ones that may be meant from the project's folder), and names
that files hold, which must stay in their folder.
"""

import os
import re
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TypeGuard

from common.errors import UserError

PROJECT = Path(__file__).resolve().parents[1]
MOST_NAME_BYTES = 255  # what file systems take (NAME_MAX)
MOST_PATH_BYTES = 3_800  # what the kernel takes (PATH_MAX, 4,096) less what a run's files have below its folder
MOST_PARTS = 300  # each takes frames of Python's when the folders are made
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|([A-Za-z_]\w*))")


def expand_path(path: str | Path) -> Path:
    """A path with `~`, `~user`, `$VARIABLE` and `${VARIABLE}` replaced, as a shell does it where it gets to see them.

    Also the type of a command's path argument: a shell leaves the `~` of `--out=~/x` as it is.

    Raises UserError for a variable that is not set, or empty, for a user that does not exist, and as `check_path`.
    """
    text = str(path)

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if not os.environ.get(name):
            raise UserError(f"{text}: the environment variable {name} is not set: set it, or write the path out")
        return os.environ[name]

    expanded = Path(_VARIABLE.sub(value, text))
    if text.startswith("~"):
        try:
            expanded = expanded.expanduser()
        except RuntimeError:
            raise UserError(f"{text}: no such user on this machine: write the path out") from None
    return check_path(expanded)


def check_path(path: Path) -> Path:
    """The path. Raises UserError for one that no file can have: too long, of too many parts, or with a NUL in it."""
    text = str(path)
    shown = text if len(text) <= 80 else f"{text[:80]}…"
    if "\0" in text:
        raise UserError(f"{text[:80]!r} contains a NUL, which no file name can: leave it out")
    if len(path.parts) > MOST_PARTS:
        raise UserError(f"{shown} has {len(path.parts):,} parts: give a path of at most {MOST_PARTS}")
    try:
        size, longest = len(os.fsencode(text)), max(map(len, map(os.fsencode, path.parts)), default=0)
    except UnicodeEncodeError as error:
        raise UserError(
            f"{shown} contains {text[error.start]!r}, which no file name in this locale can: leave it out"
        ) from None
    if longest > MOST_NAME_BYTES:
        raise UserError(f"{shown} contains a name of {longest:,} bytes: give one of at most {MOST_NAME_BYTES}")
    if size > MOST_PATH_BYTES:
        raise UserError(f"{shown} has {size:,} bytes: give a path of at most {MOST_PATH_BYTES:,}")
    return path


def find_path(path: str | Path) -> Path:
    """An expanded path as a configuration names it: a relative one in the working directory, or else in the project."""
    here = expand_path(path)
    return here if here.is_absolute() or here.exists() else PROJECT / here


def is_plain_name(name: object) -> TypeGuard[str]:
    """Whether a value is the name of one entry of a folder, on any system: it leads nowhere else, and can be made."""
    if not isinstance(name, str) or name in ("", "..") or _CONTROL.search(name):
        return False
    try:
        fits = len(name.encode()) <= MOST_NAME_BYTES
    except UnicodeEncodeError:  # lone surrogates
        return False
    return fits and name == PurePosixPath(name).name == PureWindowsPath(name).name


def is_inner_path(path: object) -> TypeGuard[str]:
    """Whether a value is a path below a folder with `/` between plain names, as a listing of a data set has them."""
    return isinstance(path, str) and all(map(is_plain_name, path.split("/")))
