"""Seconds of a training step on GPUs by a roofline model, before anything has run; without torch.

A step is matrix products and attention at a share of the peak, elementwise work at the memory's bandwidth, the update,
and what communication is not hidden behind them. docs/planning.md derives the terms and lists each published row beside
its prediction. Three constants were fitted, on the rows of one program (`train.estimates.published`).
"""

from dataclasses import asdict, dataclass

from model.attention_kinds import ATTENTION_KINDS
from model.config import ModelConfig
from model.counts import flops_per_token, parameter_count
from model.device_table import Gpu
from model.number_formats import Dtype

CALIBRATED_ON = "llm-foundry's published rows (gpt2-124m and gpt2-1p3b on A100 and H100)"
# Fitted: the share of the peak that matrix products reach, by family; the other families' are set by analogy.
MATRIX_SHARE = {"ampere": 0.80, "hopper": 0.62, "blackwell": 0.62, "ada": 0.80, "volta": 0.65, "cdna": 0.50}
FITTED_FAMILIES = ("ampere", "hopper")
# Fitted: bytes that a block's elementwise work moves per token and unit of width C, forward and backward, run eagerly.
BLOCK_BYTES = 292
# Set, not fitted
ATTENTION_SHARE = 0.4  # of the matrix products' rate, from the same program's rows of 512 to 8,192 tokens at 1.3B
BANDWIDTH_SHARE = 0.8  # of the memory's peak, which copies reach
LINK_SHARE = 0.8
HIDDEN_SHARE = 0.9  # of the communication, where the computation beside it lasts as long
LOGIT_BYTES = 36  # moved per logit: written in 16 bits, widened, softmax, its gradient, narrowed, read twice
GRADIENT_BYTES = 16  # moved per parameter and micro-batch: gradient read and written, weight cast, its gradient
UPDATE_BYTES = 32  # moved per parameter and update: norm, gradient, weight and two moments
NODE_LINK = 25e9  # bytes/s per GPU to other nodes: one 200 Gbit/s adapter each
KERNEL_SECONDS = 5e-6  # from one launch to the next
KERNELS_PER_BLOCK = 70  # forward and backward, run eagerly
BACKWARD = 2 / 3  # of a micro-batch's time: what an all-reduce can hide behind
FP32_SLOWDOWN = 2.0  # of matrix products by TensorFloat-32; older cards have none
OLD_FP32_SLOWDOWN = 8.0


@dataclass(frozen=True)
class Cluster:
    """Equal GPUs on equal nodes."""

    gpu: Gpu
    nodes: int
    gpus_per_node: int

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def bus(self) -> float:
        """Bytes/s at which a ring over all GPUs moves data."""
        inside = self.gpu.link if self.gpus_per_node > 1 else float("inf")
        between = NODE_LINK * self.gpus_per_node if self.nodes > 1 else float("inf")
        return LINK_SHARE * min(inside, between)


@dataclass(frozen=True)
class Work:
    """What a rank does in a step.

    Attributes:
        micro_batch, accumulation: sequences of a pass, and passes of a step.
        recompute_every: as `GPT.recompute_every`. dtype: of matrix products.
        sharded: each rank updates its part and sends it to the others.
        gathered: instead of an all-reduce a step, weights are gathered twice and gradients scattered once a micro-batch
            in 16 bits, as under FSDP: for others' programs.
    """

    model: ModelConfig
    micro_batch: int
    accumulation: int
    recompute_every: int = 0
    dtype: Dtype = "bf16"
    sharded: bool = False
    gathered: bool = False
    adapters: int | None = None


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by what they go to. Those of rollouts are 0 for other objectives."""

    matrix_products: float
    attention: float
    elementwise: float
    head: float
    gradients: float
    update: float
    communication: float  # that is not hidden
    launches: float  # of kernels, where these take longer than the work
    sampling: float = 0.0  # of answers (`train.estimates.rollout_time`)
    other_policies: float = 0.0  # what the one that sampled, that of the start, and reward models say of answers

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


def step_time(work: Work, cluster: Cluster) -> StepTime:
    """Of one step on each rank."""
    gpu, model = cluster.gpu, work.model
    tokens = work.micro_batch * model.block_size  # of a micro-batch
    rate, bandwidth = matrix_rate(gpu, work.dtype), BANDWIDTH_SHARE * gpu.bandwidth
    recomputed = _recomputed_share(work)
    parameters = parameter_count(model)
    trained = parameters if work.adapters is None else work.adapters

    # A micro-batch's forward and backward; a recomputed block's forward comes twice
    blocks = _block_flops(model)
    products = flops_per_token(model, 0, adapters=work.adapters) + blocks / 3 * recomputed
    attention = _attention_flops(model) * (7 / 6 + 1 / 3 * recomputed)  # the fused backward computes scores anew
    block_bytes = BLOCK_BYTES * model.n_embd * model.n_layer * (1 + recomputed / 3)
    micro = {
        "matrix_products": tokens * products / rate,
        "attention": tokens * attention / (ATTENTION_SHARE * rate),
        "elementwise": tokens * block_bytes / bandwidth,
        "head": tokens * LOGIT_BYTES * model.padded_vocab_size / bandwidth,
        "gradients": GRADIENT_BYTES * trained / bandwidth,
    }
    busy = sum(micro.values())
    launches = max(0.0, KERNEL_SECONDS * KERNELS_PER_BLOCK * (1 + recomputed / 3) * model.n_layer - busy)
    step = {name: work.accumulation * seconds for name, seconds in micro.items()}
    shards = cluster.world_size if work.sharded or work.gathered else 1
    return StepTime(
        **step,
        update=UPDATE_BYTES * trained / shards / bandwidth,
        communication=_communication(work, cluster, trained, busy + launches),
        launches=work.accumulation * launches,
    )


def forward_seconds(work: Work, cluster: Cluster, tokens: float) -> float:
    """Of `tokens` tokens on each rank without gradients, as a validation reads them."""
    once = Work(work.model, work.micro_batch, 1, dtype=work.dtype)
    found = step_time(once, cluster)
    seconds = (found.matrix_products + found.attention + found.elementwise + found.head + found.launches) / 3
    return seconds * tokens / (work.micro_batch * work.model.block_size)


def _communication(work: Work, cluster: Cluster, trained: int, micro_seconds: float) -> float:
    """Seconds of a step that it is waited for."""
    ranks = cluster.world_size
    if ranks == 1:
        return 0.0
    passed = (ranks - 1) / ranks / cluster.bus
    if work.gathered:
        seconds = 3 * 2 * parameter_count(work.model) * passed
        return work.accumulation * max((1 - HIDDEN_SHARE) * seconds, seconds - micro_seconds)
    all_reduce = 2 * 4 * trained * passed
    waited = max((1 - HIDDEN_SHARE) * all_reduce, all_reduce - BACKWARD * micro_seconds)
    return waited + (4 * trained * passed if work.sharded else 0.0)


def matrix_rate(gpu: Gpu, dtype: Dtype) -> float:
    """FLOP/s of matrix products."""
    rate = MATRIX_SHARE[gpu.family] * gpu.flops
    if dtype != "fp32":
        return rate
    return rate / (FP32_SLOWDOWN if gpu.capability >= (8, 0) else OLD_FP32_SLOWDOWN)


def _recomputed_share(work: Work) -> float:
    """Of all blocks."""
    every, layers = work.recompute_every, work.model.n_layer
    return len(range(0, layers, every)) / layers if every else 0.0


def _block_flops(model: ModelConfig) -> int:
    """Per token, forward and backward, of all blocks' matrix products."""
    tables = model.padded_vocab_size * model.n_embd
    return flops_per_token(model, 0) - 6 * min(tables, parameter_count(model))


def _attention_flops(model: ModelConfig) -> float:
    """Per token, forward and backward, with the keys that a query sees on average."""
    length = model.block_size
    keys = 0.0
    for window in model.windows:
        seen = length if window is None else min(window, length)
        keys += seen - seen * (seen - 1) / (2 * length)
    return 3 * ATTENTION_KINDS[model.attention].products_per_key(model) * keys
