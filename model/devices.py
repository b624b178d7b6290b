"""Facts of this process's machine that the metrics report."""

import sys

import psutil
import torch

from common.host_limits import available_memory_bytes


def peak_memory_gib(device: torch.device) -> float:
    """GiB: the most this process has had allocated on its GPU, or on a CPU resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return psutil.Process().memory_info().rss / 2**30
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # macOS counts bytes, Linux KiB


def free_memory_bytes(device: torch.device, local_world_size: int) -> int:
    """Bytes this rank may use: free on its GPU, or its share of what its host and the cgroups there have left."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory_bytes() // local_world_size
