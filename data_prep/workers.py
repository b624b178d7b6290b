"""How many processes a machine bears: the cores this process may use, and the memory that is left."""

import os
from pathlib import Path

import psutil

WORKER_BYTES = 400 << 20  # what a worker may need at worst, shared pages included
_CGROUP_LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def available_cores() -> int:
    """Cores this process may run on: Slurm and containers narrow the CPU mask, not the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory_bytes() -> int:
    """Memory that is free or reclaimable, within the container's limit."""
    available = int(psutil.virtual_memory().available)
    for limit_file, used_file in _CGROUP_LIMITS:
        try:
            limit, used = int(Path(limit_file).read_text()), int(Path(used_file).read_text())
        except (OSError, ValueError):  # no such limit, or "max"
            continue
        available = min(available, max(0, limit - used))
    return available


def choose_workers(wanted: int | None) -> int:
    """`wanted` processes, or one per available core as far as memory allows."""
    if wanted is not None:
        return wanted
    return max(1, min(available_cores(), available_memory_bytes() // WORKER_BYTES))
