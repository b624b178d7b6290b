"""A sniff test of every rank's machine before the first step of a cluster job: a sick one is far slower than others.

What is measured are rates (more is better): of a matrix product and of copying memory, free memory, over all ranks the
rate and latency of an all-reduce, and of each node's first rank writing to the run's folder. It takes a few seconds.
Where one rank stands out all are measured once more, and only who stands out both times is named. What can't be
measured is unknown, not sick.
"""

import contextlib
import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.run_folder import RunFolder, restart_count
from model.ranks import Ranks
from train.run.outliers import medians, outliers

ELSEWHERE = math.inf  # what another rank of the node measures, or what this device does not have
GPU_SECONDS, CPU_SECONDS = 1.0, 0.15  # of each measurement; a GPU takes time to reach its clock, or to heat up
DISK_SECONDS = 3.0  # at most
DISK_BYTES = 8 << 20
REDUCTIONS = 3  # timed ones
LATENCIES = 10


@dataclass(frozen=True)
class Check:
    """What is measured: its words and unit, and which share of the others' median a healthy machine always reaches.

    CPUs and disks are shared with others, who slow them down for a while.
    """

    words: str
    unit: str
    least_gpu: float
    least_cpu: float


CHECKS = {
    "matrix_tflops": Check("matrix product", "TFLOP/s", 0.75, 0.2),
    "memory_gb_per_second": Check("copying memory", "GB/s", 0.75, 0.2),
    "free_gib": Check("free memory", "GiB", 0.8, 0.2),
    "all_reduce_gb_per_second": Check("all-reduce", "GB/s", 0.4, 0.1),
    "all_reduces_per_second": Check("small all-reduces", "a second", 0.3, 0.1),
    "disk_mb_per_second": Check("writing to the run's folder", "MB/s", 0.1, 0.1),
}


def sniff_test(folder: RunFolder, ranks: Ranks, machines: list[dict[str, Any]], nodes: list[str]) -> dict[str, Any]:
    """Measure all ranks, and judge them. All ranks call, and get the record.

    Args: machines: by rank, as `describe_rank` has them. nodes: their names, by rank.
    """
    begun = time.monotonic()
    on_gpu = ranks.device.type == "cuda"
    kinds = [(machine.get("gpu") or machine.get("cpu"), machine.get("threads")) for machine in machines]
    rates = _all_measured(folder, ranks)
    sick = judge(rates, kinds, on_gpu=on_gpu)
    if sick:
        rates = _all_measured(folder, ranks)
        sick &= judge(rates, kinds, on_gpu=on_gpu)
    return {
        "kind": "sniff_test",
        "job_id": os.environ.get("SLURM_JOB_ID", ""),
        "restart_count": restart_count(),
        "seconds": round(time.monotonic() - begun, 3),
        "nodes": nodes,
        **{name: [_rounded(rate) for rate in rates[:, place]] for place, name in enumerate(CHECKS)},
        "unknown": [[int(rank), list(CHECKS)[place]] for rank, place in np.argwhere(np.isnan(rates))],
        "sick": [
            {
                "rank": rank,
                "node": nodes[rank],
                "check": name,
                "rate": _rounded(rates[rank, list(CHECKS).index(name)]),
                "median": _rounded(medians(rates[:, list(CHECKS).index(name)], kinds)[rank]),
            }
            for rank, name in sorted(sick)
        ],
    }


def judge(rates: npt.NDArray[np.float64], kinds: list[Any], *, on_gpu: bool) -> set[tuple[int, str]]:
    """The ranks that stand out, and by which check. Args: rates: (ranks, checks). kinds: by rank, of machines."""
    return {
        (rank, name)
        for place, (name, check) in enumerate(CHECKS.items())
        for rank in outliers(rates[:, place], kinds, check.least_gpu if on_gpu else check.least_cpu)
    }


def describe(record: dict[str, Any]) -> list[str]:
    """The record for people: what is usual, who stands out, what is not known."""
    usual = [
        f"{check.words} {np.median(known):.3g} {check.unit}"
        for name, check in CHECKS.items()
        if (known := [rate for rate in record[name] if rate is not None])
    ]
    lines = [f"sniff test of {len(record['nodes'])} ranks ({record['seconds']:.1f} s): {', '.join(usual)} (medians)"]
    for found in record["sick"]:
        check = CHECKS[found["check"]]
        lines.append(
            f"WARNING: rank {found['rank']} on {found['node']} stands out: {check.words} {found['rate']:.3g} "
            f"{check.unit}, where the median of its kind is {found['median']:.3g}"
        )
    for rank, name in record["unknown"]:
        lines.append(f"not known of rank {rank} on {record['nodes'][rank]}: {CHECKS[name].words}")
    return lines


def _rounded(rate: float) -> float | None:
    return float(f"{rate:.4g}") if math.isfinite(rate) else None


def _all_measured(folder: RunFolder, ranks: Ranks) -> npt.NDArray[np.float64]:
    """Every rank's rates, (ranks, checks). All ranks call."""
    device, seconds = ranks.device, GPU_SECONDS if ranks.device.type == "cuda" else CPU_SECONDS
    measured = {
        "free_gib": _tried(lambda: free_gib(device)),
        "matrix_tflops": _tried(lambda: matrix_tflops(device, seconds)),
        "memory_gb_per_second": _tried(lambda: memory_gb_per_second(device, seconds)),
        "disk_mb_per_second": (
            _tried(lambda: disk_mb_per_second(folder.rank_file(0).parent)) if ranks.local_rank == 0 else ELSEWHERE
        ),
        **_reduced(ranks),
    }
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # what was taken here must not count in the run's own figures
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
    return np.stack(ranks.gather_array(np.array([measured[name] for name in CHECKS], dtype=np.float64)))


def _tried(measure: Callable[[], float]) -> float:
    """A measurement; NaN where it fails."""
    try:
        return measure()
    except (RuntimeError, OSError, MemoryError, ValueError):
        return math.nan


def matrix_tflops(device: torch.device, seconds: float) -> float:
    """The rate of products of square matrices, in the type of training on GPUs, in float32 on CPUs."""
    on_gpu = device.type == "cuda"
    size = 4096 if on_gpu else 384
    dtype = torch.float32
    if on_gpu:
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    a = torch.ones(size, size, device=device, dtype=dtype)
    c = torch.empty_like(a)
    return 2 * size**3 / _seconds_of(lambda: torch.mm(a, a, out=c), device, seconds) / 1e12


def memory_gb_per_second(device: torch.device, seconds: float) -> float:
    """The rate of copying within the device's memory, what is read and what is written."""
    size = 256 << 20 if device.type == "cuda" else 32 << 20
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _seconds_of(lambda: target.copy_(source), device, seconds) / 1e9


def free_gib(device: torch.device) -> float:
    """Free memory of a GPU, where another process may have been left behind."""
    return torch.cuda.mem_get_info(device)[0] / 2**30 if device.type == "cuda" else ELSEWHERE


def disk_mb_per_second(folder: Path) -> float:
    """The rate of writing to the disk, in pieces of 1 MiB, each until it is there."""
    piece, written, begun = os.urandom(1 << 20), 0, time.perf_counter()
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        while written < DISK_BYTES and time.perf_counter() - begun < DISK_SECONDS:
            file.write(piece)
            os.fsync(file.fileno())
            written += len(piece)
    return written / (time.perf_counter() - begun) / 1e6


def _seconds_of(act: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """How long an act takes: on GPUs the median of the second half, warm by then; on CPUs, which others use, the best.

    Args: seconds: for how long to repeat it.
    """
    on_gpu = device.type == "cuda"
    times: list[float] = []
    begun = time.perf_counter()
    act()  # the first time takes longer
    _wait_for(device)
    repeat = 10 if on_gpu and time.perf_counter() - begun < seconds / 10 else 1  # a device may be very slow
    until = time.perf_counter() + seconds
    while not times or time.perf_counter() < until:
        begun = time.perf_counter()
        for _ in range(repeat):
            act()
        _wait_for(device)
        times.append((time.perf_counter() - begun) / repeat)
    return float(np.median(times[len(times) // 2 :])) if on_gpu else min(times)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reduced(ranks: Ranks) -> dict[str, float]:
    """Rate (of the bytes that each rank has to send) and latency of all-reduces. All ranks call.

    An error of a collective is one of the run's own, and not caught.
    """
    names = ("all_reduce_gb_per_second", "all_reduces_per_second")
    if ranks.world_size == 1:
        return dict.fromkeys(names, ELSEWHERE)
    size = 32 << 20 if ranks.device.type == "cuda" else 2 << 20
    buffers: list[Tensor] = []
    with contextlib.suppress(RuntimeError):
        buffers = [torch.zeros(numbers, device=ranks.device) for numbers in (size // 4, 1)]
    if any(ranks.agree([not buffers])):  # then no rank measures
        return dict.fromkeys(names, math.nan)
    large, small = (
        _fastest(ranks, buffer, times) for buffer, times in zip(buffers, (REDUCTIONS, LATENCIES), strict=True)
    )
    sent = 2 * size * (ranks.world_size - 1) / ranks.world_size
    return {names[0]: sent / large / 1e9, names[1]: 1 / small}


def _fastest(ranks: Ranks, buffer: Tensor, times: int) -> float:
    """The seconds of the fastest of so many all-reduces, after one that may have to connect the ranks."""
    found = []
    for _ in range(1 + times):
        begun = time.perf_counter()
        ranks.sum_tensor(buffer)
        _wait_for(ranks.device)
        found.append(time.perf_counter() - begun)
    return min(found[1:])
