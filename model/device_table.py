"""What is known of devices, in one place: peaks of matrix units, memory, links, power; without torch.

Peaks follow the makers' data sheets. docs/planning.md has the addresses.
"""

import difflib
from dataclasses import dataclass

from common.errors import UserError

# Dense bf16 (fp16 on cards without bf16) tensor peak in FLOP/s, from the makers' data sheets, without sparsity. The
# first entry whose words all occur in the device's name counts, so special cards come before their family.
_PEAK_FLOPS: list[tuple[str, float]] = [
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("GH200", 989.4e12),
    ("H200 NVL", 835.5e12),
    ("H200", 989.4e12),
    ("H100 NVL", 835.5e12),
    ("H100 PCIe", 756.5e12),
    ("H100", 989.4e12),
    ("H800 PCIe", 756.5e12),
    ("H800", 989.4e12),
    ("H20", 148e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("A30", 165e12),
    ("A40", 149.7e12),
    ("RTX 6000 ADA", 364.2e12),
    ("A6000", 154.8e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("RTX 5090", 209.5e12),
    ("RTX 4090", 165.2e12),
    ("RTX 3090", 71e12),
    ("V100S", 130e12),
    ("V100 PCIE", 112e12),
    ("V100", 125e12),
    ("T4", 65e12),
    ("MI300X", 1307.4e12),  # AMD Instinct MI300X data sheet
    # One of the two dies, which torch sees as a device of its own: AMD's data sheets have 383.0 and 362.1 for both. A
    # driver may call either "MI250X/MI250"; the larger peak never overstates the MFU.
    ("MI250X", 191.5e12),
    ("MI250", 181.05e12),
]
# Words that make another device of a name above: laptop chips of a power their makers don't state, variants with other
# numbers of units, and slices of a card (multi-instance GPU).
_OTHERS = {"LAPTOP", "TI", "SUPER", "D", "MIG"}


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of one device in FLOP/s, by the name `torch.cuda.get_device_name` gives; None if unknown."""
    words = device_name.upper().replace("-", " ").replace("/", " ").split()
    if _OTHERS.intersection(words):
        return None
    for name, flops in _PEAK_FLOPS:
        if all(word in words for word in name.upper().split()):
            return flops
    return None


@dataclass(frozen=True)
class Gpu:
    """A GPU as a plan knows it.

    Attributes:
        title: as the driver names it, for `peak_flops`.
        capability: as torch has it; from (8, 0) on there is bf16.
        memory_gib: as the driver reports it, which is less than what the card is sold by.
        bandwidth: of its memory, bytes/s.
        link: bytes/s in one direction to the other GPUs of its node: NVLink, Infinity Fabric, or PCIe's x16.
        watts: of the board at full load.
        family: by which the speed model takes its shares of the peak (`train.estimates.speed`).
        source: where the figures are from.
    """

    title: str
    capability: tuple[int, int]
    memory_gib: float
    bandwidth: float
    link: float
    watts: int
    family: str
    source: str

    @property
    def flops(self) -> float:
        """Dense peak in FLOP/s."""
        flops = peak_flops(self.title)
        assert flops is not None, self.title
        return flops


PCIE3, PCIE4, PCIE5 = 15.75e9, 31.5e9, 63e9
# By the names that `train/plan.py --gpu` takes. SXM modules where a card is also sold for PCIe, unless named so.
GPUS: dict[str, Gpu] = {
    "a100-40": Gpu("A100 SXM4 40GB", (8, 0), 39.4, 1555e9, 300e9, 400, "ampere", "NVIDIA A100 data sheet"),
    "a100-80": Gpu("A100 SXM4 80GB", (8, 0), 79.2, 2039e9, 300e9, 400, "ampere", "NVIDIA A100 data sheet"),
    "a100-40-pcie": Gpu("A100 PCIE 40GB", (8, 0), 39.4, 1555e9, PCIE4, 250, "ampere", "NVIDIA A100 data sheet"),
    "a100-80-pcie": Gpu("A100 80GB PCIe", (8, 0), 79.2, 1935e9, PCIE4, 300, "ampere", "NVIDIA A100 data sheet"),
    "h100": Gpu("H100 80GB HBM3", (9, 0), 79.1, 3350e9, 450e9, 700, "hopper", "NVIDIA H100 data sheet"),
    "h100-pcie": Gpu("H100 PCIe", (9, 0), 79.1, 2000e9, PCIE5, 350, "hopper", "NVIDIA H100 PCIe product brief"),
    "h100-nvl": Gpu("H100 NVL", (9, 0), 93.1, 3900e9, PCIE5, 400, "hopper", "NVIDIA H100 data sheet"),
    "h200": Gpu("H200", (9, 0), 139.8, 4800e9, 450e9, 700, "hopper", "NVIDIA H200 data sheet"),
    "b200": Gpu("B200", (10, 0), 178.3, 8000e9, 900e9, 1000, "blackwell", "NVIDIA DGX B200 data sheet"),
    "l40s": Gpu("L40S", (8, 9), 44.4, 864e9, PCIE4, 350, "ada", "NVIDIA L40S data sheet"),
    "4090": Gpu("RTX 4090", (8, 9), 23.5, 1008e9, PCIE4, 450, "ada", "NVIDIA Ada architecture whitepaper"),
    "3090": Gpu("RTX 3090", (8, 6), 23.6, 936e9, PCIE4, 350, "ampere", "NVIDIA Ampere GA102 whitepaper"),
    "v100": Gpu("V100 SXM2 32GB", (7, 0), 31.7, 900e9, 150e9, 300, "volta", "NVIDIA V100 data sheet"),
    "t4": Gpu("T4", (7, 5), 14.6, 320e9, PCIE3, 70, "volta", "NVIDIA T4 data sheet"),
    # one of the two dies, which torch sees as a device of its own
    "mi250": Gpu("MI250", (9, 0), 63.9, 1638e9, 50e9, 280, "cdna", "AMD Instinct MI250 data sheet"),
    "mi300x": Gpu("MI300X", (9, 4), 191.5, 5300e9, 448e9, 750, "cdna", "AMD Instinct MI300X data sheet"),
}


def find_gpu(name: str) -> Gpu:
    """A GPU by the name of the table, or as the driver names it. Raises UserError with the nearest names."""
    plain = name.lower().removeprefix("nvidia-").removeprefix("amd-")
    if plain in GPUS:
        return GPUS[plain]
    near = difflib.get_close_matches(plain, GPUS, n=3, cutoff=0.5)
    near += [known for known in GPUS if known.split("-")[0] == plain.split("-")[0] and known not in near]
    raise UserError(f"--gpu {name}: not in the table: use {' or '.join(near)}" if near else
                    f"--gpu {name}: not in the table: use one of {', '.join(GPUS)}")  # fmt: skip


def gpu_of_driver(device_name: str, memory_gib: float) -> str | None:
    """The table's name of a card that a driver names so; None where it isn't there."""
    words = device_name.upper().replace("-", " ").replace("/", " ").split()
    if _OTHERS.intersection(words):
        return None
    alike = [
        (abs(gpu.memory_gib - memory_gib), name)
        for name, gpu in GPUS.items()
        if gpu.title.split()[0] in words or gpu.title.split()[-1] in words
        if gpu.flops == peak_flops(device_name) and ("PCIE" in words) == ("PCIE" in gpu.title.upper())
    ]
    distance, name = min(alike, default=(float("inf"), ""))
    return name if distance <= 0.1 * memory_gib else None
