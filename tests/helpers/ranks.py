"""Real ranks in tests: gloo processes from a fork server that has torch loaded, meeting over a file.

The server forks in milliseconds where a fresh interpreter imports torch for seconds, and a file as meeting point cannot
collide with another test's port.
"""

import atexit
import multiprocessing
import os
import signal
import sys
import time
import traceback
import uuid
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

PATIENCE_SECONDS = 300.0  # for ranks that hang; a machine that does much else is slow, not wrong
_CONTEXT = multiprocessing.get_context("forkserver")
# torch._dynamo: DDP imports it, for most of a second
_PRELOADED = ["torch", "torch.distributed", "torch._dynamo", "numpy", "tests.helpers.ranks", "train.pretrain"]


class RankGroup:
    """`world_size` processes that run `function(*arguments)` as ranks of one group."""

    def __init__(self, world_size: int, store: Path, function: Callable[..., Any], *arguments: Any) -> None:
        _CONTEXT.set_forkserver_preload(_PRELOADED)  # there is one server, of whoever starts a process first
        store.parent.mkdir(parents=True, exist_ok=True)
        meeting_point = store.parent / f"{store.name}-{uuid.uuid4().hex}"  # never an earlier group's
        self._results: list[Connection] = []
        self.processes: list[ForkServerProcess] = []
        for rank in range(world_size):
            receiver, sender = _CONTEXT.Pipe(duplex=False)
            process = _CONTEXT.Process(
                target=_rank, args=(rank, world_size, meeting_point, sender, function, arguments), daemon=True
            )
            process.start()
            sender.close()
            self._results.append(receiver)
            self.processes.append(process)
        atexit.register(self._kill_at_exit)  # of a test that failed: SIGTERM, which daemons get, ends no stopped one

    def kill(self) -> None:
        """SIGKILL for all ranks that still live."""
        for process in self.processes:
            process.kill()
        self.join()

    def _kill_at_exit(self) -> None:
        for process in self.processes:
            process.kill()

    def join(self, seconds: float = PATIENCE_SECONDS) -> list[int]:
        """Wait for the end of all ranks; their exit codes. Raises TimeoutError (after killing them) if they hang."""
        deadline = time.monotonic() + seconds
        running = {process.sentinel for process in self.processes}
        while running:
            ended = wait(list(running), timeout=max(0.0, deadline - time.monotonic()))
            if not ended:
                for process in self.processes:
                    process.kill()
                raise TimeoutError(f"{len(running)} of {len(self.processes)} ranks still ran after {seconds} s")
            running -= set(ended)
        for process in self.processes:
            process.join()
        return [process.exitcode for process in self.processes]  # type: ignore[misc]

    def results(self, seconds: float = PATIENCE_SECONDS) -> list[Any]:
        """What every rank returned. Raises RuntimeError with the tracebacks of those that failed."""
        outcomes: list[Any] = []
        for receiver in self._results:
            try:
                outcomes.append(receiver.recv() if receiver.poll(seconds) else ("failed", "no answer"))
            except EOFError:
                outcomes.append(("failed", "ended without an answer"))
        self.join(seconds)
        failures = [f"rank {rank}: {value}" for rank, (kind, value) in enumerate(outcomes) if kind == "failed"]
        if failures:
            raise RuntimeError("\n".join(failures))
        return [value for _, value in outcomes]


def run_ranks(world_size: int, store: Path, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Run a function as ranks and return what each returned."""
    return RankGroup(world_size, store, function, *arguments).results()


def hear_ctrl_c() -> None:
    """Take SIGINT as a process that a shell starts does: a server that a preparation has started keeps it blocked."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _rank(
    rank: int,
    world_size: int,
    store: Path,
    answer: Connection,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist

    hear_ctrl_c()
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        answer.send(("returned", function(*arguments)))
    except SystemExit:
        raise
    except BaseException:
        answer.send(("failed", traceback.format_exc()))
        sys.exit(1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
