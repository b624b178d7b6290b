"""Published speeds that the model of `train.estimates.speed` was fitted on, and others that it is held against.

Tokens a second and GPU. llm-foundry's are from its scripts/train/benchmarking/README.md (bf16 autocast, FSDP, no
recomputation). Of them 125M and 1.3B were fitted; those between, and the other lengths, were not looked at for it.
"""

from dataclasses import dataclass

from model.config import ModelConfig
from model.device_table import GPUS
from train.estimates.speed import Cluster, Work, step_time

LAYERS_AND_WIDTHS = {"125M": (12, 768, 12), "350M": (24, 1024, 16), "760M": (24, 1536, 16), "1.3B": (24, 2048, 16)}


@dataclass(frozen=True)
class Row:
    """A published measurement, and the settings it was made with."""

    program: str
    size: str
    length: int
    gpu: str
    gpus: int
    micro_batch: int
    accumulation: int
    tokens_per_second: float  # of one GPU
    fitted: bool = False

    @property
    def predicted(self) -> float:
        layers, width, heads = LAYERS_AND_WIDTHS[self.size]
        model = ModelConfig(n_layer=layers, n_embd=width, n_head=heads, block_size=self.length, bias=False)
        nodes = max(1, self.gpus // 8)
        work = Work(model, self.micro_batch, self.accumulation, gathered=self.program == "llm-foundry")
        seconds = step_time(work, Cluster(GPUS[self.gpu], nodes, self.gpus // nodes)).total
        return self.micro_batch * self.accumulation * self.length / seconds

    @property
    def miss(self) -> float:
        """Of the prediction, as a share of what was measured."""
        return self.predicted / self.tokens_per_second - 1


def _foundry(fitted: bool, *rows: tuple[str, int, str, int, int, int, int]) -> list[Row]:
    return [Row("llm-foundry", *row, fitted=fitted) for row in rows]


FITTED = _foundry(
    True,
    ("1.3B", 2048, "h100", 8, 14, 1, 45455),
    ("1.3B", 2048, "h100", 16, 20, 1, 46037),
    ("1.3B", 2048, "h100", 32, 20, 1, 45130),
    ("1.3B", 2048, "h100", 64, 20, 1, 44402),
    ("1.3B", 2048, "a100-80", 8, 14, 4, 20513),
    ("1.3B", 2048, "a100-40", 8, 8, 8, 19271),
    ("1.3B", 2048, "a100-40", 16, 8, 1, 19085),
    ("1.3B", 2048, "a100-40", 64, 10, 1, 19001),
    ("1.3B", 2048, "a100-40", 128, 10, 1, 18647),
    ("125M", 1024, "a100-80", 8, 64, 2, 156468),
)
HELD_OUT = _foundry(
    False,
    ("125M", 512, "a100-80", 8, 128, 2, 165681),
    ("125M", 2048, "a100-80", 8, 40, 2, 142830),
    ("350M", 1024, "a100-80", 8, 64, 2, 64813),
    ("350M", 2048, "a100-80", 8, 32, 2, 58782),
    ("760M", 1024, "a100-80", 8, 48, 2, 29765),
    ("760M", 2048, "a100-80", 8, 24, 2, 32434),
    ("1.3B", 1024, "a100-80", 8, 18, 4, 22112),
    ("125M", 1024, "a100-40", 8, 52, 3, 148289),
    ("350M", 1024, "a100-40", 8, 32, 4, 62523),
    ("760M", 1024, "a100-40", 8, 24, 4, 33422),
    ("1.3B", 1024, "a100-40", 8, 16, 8, 20959),
    ("1.3B", 2048, "a100-40", 32, 10, 1, 15555),
    ("125M", 2048, "a100-40", 128, 26, 1, 123936),
    ("350M", 2048, "a100-40", 128, 18, 1, 51934),
    ("760M", 2048, "a100-40", 128, 12, 1, 28940),
    ("760M", 1024, "h100", 8, 48, 2, 78581),
    ("760M", 2048, "h100", 8, 24, 2, 63147),
    ("760M", 2048, "h100", 32, 24, 1, 67971),
    ("1.3B", 1024, "h100", 8, 18, 4, 48910),
)
# Steps of 0.5M tokens; llm.c's kernels are its own, modded-nanogpt's record 7 and nanoGPT are compiled as a whole.
OTHERS = [
    Row("llm.c", "125M", 1024, "h100", 8, 64, 1, 468_000),
    Row("llm.c", "125M", 1024, "a100-80", 8, 64, 1, 218_000),
    Row("modded-nanogpt", "125M", 1024, "h100", 8, 64, 1, 462_000),
    Row("nanoGPT", "125M", 1024, "a100-40", 1, 12, 40, 135_600),
]
