"""What this process may use of its machine: cores and memory, within what Slurm and containers allow."""

import os
import re
from pathlib import Path, PurePosixPath

import psutil

_OWN_GROUPS = Path("/proc/self/cgroup")
_MOUNTS = Path("/proc/self/mountinfo")
_V1_FILES = (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_")  # total_: with the groups below
_V2_FILES = (("memory.max", "memory.high"), "memory.current", "")  # above high the kernel slows a group to a crawl


def allowed_cores() -> int:
    """Cores that this process may run on: Slurm, containers and taskset give less than the machine has.

    OMP_NUM_THREADS does not count here: it is about threads, not cores.
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory_bytes() -> int:
    """Memory that is free or reclaimable, within the limits of the container and of the Slurm job."""
    try:
        limits = cgroup_memory_bytes(
            *(file.read_text(encoding="utf-8", errors="replace") for file in (_OWN_GROUPS, _MOUNTS))
        )
    except OSError:  # no Linux
        limits = []
    return min([int(psutil.virtual_memory().available), *limits])


def cgroup_memory_bytes(own: str, mounts: str) -> list[int]:
    """Bytes left of every memory limit on a process: of its groups and of those around them, of both versions.

    Args:
        own: its /proc/self/cgroup. mounts: its /proc/self/mountinfo.
    """
    names = {controllers: name for _, controllers, name in (line.split(":", 2) for line in own.splitlines())}
    by_controller = {controller: name for controllers, name in names.items() for controller in controllers.split(",")}
    left = []
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")  # optional fields, of any number, end at the dash
        files: tuple[tuple[str, ...], str, str]
        root, point = (_unescaped(field) for field in before.split()[3:5])
        kind, _, options = after.split()[:3]
        if kind == "cgroup" and "memory" in options.split(","):
            controller, files = "memory", _V1_FILES
        elif kind == "cgroup2":
            controller, files = "", _V2_FILES
        else:
            continue
        folder = Path(point, _below(root, by_controller.get(controller, "/")))
        left += [_left(group, *files) for group in (folder, *folder.parents) if group.is_relative_to(point)]
    return [amount for amount in left if amount is not None]


def _below(root: str, name: str) -> PurePosixPath:
    """A group's path below a mount that shows the groups from `root` on; `.` for one that can't be seen there."""
    path = PurePosixPath(name)
    if ".." in path.parts:  # of another namespace
        return PurePosixPath()
    return path.relative_to(root if path.is_relative_to(root) else "/")


def _left(group: Path, limit_files: tuple[str, ...], used_file: str, prefix: str) -> int | None:
    """Bytes left of a group's limit; None where it has none, or is not shown."""
    limits = [limit for name in limit_files if (limit := _number(group / name)) is not None]
    used = _number(group / used_file)
    if not limits or used is None:
        return None
    try:
        counts = dict(line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
        # files that were read count as used, and give way
        used -= sum(int(counts.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
    except (OSError, ValueError):
        pass
    return max(0, min(limits) - max(0, used))


def _number(path: Path) -> int | None:
    try:
        return int(path.read_bytes())
    except (OSError, ValueError):  # not there, or "max"
        return None


def _unescaped(field: str) -> str:
    r"""A path of mountinfo, where blanks and backslashes stand as \040 and \134."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)
