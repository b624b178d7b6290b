"""What a rank runs on."""

import os
import platform
import socket
from pathlib import Path
from typing import Any

import torch

from common.host_limits import allowed_cores
from common.processes import node_name
from model.ranks import Ranks


def describe_rank(ranks: Ranks, threads: int) -> dict[str, Any]:
    """This rank's machine: host, device, threads, cores the scheduler lets it use."""
    device: dict[str, Any] = {"device": str(ranks.device)}
    if ranks.device.type == "cuda":
        properties = torch.cuda.get_device_properties(ranks.device)
        device |= {"gpu": properties.name, "gpu_memory_gib": round(properties.total_memory / 2**30, 1)}
    return {
        "rank": ranks.rank,
        "host": socket.gethostname(),
        "node": node_name(),
        **device,
        "threads": threads,
        "cores_allowed": allowed_cores(),
        "cpu": _cpu_name(),
        "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
