"""What a training step keeps in memory on one rank, estimated in closed form.

B micro-batch, T sequence, C width, L layers, H heads, K key/value heads, D head size, F hidden width, V padded
vocabulary. What eager mode keeps for the backward is counted; kernels' scratch space and the allocator's rounding are
not.
"""

from dataclasses import dataclass

from model.attention_kinds import ATTENTION_KINDS
from model.attention_masks import SMALLEST_BLOCK
from model.config import ModelConfig
from model.counts import parameter_count
from model.loss_chunks import BLOCK_ROWS_CPU, chunk_rows
from model.precision import Dtype, StreamDtype

FLOAT32 = 4  # bytes
STREAM_BYTES: dict[StreamDtype, int] = {"fp32": FLOAT32, "bf16": 2}
# A CPU process's peak after one step of a model of 20,000 parameters: PyTorch's libraries, the trainer's modules, and
# torch._dynamo, which DDP and recomputation import: a rank by itself takes 71 MiB less. (torch 2.13, one thread; 219
# MiB of it after `import torch`.)
FRAMEWORK_CPU = 320 << 20


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank."""

    weights: int
    gradients: int
    optimizer: int
    average: int  # of the weights
    activations: int
    head: int
    statistics: int  # the copy of the weights that layer statistics take, as far as it is more than the two above it
    framework: int  # what the process takes without a model; on a GPU nothing, whose memory holds none of it

    @property
    def total(self) -> int:
        return self.to_come + self.framework

    @property
    def to_come(self) -> int:
        """What a process takes from what is free once PyTorch is there."""
        kept = self.weights + self.gradients + self.optimizer + self.average
        return kept + self.activations + self.head + self.statistics


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
    optimizer_bytes: int,
    average_bytes: int = 0,
    statistics_ranks: int = 0,
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
        compiled: the head's compiled kernel takes more rows at a time and widens none in memory. What the compiler
            saves elsewhere is not credited.
        adapters: parameters of adapters, where only they are trained; None: all weights are. What a frozen model's
            blocks keep is taken to be the same.
        optimizer_bytes: what the optimizer keeps of all that is trained.
        average_bytes: what is kept of an average of the weights.
        statistics_ranks: ranks that share the copy of what is trained that layer statistics take for an update, when no
            activations are there; 0: none is taken.
    """
    tables = 1 if config.tie_weights else 2
    padding = (config.padded_vocab_size - config.vocab_size) * config.n_embd * tables
    parameters = parameter_count(config) + padding
    matmul = FLOAT32 if dtype == "fp32" else 2
    copies = parameters * matmul if matmul != FLOAT32 else 0  # autocast's casts of the weights
    tokens = micro_batch * config.block_size
    trained = parameters if adapters is None else adapters
    kept = _kept_per_token(config, matmul, recompute_every, recompute_norms, device_type, STREAM_BYTES[stream])
    copied = trained * FLOAT32 // statistics_ranks if statistics_ranks else 0
    activations, head = tokens * kept, _head_bytes(config, tokens, dtype, device_type, compiled)
    return MemoryEstimate(
        weights=(parameters + (adapters or 0)) * FLOAT32 + copies,
        gradients=trained * FLOAT32,
        optimizer=optimizer_bytes,
        average=average_bytes,
        activations=activations,
        head=head,
        statistics=max(0, copied - activations - head),
        framework=FRAMEWORK_CPU if device_type == "cpu" else 0,
    )


def _kept_per_token(
    config: ModelConfig, matmul: int, recompute_every: int, recompute_norms: bool, device_type: str, stream: int
) -> int:
    """Bytes that all blocks and the last norm keep per token."""
    layers = [
        _block_bytes_per_token(config, layer, matmul, recompute_norms, device_type, stream)
        for layer in range(config.n_layer)
    ]
    recomputed = set(range(0, config.n_layer, recompute_every)) if recompute_every else set()
    kept = sum(size for layer, size in enumerate(layers) if layer not in recomputed)
    # a recomputed block keeps its input, and one at a time is there whole during the backward
    inputs = len(recomputed) * config.n_embd * stream
    whole = max((layers[layer] for layer in recomputed), default=0)
    values = config.kv_heads * config.head_size
    tables = config.value_embeddings * values * matmul
    # of the first block, recomputed or not, the values are kept: a part of what is projected in one
    first = (config.n_embd + 2 * values) * matmul if config.value_residual and 0 in recomputed else 0
    inputs += tables + first + (config.n_embd * FLOAT32 if config.embedding == "normed" else 0)
    return kept + inputs + whole + config.n_embd * FLOAT32 + (config.n_embd * FLOAT32 if config.dropout else 0)


def _head_bytes(config: ModelConfig, tokens: int, dtype: Dtype, device_type: str, compiled: bool) -> int:
    """The loss: hidden states and their gradient, the weight's gradient before it is added, and logits."""
    width, vocab = config.n_embd, config.padded_vocab_size
    capped = config.logit_softcap is not None
    return _logits_bytes(vocab, tokens, dtype, device_type, compiled, capped) + (2 * tokens + vocab) * width * FLOAT32


def _logits_bytes(vocab: int, tokens: int, dtype: Dtype, device_type: str, compiled: bool, capped: bool) -> int:
    """What `model.loss.head_loss` holds of (tokens, vocab) logits at its fullest, in training."""
    matmul = FLOAT32 if dtype == "fp32" else 2
    rows = min(tokens, chunk_rows(device_type, compiled=compiled))
    block = min(rows, BLOCK_ROWS_CPU) if device_type == "cpu" else rows
    widened = 0 if matmul == FLOAT32 or compiled else block
    slopes = block if capped and not compiled else 0
    return (rows * matmul + (widened + slopes) * FLOAT32) * vocab


def _block_bytes_per_token(
    config: ModelConfig, layer: int, matmul: int, recompute_norms: bool, device_type: str, stream: int
) -> int:
    """Bytes that one block keeps per token for its backward, in eager mode with a fused attention kernel."""
    # the two norms, and their outputs as the matrix products take them; recomputed, only the blocks' two inputs
    width = config.n_embd
    widened = config.norm != "rmsnorm" and device_type != "cpu"  # by autocast, what goes into a LayerNorm
    into_norm = FLOAT32 if widened else stream
    norms = 2 * width * (stream if recompute_norms else into_norm + matmul)
    ways = 4 if config.mlp == "swiglu" else 2  # before and after the activation; SwiGLU's gate, before and after, too
    mlp = ways * config.hidden_size * matmul
    dropout = _dropout_bytes_per_token(config, device_type) if config.dropout else 0
    window = config.layer_window(layer)
    in_blocks = window is not None and 2 * max(window, SMALLEST_BLOCK) < config.block_size
    attention = ATTENTION_KINDS[config.attention].kept_per_token(config, in_blocks=in_blocks) * matmul
    mixed = config.kv_heads * config.head_size * matmul if config.other_values(layer) else 0
    return norms + attention + mlp + dropout + mixed


def _dropout_bytes_per_token(config: ModelConfig, device_type: str) -> int:
    if device_type != "cpu":
        return 2 * config.n_embd  # masks of both residual branches, a byte each
    maps = ATTENTION_KINDS[config.attention].maps(config)
    weights = 3 * maps * config.block_size * FLOAT32  # before and after dropout, and the mask
    return weights + 2 * config.n_embd * FLOAT32
