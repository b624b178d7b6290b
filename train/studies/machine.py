"""How many runs this machine trains at a time, and with what."""

import os
import shutil
import subprocess

from common.errors import UserError
from common.host_limits import allowed_cores
from train.studies.work_queue import Slot

VISIBLE = "CUDA_VISIBLE_DEVICES"


def find_gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them; none where there are none. Without torch, which would take one."""
    if VISIBLE in os.environ:
        return [name for name in os.environ[VISIBLE].split(",") if name.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
            capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=60,
            check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.split()


def make_slots(jobs: int | None, threads: int | None, gpus: list[str]) -> list[Slot]:
    """One for each GPU, or, without any, as many as there are cores for.

    Args:
        jobs: at a time; more than GPUs share them. threads: of each; None: on CPUs 1, beside GPUs a part of the cores.
    """
    for name, value in (("--jobs", jobs), ("--threads", threads)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}: use 1 or more")
    cores = allowed_cores()
    jobs = jobs or len(gpus) or max(1, cores // (threads or 1))
    threads = threads or (max(1, cores // jobs) if gpus else 1)
    slots = []
    for number in range(jobs):
        environment = {"OMP_NUM_THREADS": str(threads)}
        slots.append(Slot(environment | ({VISIBLE: gpus[number % len(gpus)]} if gpus else {})))
    return slots
