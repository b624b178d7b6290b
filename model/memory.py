"""What a training step takes in memory on one rank, estimated in closed form, part by part; without torch.

B micro-batch, T sequence, C width, L layers, H heads, K key/value heads, D head size, F hidden width, V padded
vocabulary. Activations are counted at their real bytes, as eager mode keeps them for the backward. Not all parts are
there at once: the peak is that of the largest phase. docs/planning.md derives every line.
"""

import math
from dataclasses import dataclass, field, fields

from model.attention_kinds import ATTENTION_KINDS
from model.config import ModelConfig
from model.counts import parameter_count, parameter_shapes
from model.kernel_sizes import BLOCK_ROWS_CPU, SMALLEST_BLOCK, chunk_rows
from model.number_formats import FLOAT32, Dtype, StreamDtype, matmul_bytes, stream_bytes

# A CPU process's peak after two steps of a model of 5,000 parameters (torch 2.13, one thread; 219 MiB of it after
# `import torch`); what torch._dynamo adds, which DDP and recomputation import; what its compiler adds to that; kernels
# for matrix products in 16 bits; gloo's buffers; and what products of Muon's matrices leave (67 MiB in three runs).
FRAMEWORK_CPU, DYNAMO_CPU, COMPILER_CPU, NARROW_CPU, GLOO_CPU = 276 << 20, 76 << 20, 112 << 20, 32 << 20, 16 << 20
MUON_CPU = 72 << 20
# Freed memory that the C library keeps, as a share of the activations: gaps between what is still used. glibc gives
# tensors above 32 MiB back to the system. Seen in eleven runs, not derived: 15 to 27 % in the simplest case, 49 to 61 %
# where several micro-batches are accumulated, blocks are recomputed, or SwiGLU runs in 16 bits. With
# MALLOC_MMAP_THRESHOLD_ in the environment glibc gives all tensors of that size back, and there are no gaps.
HEAP_SHARE, CROWDED_HEAP_SHARE, LARGEST_IN_HEAP = 0.3, 0.65, 32 << 20


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank, by part, and the phases in which they are there.

    Attributes:
        weights: float32, adapters among them. copies: autocast's casts of the weights, during the passes.
        gradients: float32; with several ranks they are views into DDP's buckets.
        optimizer: moments, of this rank's part where they are sharded. average: of the weights, this rank's part.
        temporaries: what an update makes and drops. communication: buffers of sharded updates.
        activations: what all blocks keep for the backward. working: what one block's backward needs beside that.
        head: hidden states' gradient, a chunk of logits, the weight's gradient before it is added.
        validation: what a forward without gradients takes. statistics: the copy of the weights that they compare with.
        snapshot: the copy that an asynchronous save writes, where it is taken from the same memory (a CPU).
        allocator: what the C library keeps of freed memory. framework: what the process takes without a model; on a GPU
            nothing, whose memory holds none of it.
        gradients_stay: gradients are there in the forward, too: of micro-batches before, or as DDP's buckets.
        buckets_stay: they are there between steps as well, as DDP's buckets; one rank drops them after the update.
        snapshot_stays: training continues after a save, beside its copy, which the next one reuses.
    """

    weights: int
    copies: int
    gradients: int
    optimizer: int
    average: int
    temporaries: int
    communication: int
    activations: int
    working: int
    head: int
    validation: int
    statistics: int
    snapshot: int
    allocator: int
    framework: int
    gradients_stay: bool = field(default=True, metadata={"part": False})
    buckets_stay: bool = field(default=True, metadata={"part": False})
    snapshot_stays: bool = field(default=False, metadata={"part": False})

    @property
    def parts(self) -> dict[str, int]:
        """Every part by name."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.metadata.get("part", True)}

    @property
    def phases(self) -> dict[str, int]:
        """What is there in each phase of a run, without what is there always (allocator and framework)."""
        copied = self.snapshot if self.snapshot_stays else 0
        kept = self.weights + self.optimizer + self.average + copied
        before = self.gradients if self.gradients_stay else 0
        between = self.gradients if self.buckets_stay else 0
        return {
            "forward and loss": kept + self.copies + before + self.activations + self.head,
            "backward": kept + self.copies + before + self.activations + self.working,
            "end of the backward": kept + self.copies + self.gradients + self.working,
            "update": kept + self.gradients + self.temporaries + self.communication,
            "validation": kept + self.copies + between + self.validation,
            "layer statistics": kept + self.gradients + self.statistics,
            "saving": kept - copied + between + self.snapshot,
        }

    @property
    def largest_phase(self) -> str:
        phases = self.phases
        return max(phases, key=lambda name: phases[name])

    @property
    def to_come(self) -> int:
        """What a process takes from what is free once PyTorch is there."""
        return self.phases[self.largest_phase] + self.allocator

    @property
    def total(self) -> int:
        return self.to_come + self.framework


def memory_estimate(
    config: ModelConfig,
    *,
    micro_batch: int,
    dtype: Dtype,
    recompute_every: int,
    recompute_norms: bool = False,
    stream: StreamDtype = "fp32",
    device_type: str = "cuda",
    compiled: bool = False,
    adapters: int | None = None,
    new_rows: bool = False,
    optimizer_bytes: int,
    average_bytes: int = 0,
    temporary_bytes: int = 0,
    communication_bytes: int = 0,
    snapshot_bytes: int = 0,
    gradients_stay: bool = True,
    snapshot_stays: bool = False,
    statistics_ranks: int = 0,
    several_ranks: bool = False,
    muon: bool = False,
    heap_gaps: bool = True,
    reference: bool = False,
    held_bytes: int = 0,
) -> MemoryEstimate:
    """Memory of training on one of any number of DDP ranks, whose gradients are views of its buckets.

    Args:
        config: the model.
        micro_batch: B, sequences of one forward and backward.
        dtype: of matrix multiplications; weights and gradients are float32 in any case.
        recompute_every: as `GPT.recompute_every`.
        recompute_norms: as `GPT.recompute_norms`.
        stream: dtype of the residual stream.
        device_type: attention with dropout keeps its weights on a CPU, which has no fused kernel for it.
        compiled: the head's compiled kernel takes more rows at a time and widens none in memory; blocks compute some of
            what they need for the backward again (`_Sizes.compiled`).
        adapters: parameters of adapters, where only they are trained; None: all weights are. What a frozen model's
            blocks keep is taken to be the same.
        new_rows: rows of new ids are trained beside adapters: the head computes with a copy of its matrix.
        optimizer_bytes: what the optimizer keeps of all that is trained.
        average_bytes: what is kept of an average of the weights.
        temporary_bytes, communication_bytes: what its update takes beside that.
        snapshot_bytes: copied by a save into the memory that the estimate is of.
        gradients_stay, snapshot_stays: as in `MemoryEstimate`.
        statistics_ranks: ranks that share the copy of what is trained that layer statistics take for an update, when no
            activations are there; 0: none is taken.
        several_ranks: DDP is there. muon: it trains matrices.
        reference: the weights that the run started from are kept beside those that are trained.
        held_bytes: other models' weights that are there as well.
        heap_gaps: the C library keeps gaps between tensors on a CPU, as glibc does unless it is told otherwise.
    """
    tables = 1 if config.tie_weights else 2
    padding = (config.padded_vocab_size - config.vocab_size) * config.n_embd * tables
    parameters = parameter_count(config) + padding
    tokens, matmul = micro_batch * config.block_size, matmul_bytes(dtype)
    trained = parameters if adapters is None else adapters
    sizes = _Sizes(config, matmul, stream_bytes(stream), device_type, compiled)
    one_pass = tokens * sizes.working(forward=True)
    kept, hidden = tokens * sizes.kept(recompute_every, recompute_norms), tokens * config.n_embd * matmul
    crowded = gradients_stay or bool(recompute_every) or compiled or (config.mlp == "swiglu" and matmul < FLOAT32)
    in_heap = device_type == "cpu" and heap_gaps and hidden < LARGEST_IN_HEAP
    framework = FRAMEWORK_CPU + COMPILER_CPU * compiled + NARROW_CPU * (dtype != "fp32") + GLOO_CPU * several_ranks
    framework += MUON_CPU * muon + DYNAMO_CPU * (several_ranks or bool(recompute_every) or recompute_norms or compiled)
    capped = config.logit_softcap is not None
    logits = _logits_bytes(config.padded_vocab_size, tokens, dtype, device_type, compiled, capped)
    head_copies = _head_cast(config, matmul) + new_rows * config.padded_vocab_size * config.n_embd * FLOAT32
    return MemoryEstimate(
        weights=((2 if reference else 1) * parameters + (adapters or 0)) * FLOAT32 + held_bytes,
        copies=_cast_bytes(config, matmul),
        gradients=trained * FLOAT32,
        optimizer=optimizer_bytes,
        average=average_bytes,
        temporaries=temporary_bytes,
        communication=communication_bytes,
        activations=kept,
        working=tokens * sizes.working(forward=False) + _largest_matrix(config) * (FLOAT32 + matmul),
        head=logits + (2 * tokens + config.padded_vocab_size) * config.n_embd * FLOAT32 + head_copies,
        validation=max(one_pass, logits + tokens * config.n_embd * FLOAT32 + head_copies),
        statistics=trained * FLOAT32 // statistics_ranks if statistics_ranks else 0,
        snapshot=snapshot_bytes,
        allocator=round((CROWDED_HEAP_SHARE if crowded else HEAP_SHARE) * kept) if in_heap else 0,
        framework=framework if device_type == "cpu" else 0,
        gradients_stay=gradients_stay,
        buckets_stay=several_ranks,
        snapshot_stays=snapshot_stays,
    )


def _cast_bytes(config: ModelConfig, matmul: int) -> int:
    """Autocast's casts of what the blocks multiply with; the head makes its own (`_head_cast`)."""
    if matmul == FLOAT32:
        return 0
    layers = ("c_attn", "c_proj", "c_fc", "c_gate")
    shapes = parameter_shapes(config).items()
    return matmul * sum(math.prod(shape) for name, shape in shapes if name.split(".")[-2] in layers)


def _head_cast(config: ModelConfig, matmul: int) -> int:
    return 0 if matmul == FLOAT32 else config.padded_vocab_size * config.n_embd * matmul


def _largest_matrix(config: ModelConfig) -> int:
    """Elements of the largest matrix of a block, whose gradient is there before it is added."""
    return max(math.prod(shape) for name, shape in parameter_shapes(config).items() if name.startswith("h."))


def _logits_bytes(vocab: int, tokens: int, dtype: Dtype, device_type: str, compiled: bool, capped: bool) -> int:
    """What `model.loss.head_loss` holds of (tokens, vocab) logits at its fullest, in training."""
    matmul = matmul_bytes(dtype)
    rows = min(tokens, chunk_rows(device_type, compiled=compiled))
    block = min(rows, BLOCK_ROWS_CPU) if device_type == "cpu" else rows
    widened = 0 if matmul == FLOAT32 or compiled else block
    slopes = block if capped and not compiled else 0
    return (rows * matmul + (widened + slopes) * FLOAT32) * vocab


@dataclass(frozen=True)
class _Sizes:
    """Bytes per token.

    Attributes:
        matmul: of a number in matrix products. stream: of one in the residual stream.
        compiled: neither SwiGLU's gate after its activation nor what RoPE turns is kept; nothing else was seen to be
            saved.
    """

    config: ModelConfig
    matmul: int
    stream: int
    device_type: str
    compiled: bool

    def kept(self, recompute_every: int, recompute_norms: bool) -> int:
        """What all blocks and the last norm keep for the backward."""
        config = self.config
        layers = [self._block(layer, recompute_norms) for layer in range(config.n_layer)]
        recomputed = set(range(0, config.n_layer, recompute_every)) if recompute_every else set()
        # a recomputed block keeps its input, and is there whole during its own backward, when later ones have gone
        entered = config.n_embd * self.stream
        kept = most = 0
        for layer, size in enumerate(layers):
            most = max(most, kept + size)
            kept += entered if layer in recomputed else size
        inputs = 0
        values = config.kv_heads * config.head_size
        # of the first block, recomputed or not, the values are kept: a part of what is projected in one
        first = (config.n_embd + 2 * values) * self.matmul if config.value_residual and 0 in recomputed else 0
        inputs += config.value_embeddings * values * self.matmul + first
        inputs += config.n_embd * FLOAT32 if config.embedding == "normed" else 0
        last_norm = config.n_embd * FLOAT32  # gone when a block is recomputed
        return max(kept + last_norm, most) + inputs + (config.n_embd * FLOAT32 if config.dropout else 0)

    def working(self, *, forward: bool) -> int:
        """What a block's MLP, its widest part, holds beside what is kept: gradients of its hidden states.

        Those of SwiGLU are the product's, the gate's before and after its activation, and the other factor's; in
        float32 one of them takes the place of what has been used.
        """
        config = self.config
        ways = 2 if config.mlp != "swiglu" else 3 if self.matmul == FLOAT32 and not forward else 4
        hidden = ways * config.hidden_size * self.matmul
        return hidden + (2 if forward else 3) * config.n_embd * self.stream

    def _block(self, layer: int, recompute_norms: bool) -> int:
        """What one block keeps in eager mode with a fused attention kernel."""
        # the two norms, and their outputs as the matrix products take them; recomputed, only the blocks' two inputs
        config, matmul = self.config, self.matmul
        widened = config.norm != "rmsnorm" and self.device_type != "cpu"  # by autocast, what goes into a LayerNorm
        into_norm = FLOAT32 if widened else self.stream
        norms = 2 * config.n_embd * (self.stream if recompute_norms else into_norm + matmul)
        # before and after the activation; SwiGLU's gate, before and after
        ways = 2 if config.mlp != "swiglu" else 3 if self.compiled else 4
        mlp = ways * config.hidden_size * matmul
        dropout = self._dropout() if config.dropout else 0
        window = config.layer_window(layer)
        in_blocks = window is not None and 2 * max(window, SMALLEST_BLOCK) < config.block_size
        elements = ATTENTION_KINDS[config.attention].kept_per_token(config, in_blocks=in_blocks)
        values = config.kv_heads * config.head_size
        if self.compiled and config.position == "rope" and not config.qk_norm:
            elements -= config.n_embd + values
        mixed = values * matmul if config.other_values(layer) else 0
        return norms + elements * matmul + mlp + dropout + mixed

    def _dropout(self) -> int:
        config = self.config
        if self.device_type != "cpu":
            return 2 * config.n_embd  # masks of both residual branches, a byte each
        maps = ATTENTION_KINDS[config.attention].maps(config)
        weights = 3 * maps * config.block_size * FLOAT32  # before and after dropout, and the mask
        return weights + 2 * config.n_embd * FLOAT32
