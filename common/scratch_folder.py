"""A temporary folder that a killed process does not leave behind for ever: the next process that needs one sweeps."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def scratch_folder(prefix: str) -> Iterator[Path]:
    """A new folder among the temporary files, deleted after the block; those whose makers are dead are deleted first.

    A lock on the folder shows that its maker is alive, in another container too, whose process ids mean nothing here.
    """
    for left in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        _delete_if_left(left)
    unlocked = Path(tempfile.mkdtemp(prefix=f".{prefix}"))  # a name that nobody sweeps
    with _locked(unlocked):
        folder = unlocked.rename(unlocked.with_name(unlocked.name.removeprefix(".")))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold a folder's lock inside the block if it can be had: False where another process has it."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _delete_if_left(folder: Path) -> None:
    with contextlib.suppress(OSError), _locked(folder) as nobody_has_it:  # another user's, or already gone
        if nobody_has_it:
            shutil.rmtree(folder, ignore_errors=True)
