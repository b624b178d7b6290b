"""How many processes a machine bears: the cores this process may use, and the memory that is left."""

import os
from pathlib import Path

import psutil

WORKER_BYTES = 400 << 20  # what a worker may need at worst, shared pages included
_OWN_CGROUPS = Path("/proc/self/cgroup")
_CGROUPS = Path("/sys/fs/cgroup")
_CGROUP_FILES = (  # limit, use, and within memory.stat the prefix of what counts the groups below, too
    ("", "memory.max", "memory.current", ""),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),  # of the first version
)


def available_cores() -> int:
    """Cores this process may run on: Slurm and containers narrow the CPU mask, not the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory_bytes() -> int:
    """Memory that is free or reclaimable, within the limits of the container and of the Slurm job."""
    try:
        own = _OWN_CGROUPS.read_text()
    except OSError:
        own = ""
    return min([int(psutil.virtual_memory().available), *cgroup_memory_bytes(own, _CGROUPS)])


def cgroup_memory_bytes(own: str, root: Path) -> list[int]:
    """What is left of every memory limit on a process whose /proc/self/cgroup says `own`, its groups' parents' too."""
    names = {controller: name for _, controller, name in (line.split(":", 2) for line in own.splitlines())}
    left = []
    for controller, limit_file, used_file, prefix in _CGROUP_FILES:
        folder = root / controller / names.get(controller, "/").lstrip("/")
        for group in (folder, *folder.parents):  # above the root no such files are
            try:
                limit, used = int((group / limit_file).read_text()), int((group / used_file).read_text())
                counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # no such limit, "max", or a container that doesn't show its own group
                continue
            # files that were read count as used, and give way
            cached = sum(int(counts.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
            left.append(max(0, limit - max(0, used - cached)))
    return left


def choose_workers(wanted: int | None) -> int:
    """`wanted` processes, or one per available core as far as memory allows."""
    if wanted is not None:
        return wanted
    return max(1, min(available_cores(), available_memory_bytes() // WORKER_BYTES))
