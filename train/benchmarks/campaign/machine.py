"""What the machine is, and what it can do at most: names, versions, memory's and matrix products' rates."""

import hashlib
import platform
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import metadata
from typing import Any

import psutil
import torch

from common.host_limits import allowed_cores
from common.paths import PROJECT
from common.version import VERSION
from train.benchmarks.step_worker import synchronise

PACKAGES = ("torch", "triton", "numpy", "transformers", "tiktoken", "safetensors", "jsonargparse", "pydantic", "pytest")
SOURCES = ("common", "data_prep", "eval", "model", "train")
QUERY = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
COPY_BYTES, TINY_COPY_BYTES = 4 << 30, 16 << 20
REPEATS = 10


def facts(device: torch.device, *, tiny: bool) -> dict[str, Any]:
    cuda = device.type == "cuda"
    free, total = torch.cuda.mem_get_info(device) if cuda else (None, None)
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.machine(),
        "capability": list(torch.cuda.get_device_capability(device)) if cuda else None,
        "device_bytes": total,
        "device_free_bytes": free,
        "nvidia_smi": _nvidia_smi(),
        "torch_cuda": torch.version.cuda,
        "torch_hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": allowed_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "packages": _versions(),
        "longhaul": VERSION,
        "revision": _revision(),
        "sources_sha256": _sources_sha256(),
        "rates": rates(device, tiny=tiny),
    }


def _nvidia_smi() -> dict[str, str] | None:
    """Driver, clocks, power: only read."""
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    first = done.stdout.decode(errors="replace").strip().partition("\n")[0]
    return dict(zip(QUERY.split(","), (value.strip() for value in first.split(",")), strict=False))


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _revision() -> str | None:
    """Git's; None outside a checkout, or without git."""
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=PROJECT, capture_output=True, timeout=20, check=True)
        return done.stdout.decode().strip()
    return None


def _sources_sha256() -> str:
    """What tells one copy of the sources from another where there is no git."""
    digest = hashlib.sha256()
    for room in SOURCES:
        for path in sorted((PROJECT / room).rglob("*.py")):
            digest.update(f"{path.relative_to(PROJECT).as_posix()}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def rates(device: torch.device, *, tiny: bool) -> dict[str, float]:
    """Bytes copied a second (read and written both counted), FLOP/s of matrix products at the step's shapes."""
    count = (TINY_COPY_BYTES if tiny else COPY_BYTES) // 2
    one, other = (torch.zeros(count // 2, dtype=torch.bfloat16, device=device) for _ in range(2))
    found = {"copy_bytes_per_second": 2 * one.nbytes / seconds_of(partial(other.copy_, one), device)}
    del one, other
    rows = 64 if tiny else 32 * 1024
    for name, inner, outer in (("124m_mlp", 768, 3072), ("124m_head", 768, 50_304), ("1p3b_mlp", 2048, 8192)):
        if tiny and outer > 10_000:
            continue
        left = torch.randn(rows, inner, device=device, dtype=torch.bfloat16)
        right = torch.randn(inner, outer, device=device, dtype=torch.bfloat16)
        seconds = seconds_of(partial(torch.mm, left, right), device)
        found[f"{name}_flops"] = 2 * rows * inner * outer / seconds
        del left, right
    return found


def seconds_of(work: Callable[[], Any], device: torch.device, repeats: int = REPEATS) -> float:
    """Of one time, on average, after one that warms up."""
    work()
    synchronise(device)
    started = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronise(device)
    return (time.perf_counter() - started) / repeats
