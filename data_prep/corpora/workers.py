"""How many worker processes to start: the cores this process may use, and the memory that is left; and how."""

import contextlib
import signal
from collections.abc import Iterator

from common.host_limits import allowed_cores, available_memory_bytes

WORKER_BYTES = 400 << 20  # the most that a worker may need, shared pages included


def choose_workers(wanted: int | None) -> int:
    """`wanted` processes, or one per allowed core as far as memory allows."""
    if wanted is not None:
        return wanted
    return max(1, min(allowed_cores(), available_memory_bytes() // WORKER_BYTES))


@contextlib.contextmanager
def ignoring_interrupts() -> Iterator[None]:
    """Processes started in here ignore Ctrl-C from their first moment: a terminal sends it to them as well, and their
    parent ends them. Only for the main thread.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
