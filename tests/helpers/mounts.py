"""File systems with faults of their own, for tests: small ones that fill up, and read-only ones."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, kibibytes: int) -> Iterator[Path]:
    """Mount a tmpfs of this size on `folder`. Skips the test where that isn't allowed."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system takes root")
    folder.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Take up all that is free with a file; return it."""
    path = folder / "filler"
    with open(path, "wb", buffering=0) as filler:
        for size in (4096, 1):
            with suppress(OSError):
                while filler.write(bytes(size)):
                    pass
    return path


def make_read_only(folder: Path) -> None:
    """Turn a mounted small disk read-only, as a file system does that has found itself damaged.

    Raises BlockingIOError while a file is being written.
    """
    done = subprocess.run(["mount", "-o", "remount,ro", str(folder)], capture_output=True, text=True)
    if done.returncode != 0:
        raise BlockingIOError(done.stderr)


@contextmanager
def read_only_from_now_on(folder: Path, aside: Path) -> Iterator[None]:
    """Let nothing be made or renamed below a folder, whatever is open there. Skips the test if that isn't allowed.

    A mount can't be made read-only while a file is open for writing through it, so it is made so at `aside`, a folder
    of its own, where nobody writes, and comes to `folder` in one step, as a copy that is read-only from its beginning.
    """
    if os.geteuid() != 0:
        pytest.skip("mounting a folder takes root")
    aside.mkdir()
    mounted = subprocess.run(["mount", "--bind", str(folder), str(aside)], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"no folder can be mounted here: {mounted.stderr.strip()}")
    with ExitStack() as undo:
        undo.callback(subprocess.run, ["umount", "-l", str(aside)], check=True)
        subprocess.run(["mount", "-o", "remount,ro,bind", str(aside)], check=True)
        subprocess.run(["mount", "--bind", str(aside), str(folder)], check=True)
        undo.callback(subprocess.run, ["umount", "-l", str(folder)], check=True)
        yield
