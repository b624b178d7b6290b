"""A small disk of the harness's own that can be filled, and damage to files."""

import contextlib
import ctypes
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
FILLER = "filler"


def own_mounts() -> bool:
    """Give this process mounts of its own, which vanish with it; False where the system does not allow it.

    Without root it becomes root of a user namespace. Call before any thread starts.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if user == 0:
        if libc.unshare(CLONE_NEWNS) != 0:
            return False
    else:
        if libc.unshare(CLONE_NEWNS | CLONE_NEWUSER) != 0:
            return False
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    return subprocess.run(["mount", "--make-rprivate", "/"], capture_output=True).returncode == 0


def mount_memory(folder: Path, mebibytes: int) -> bool:
    """Put a tmpfs of this size at `folder`; False where that is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "longhaul-chaos", str(folder)]
    return subprocess.run(command, capture_output=True).returncode == 0


@contextlib.contextmanager
def filled(folder: Path, leave_bytes: int) -> Iterator[None]:
    """Fill the file system of `folder` but for so many bytes."""
    path = folder / FILLER
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for block in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while os.write(descriptor, bytes(block)):
                    pass
        os.close(descriptor)
        if leave_bytes:
            os.truncate(path, max(0, path.stat().st_size - leave_bytes))
        yield
    finally:
        path.unlink(missing_ok=True)


def truncate(path: Path, chance: random.Random) -> None:
    """Cut a file off at a random byte."""
    os.truncate(path, chance.randrange(path.stat().st_size))


def flip_bit(path: Path, chance: random.Random) -> None:
    """Turn one random bit of a file around."""
    with open(path, "r+b") as file:
        place = chance.randrange(path.stat().st_size)
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 1 << chance.randrange(8)]))
