"""Sizes by which the model's computations are cut, on which its memory depends; without torch."""

# Below this many keys per query a block of block-local attention is mostly overhead (measured with bench_attention.py).
SMALLEST_BLOCK = 64
# Queries times head size up to which bf16 attention on a CPU is trained in float32, which keeps its inputs twice and is
# 2 to 7 times as fast there (forward and backward, torch 2.13, AVX-512 with bf16: 5.6 instead of 40 ms for 64 sequences
# of 32 tokens, 8 heads of 16); at four times this the two are level, beyond it bf16 wins.
LARGEST_WIDENED = 4096
# Mean length of documents from which a CPU attends them one by one, not all together under a mask (at 20 that is faster
# still; see records/2026-11-28-mix-loader).
SHORTEST_APART = 16

# Rows (tokens) of a chunk of logits
CHUNK_ROWS_CPU = 512
CHUNK_ROWS_GPU = 4096
CHUNK_ROWS_KERNEL = 16_384  # on a GPU, where a kernel keeps nothing wide: fewer sums of the head's gradient
BLOCK_ROWS_CPU = 16  # rows that are widened at a time: they stay in a core's cache


def chunk_rows(device_type: str, *, compiled: bool) -> int:
    """Rows of a chunk. Args: compiled: there is a kernel."""
    if device_type == "cpu":
        return CHUNK_ROWS_CPU
    return CHUNK_ROWS_KERNEL if compiled else CHUNK_ROWS_GPU
