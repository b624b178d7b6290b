"""How many worker processes to start: the cores this process may use, and the memory that is left; and how."""

import contextlib
import signal
from collections.abc import Iterator
from multiprocessing import resource_tracker

from common.host_limits import allowed_cores, available_memory_bytes

WORKER_BYTES = 400 << 20  # the most that a worker may need, shared pages included


def choose_workers(wanted: int | None) -> int:
    """`wanted` processes, or one per allowed core as far as memory allows."""
    if wanted is not None:
        return wanted
    return max(1, min(allowed_cores(), available_memory_bytes() // WORKER_BYTES))


@contextlib.contextmanager
def ignoring_interrupts() -> Iterator[None]:
    """Processes started in here never see Ctrl-C. A terminal sends it to them as well; their parent, which sees it when
    this ends, ends them.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # at its start it lets the signal through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # processes inherit it
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
