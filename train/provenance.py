"""Where a run came from: command, source revision, versions, machines. Named facts only, never the environment."""

import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from common.publish import write_json_whole
from model.ranks import Ranks, allowed_cores
from train.config import PROJECT

PACKAGES = ("torch", "numpy", "tiktoken", "safetensors", "jsonargparse", "wandb", "triton")
MAX_DIFF_CHARACTERS = 200_000


def describe_rank(ranks: Ranks, threads: int) -> dict[str, Any]:
    """This rank's machine: host, device, threads, cores the scheduler lets it use."""
    device: dict[str, Any] = {"device": str(ranks.device)}
    if ranks.device.type == "cuda":
        properties = torch.cuda.get_device_properties(ranks.device)
        device |= {"gpu": properties.name, "gpu_memory_gib": round(properties.total_memory / 2**30, 1)}
    return {
        "rank": ranks.rank,
        "host": socket.gethostname(),
        **device,
        "threads": threads,
        "cores_allowed": allowed_cores(),
        "cpu": _cpu_name(),
        "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }


def record_start(path: Path, machines: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    """Add this start to `provenance.json`, which lists all starts of a run."""
    try:
        starts = json.loads(path.read_text())["starts"]
    except (OSError, ValueError, KeyError):
        starts = []
    starts.append(
        {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": shlex.join([sys.executable, *sys.argv]),
            **_source(),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "packages": _versions(),
            "cuda": torch.version.cuda,
            "ranks": machines,
            **facts,
        }
    )
    write_json_whole(path, {"starts": starts})


def _source() -> dict[str, Any]:
    """The git revision and what differs from it, or nulls outside a checkout."""
    revision = _git("rev-parse", "HEAD")
    diff = _git("diff", "HEAD") if revision else None
    return {"revision": revision, "diff": diff[:MAX_DIFF_CHARACTERS] if diff else diff}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(  # a file that differs may be in any encoding
            ["git", *arguments], cwd=PROJECT, capture_output=True, text=True, errors="replace", timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
