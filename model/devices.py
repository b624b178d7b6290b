"""Which device a rank computes on, its share of the cores, and the memory that the metrics report."""

import contextlib
import os
import socket
import sys
from collections.abc import Mapping
from typing import Literal

import torch

from common.environment import whole_number
from common.errors import UserError
from common.host_limits import allowed_cores, available_memory_bytes
from common.processes import peak_resident_bytes
from model.rank_environment import given_gpus

DeviceChoice = Literal["auto", "cpu", "cuda", "mps"]
COMPILE_THREADS = "TORCHINDUCTOR_COMPILE_THREADS"  # which torch reads when it first compiles
MOST_COMPILE_THREADS = 32  # torch's own limit
MOST_THREADS = 4096  # more cores than any machine has: a mistake, at which OpenMP ends the process


def choose_device(choice: DeviceChoice, local_rank: int = 0, local_world_size: int = 1) -> torch.device:
    """The device of a local rank. `auto`: a GPU where there is one, else Apple's for a single process, else the CPU.

    Raises UserError where the choice can't be had, or `auto` would take the CPU in a job that was given GPUs.
    """
    gpus = visible_gpus()
    if choice == "auto" and gpus == 0 and (lost := lost_gpus(os.environ)):
        raise UserError(lost)
    if choice == "cuda" and gpus == 0:
        raise UserError(
            "run.device is cuda, but PyTorch sees no GPU here: use --run.device cpu, or a CUDA build of torch"
        )
    if choice == "mps" and not torch.backends.mps.is_available():
        raise UserError("run.device is mps, but PyTorch sees no Apple GPU here: use --run.device cpu")
    if choice == "cuda" or (choice == "auto" and gpus > 0):
        if gpus == 1 and local_world_size > 1 and _bound_by_launcher(local_world_size):
            return torch.device("cuda", 0)
        if local_world_size > gpus:
            raise UserError(_too_few(gpus, local_world_size))
        return torch.device("cuda", local_rank)
    if choice == "mps" or (choice == "auto" and local_world_size == 1 and torch.backends.mps.is_available()):
        return torch.device("mps")
    return torch.device("cpu")


def visible_gpus() -> int:
    """GPUs that PyTorch sees here."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def lost_gpus(environment: Mapping[str, str]) -> str:
    """What is wrong on a node of a job that sees fewer GPUs than Slurm has given it; "" where all is well."""
    given, by = given_gpus(environment)
    seen = visible_gpus()
    if seen >= given:
        return ""
    host = socket.gethostname()
    which = "no GPU" if seen == 0 else f"{seen} of the {given} GPUs"
    return (
        f"PyTorch sees {which} on {host} that Slurm has given this job ({by}): look at nvidia-smi or rocm-smi there, "
        f"leave the node out (--exclude={host}), install a torch build for GPUs if it has none, or compute on the CPU "
        "with --run.device cpu (in eval: --device cpu)"
    )


def _bound_by_launcher(local_world_size: int) -> bool:
    """Whether the launcher shows every rank a GPU of its own, which it then knows as its first (srun --gpus-per-task).

    torchrun never does; of srun's tasks on a node with fewer GPUs than tasks some would share one.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return False
    return whole_number("SLURM_GPUS_ON_NODE", local_world_size, advice="unset it") >= local_world_size


def _too_few(gpus: int, ranks: int) -> str:
    """What to do about more ranks than GPUs, however they were started."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    because = f" (CUDA_VISIBLE_DEVICES={visible})" if visible is not None else ""
    return (
        f"{ranks} ranks on {socket.gethostname()}, but PyTorch sees {gpus} GPU{'' if gpus == 1 else 's'}{because}: "
        f"use --nproc_per_node={gpus} (train/launch.py takes auto, one for each; make demo: RANKS={gpus}), or "
        'on the CPU with --run.device cpu (make demo: DEMO_OPTIONS="--run.device cpu"; in eval: --device cpu)'
    )


def share_threads(local_world_size: int) -> int:
    """Give this rank its share of the cores the scheduler allows, so that ranks don't fight over them; return it.

    An explicit OMP_NUM_THREADS wins, except torchrun's own default of 1, which would waste the other cores. The
    processes that compile kernels are shared out alike: each rank would start one for every core of the machine.

    Raises UserError where it isn't a number (of its lists, one for each level of nesting, the first counts).
    """
    name = "OMP_NUM_THREADS"
    first = {name: os.environ.get(name, "").split(",")[0]}
    chosen = whole_number(name, 0, lowest=1, highest=MOST_THREADS, environment=first)
    by_launcher = chosen == 1 and "TORCHELASTIC_RUN_ID" in os.environ
    share = max(1, allowed_cores() // local_world_size)
    threads = chosen if chosen and not by_launcher else share
    torch.set_num_threads(threads)
    _share_compile_workers(min(share, MOST_COMPILE_THREADS))
    return threads


def _share_compile_workers(share: int) -> None:
    """Unless the user has chosen."""
    if os.environ.setdefault(COMPILE_THREADS, str(share)) == str(share) and (
        config := sys.modules.get("torch._inductor.config")
    ):
        config.compile_threads = share  # type: ignore[attr-defined]  # it has read the variable already


def without_compiling() -> contextlib.AbstractContextManager[object]:
    """Around forwards of many shapes: compiled blocks run as they were written, instead of being compiled for each.

    A process without torch's compiler has compiled nothing, and does not import it for this.
    """
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


def peak_memory_gib(device: torch.device) -> float:
    """GiB: the most this process has had allocated on its GPU, or on a CPU resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return peak_resident_bytes() / 2**30


def free_memory_bytes(device: torch.device, local_world_size: int) -> int:
    """Bytes this rank may use: free on its GPU, or its share of what its host and the cgroups there have left."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory_bytes() // local_world_size
