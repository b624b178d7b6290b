"""How many worker processes to start: the cores this process may use, and the memory that is left."""

from common.host_limits import allowed_cores, available_memory_bytes

WORKER_BYTES = 400 << 20  # the most that a worker may need, shared pages included


def choose_workers(wanted: int | None) -> int:
    """`wanted` processes, or one per allowed core as far as memory allows."""
    if wanted is not None:
        return wanted
    return max(1, min(allowed_cores(), available_memory_bytes() // WORKER_BYTES))
