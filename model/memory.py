"""What a training step keeps in memory on one rank, estimated in closed form.

B micro-batch, T sequence, C width, L layers, H heads, K key/value heads, D head size, F hidden width, V padded
vocabulary. Counted is what eager mode keeps for the backward; kernels' scratch space and the allocator's rounding are
not.
"""

from dataclasses import dataclass

from model.config import ModelConfig
from model.counts import parameter_count
from model.loss import CHUNK_ROWS_GPU
from model.precision import Dtype

FLOAT32 = 4  # bytes


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    head: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.head


def memory_estimate(config: ModelConfig, *, micro_batch: int, dtype: Dtype, recompute_every: int) -> MemoryEstimate:
    """Memory of training with AdamW on one of any number of DDP ranks.

    Args:
        config: the model.
        micro_batch: B, sequences of one forward and backward.
        dtype: of matrix multiplications; weights, gradients and moments are float32 in any case.
        recompute_every: as `GPT.recompute_every`.
    """
    tables = 1 if config.tie_weights else 2
    padding = (config.padded_vocab_size - config.vocab_size) * config.n_embd * tables
    parameters = parameter_count(config) + padding
    matmul = FLOAT32 if dtype == "fp32" else 2
    copies = parameters * matmul if matmul != FLOAT32 else 0  # autocast's casts of the weights
    tokens = micro_batch * config.block_size
    block = tokens * _block_bytes_per_token(config, matmul)
    recomputed = len(range(0, config.n_layer, recompute_every)) if recompute_every else 0
    kept = config.n_layer - recomputed
    # a recomputed block keeps its input, and one at a time is there whole during the backward
    inputs = recomputed * tokens * config.n_embd * FLOAT32
    activations = kept * block + inputs + (block if recomputed and not kept else 0)
    rows = min(tokens, CHUNK_ROWS_GPU)
    head = 2 * rows * config.padded_vocab_size * FLOAT32 + config.padded_vocab_size * config.n_embd * FLOAT32
    return MemoryEstimate(
        weights=parameters * FLOAT32 + copies,
        gradients=parameters * FLOAT32,
        optimizer=2 * parameters * FLOAT32,
        activations=activations,
        head=head,
    )


def _block_bytes_per_token(config: ModelConfig, matmul: int) -> int:
    """Bytes that one block keeps per token for its backward, in eager mode with a fused attention kernel."""
    width, qkv = config.n_embd, (config.n_head + 2 * config.kv_heads) * config.head_size
    norms = 2 * width * FLOAT32 + 2 * width * matmul  # inputs of both norms, and their outputs as the matmuls take them
    turned = qkv if config.position == "rope" else 0  # rotated queries and keys beside the projected ones
    attention = (qkv + turned) * matmul + 2 * width * matmul  # q, k, v, attention's output, what c_proj takes
    ways = 3 if config.mlp == "swiglu" else 2  # before and after the activation; SwiGLU's gate as well
    mlp = (ways + (config.mlp == "swiglu")) * config.hidden_size * matmul
    dropout = 2 * width if config.dropout else 0  # masks, a byte each
    return norms + attention + mlp + dropout
