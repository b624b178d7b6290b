"""What a plan is made for: a card of the table, or the machine at hand; without torch."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.host_limits import available_memory_bytes
from model.device_table import GPUS, Gpu, find_gpu, gpu_of_driver
from model.number_formats import Dtype, cuda_dtype
from train.estimates.run_memory import Room
from train.estimates.speed import Cluster
from train.settings.sections import Config

# Of a card's memory, beside what PyTorch allocates: the driver's context and libraries, and NCCL's buffers.
CONTEXT_BYTES, NCCL_BYTES = 600 << 20, 400 << 20
CPU_FLAGS = ("amx_tile", "avx512_bf16")  # of cores that multiply in bf16 (model.precision asks torch for the same)


@dataclass(frozen=True)
class Machine:
    """Equal ranks on equal nodes.

    Attributes:
        name: by which it was asked for. gpu: what is known of its card; None on a CPU, or an unknown card.
        memory: bytes of a rank's device.
    """

    name: str
    device_type: str
    gpu: Gpu | None
    nodes: int
    ranks_per_node: int
    memory: int

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def reserved(self) -> int:
        """Bytes of the device that others than PyTorch's allocator take."""
        if self.device_type != "cuda":
            return 0
        return CONTEXT_BYTES + (NCCL_BYTES if self.world_size > 1 else 0)

    @property
    def room(self) -> Room:
        return Room(self.device_type, self.world_size, self.memory - self.reserved)

    @property
    def cluster(self) -> Cluster | None:
        """As the speed model takes it; None where nothing is known."""
        return None if self.gpu is None else Cluster(self.gpu, self.nodes, self.ranks_per_node)

    def dtype(self, config: Config) -> tuple[Dtype, str]:
        """What `auto` means here, and why."""
        if config.run.dtype != "auto":
            return config.run.dtype, "as asked"
        if self.gpu is not None:
            return cuda_dtype(self.gpu.capability, self.name)
        if self.device_type == "cuda":
            return "bf16", f"{self.name} is taken to multiply in bf16"
        if any(flag in _cpu_flags() for flag in CPU_FLAGS):
            return "bf16", "this CPU multiplies in bf16"
        return "fp32", "this CPU has no bf16 multiplication"


def machine_of(name: str, nodes: int, gpus_per_node: int) -> Machine:
    """Cards of the table. Raises UserError for an unknown one."""
    gpu = find_gpu(name)
    return Machine(name.lower(), "cuda", gpu, nodes, gpus_per_node, int(gpu.memory_gib * 2**30))


def machine_at_hand(config: Config, ranks: int | None) -> Machine:
    """This machine's GPUs, by its driver, or its CPU. Args: ranks: None: one for each GPU.

    Raises UserError where the configuration asks for a GPU and there is none.
    """
    cards = [] if config.run.device in ("cpu", "mps") else nvidia_cards()
    if not cards:
        if config.run.device == "cuda":
            raise UserError("run.device is cuda, but nvidia-smi shows no GPU here: give --gpu, or --run.device cpu")
        count = ranks or 1
        return Machine("this CPU", "cpu", None, 1, count, available_memory_bytes() // count)
    title, gib = cards[0]
    known = gpu_of_driver(title, gib)
    return Machine(title, "cuda", GPUS[known] if known else None, 1, ranks or len(cards), int(gib * 2**30))


def nvidia_cards() -> list[tuple[str, float]]:
    """Name and GiB of each card that this process may use; [] without a driver."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command, capture_output=True, check=True, timeout=20, encoding="utf-8", errors="replace", env=os.environ
        )
    except (OSError, subprocess.SubprocessError):
        return []
    cards = []
    for line in done.stdout.splitlines():
        title, _, mebibytes = line.rpartition(",")
        if mebibytes.strip().isdigit():
            cards.append((title.strip(), int(mebibytes) / 1024))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return cards if visible is None else cards[: len([part for part in visible.split(",") if part.strip()])]


def _cpu_flags() -> set[str]:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("flags"):
                return set(line.partition(":")[2].split())
    except OSError:
        pass
    return set()
