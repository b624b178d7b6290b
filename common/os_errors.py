"""Errors of the file system and the kernel in words: what is wrong, then what to do about this very error."""

import errno
import os
from pathlib import Path

_ADVICE = {
    "EACCES": "change its owner or its mode (chmod), or those of a folder above it, or name another path",
    "EPERM": "change its owner or its mode (chmod), or name another path",
    "EROFS": "its file system is read-only: name another path",
    "ENOSPC": "free some space, or name a path on another disk",
    "EDQUOT": "free some space within your quota, or name a path on another disk",
    "EFBIG": "raise the limit of a file's size (ulimit -f)",
    "ENAMETOOLONG": "give a shorter name",
    "ELOOP": "its links form a loop: fix them",
    "ENOTDIR": "a file is where a folder should be: name another path",
    "EISDIR": "a folder is where a file should be: name another path",
    "EEXIST": "a file or a dangling link already has this name: move it away",
    "EMFILE": "raise the limit of open files (ulimit -n)",
    "ENFILE": "the machine has too many open files: end other programs",
}
ADVICE = {getattr(errno, name): words for name, words in _ADVICE.items() if hasattr(errno, name)}
# What no program can foresee: these are for people to mend. (ENOENT is not among them: what is expected to be there
# and isn't has a message where it is looked for.)
SURROUNDINGS = set(ADVICE) - {errno.EEXIST}


def what_to_do(error: OSError, otherwise: str = "") -> str:
    """The advice for an error, or `otherwise` where it has none of its own."""
    return ADVICE.get(error.errno or 0, otherwise)


def refusal(act: str, error: OSError, path: Path | str | None = None, *, otherwise: str = "") -> str:
    """`PATH can't be read (Permission denied): change its owner or …`, in one line.

    Args:
        act: read, written, made.
        path: where the error names none, or another than people know.
        otherwise: what to do about an error that has no advice of its own.
    """
    name = path if path is not None else error.filename if error.filename is not None else "a file"
    advice = what_to_do(error, otherwise)
    why = error.strerror or str(error) or type(error).__name__
    return (
        f"{os.fspath(name) if isinstance(name, Path) else name} can't be {act} ({why}){f': {advice}' if advice else ''}"
    )


def is_of_surroundings(error: BaseException) -> bool:
    """Whether an error is of a named file and of a kind that only people can mend."""
    return isinstance(error, OSError) and error.filename is not None and error.errno in SURROUNDINGS
