"""Worker processes that encode, and their results in order, whatever order they finish in."""

import contextlib
import multiprocessing
import signal
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Self

import numpy as np

from common.errors import UserError
from data_prep.corpora.encode_worker import ENCODING_ERRORS, Failure, Part, Work, encode, error_text, serve
from data_prep.corpora.file_kinds import kind_of
from data_prep.corpora.readers import UnitReader, lines_before
from data_prep.corpora.workers import ignoring_interrupts
from data_prep.token_sets.marked_writer import MARKED_DTYPE
from data_prep.tokenization.tokenizer import Tokenizer

QUEUED_WORKS = 2  # per worker, so that it never waits for the parent
BUFFERED_BYTES = 512 << 20  # of results that wait for their turn, over all workers
PRELOADED = ["numpy", "pyarrow.parquet", "tiktoken"]  # in the fork server: once in memory, shared by all workers
START_METHODS = [
    method for method in ("forkserver", "spawn", "fork") if method in multiprocessing.get_all_start_methods()
]


@dataclass
class _Worker:
    slot: int
    process: Any
    connection: Connection
    works: "deque[_Pending]" = field(default_factory=deque)  # handed over, in order; the first is being done
    buffered_bytes: int = 0


@dataclass
class _Pending:
    work: Work
    worker: _Worker
    parts: deque[Part] = field(default_factory=deque)
    done: bool = False
    failure: Failure | None = None  # results earlier in the works' order come first, whichever worker was faster


def warm_up(start_method: str) -> None:
    """Start the process that workers are forked from, if there will be one: it imports its packages in the meantime."""
    if start_method == "forkserver":
        from multiprocessing import forkserver  # Windows has none

        multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
        with ignoring_interrupts():
            forkserver.ensure_running()


class SerialEncoder:
    """EncodePool's work in this process: for little text, where starting processes takes longer than the work."""

    def __init__(self, tokenizer: Tokenizer, held_out: Collection[int] = ()) -> None:
        self._tokenizer, self._held_out = tokenizer, held_out
        self._reader = UnitReader(tokenizer)

    def run(self, works: Iterator[Work]) -> Iterator[Part]:
        progress = [0]
        for work in works:
            try:
                yield from encode(work, self._tokenizer, self._reader, progress, 0, self._held_out)
            except ENCODING_ERRORS as error:
                raise UserError(f"{_where(work, progress[0])}: {error_text(error)}") from error

    def check(self) -> None:
        """Does nothing: there is no worker that could have died."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()


def open_encoder(
    tokenizer: Tokenizer, workers: int, start_method: str, held_out: Collection[int]
) -> "SerialEncoder | EncodePool":
    """An encoder with `workers` processes, or none for 0. `held_out` as of `Selection.takes`."""
    if not workers:
        return SerialEncoder(tokenizer, held_out)
    return EncodePool(tokenizer, workers, start_method, held_out)


class EncodePool:
    """`workers` processes. `run` gives the parts of works in the works' order; use as a context manager.

    A worker that fails or dies ends `run` with a UserError naming the file, the unit and the row it was at. What waits
    for its turn is bounded: a worker too far ahead is not read from, so it blocks.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        workers: int,
        start_method: str = START_METHODS[0],
        held_out: Collection[int] = (),
    ) -> None:
        self._dtype = tokenizer.dtype
        self._limit = max(1, BUFFERED_BYTES // workers)
        context: Any = multiprocessing.get_context(start_method)
        warm_up(start_method)
        self._progress = context.RawArray("q", workers)
        self._workers = []
        for slot in range(workers):
            ours, theirs = context.Pipe()
            to_close = ours if start_method == "fork" else None
            arguments = (theirs, to_close, tokenizer.spec, self._progress, slot, held_out)
            process = context.Process(target=serve, args=arguments, daemon=True, name=f"encoder-{slot}")
            with ignoring_interrupts():
                process.start()
            theirs.close()
            self._workers.append(_Worker(slot, process, ours))

    @property
    def process_ids(self) -> list[int]:
        return [worker.process.pid for worker in self._workers]

    def run(self, works: Iterator[Work]) -> Iterator[Part]:
        """Parts of all works, in order."""
        pending: deque[_Pending] = deque()
        exhausted = False
        while True:
            while not exhausted and (worker := self._least_busy()) is not None:
                work = next(works, None)
                if work is None:
                    exhausted = True
                else:
                    pending.append(self._hand_over(work, worker))
            if not pending:
                return
            head = pending[0]
            while head.parts:
                part = head.parts.popleft()
                head.worker.buffered_bytes -= part.tokens.nbytes
                yield part
            if head.failure is not None:
                raise UserError(f"{_where(head.work, head.failure.row)}: {head.failure.why}")
            if head.done:
                pending.popleft()
            else:
                self._receive(head.worker)

    def check(self) -> None:
        """Raise UserError where a worker has died: for whoever keeps `run` waiting for its next work."""
        for worker in self._workers:
            if not worker.process.is_alive():
                self._report_death(worker)

    def _least_busy(self) -> _Worker | None:
        worker = min(self._workers, key=lambda worker: len(worker.works))
        return worker if len(worker.works) < QUEUED_WORKS else None

    def _hand_over(self, work: Work, worker: _Worker) -> _Pending:
        pending = _Pending(work, worker)
        worker.works.append(pending)
        try:
            worker.connection.send(work)
        except OSError:
            self._report_death(worker)
        return pending

    def _receive(self, head: _Worker) -> None:
        """Wait for results of the worker whose turn it is and of those that are not too far ahead."""
        reading = [w for w in self._workers if w.works and (w is head or w.buffered_bytes < self._limit)]
        by_handle: dict[Any, _Worker] = {worker.connection: worker for worker in reading}
        by_handle |= {worker.process.sentinel: worker for worker in self._workers}
        ready = wait(list(by_handle))
        connections = [handle for handle in ready if isinstance(handle, Connection)]
        for handle in connections:
            self._take(by_handle[handle])
        if not connections:
            self._report_death(by_handle[ready[0]])

    def _take(self, worker: _Worker) -> None:
        pending = worker.works[0]
        try:
            message = worker.connection.recv()
            if message is None or isinstance(message, Failure):
                pending.done, pending.failure = True, message
                worker.works.popleft()
                return
            data = worker.connection.recv_bytes()
        except (EOFError, OSError):
            self._report_death(worker)
        rows, counts, skipped, keys, absent = message
        dtype = MARKED_DTYPE if pending.work.conversations else self._dtype
        tokens = np.frombuffer(data, dtype=dtype) if data else np.array([], dtype=dtype)
        pending.parts.append(Part(pending.work, rows, counts, tokens, skipped, keys, absent))
        worker.buffered_bytes += tokens.nbytes

    def _report_death(self, worker: _Worker) -> None:
        worker.process.join(5)
        code = worker.process.exitcode
        how = (
            f"was killed by {signal.Signals(-code).name}"
            if code is not None and code < 0
            else f"left with status {code}"
        )
        place = f"at {_where(worker.works[0].work, self._progress[worker.slot])}" if worker.works else "without work"
        raise UserError(
            f"worker {worker.slot} {how} {place}: run the same command again to resume from the last whole shard "
            "(short of memory? fewer --workers)"
        )

    def close(self) -> None:
        """Stop all workers, whatever they are doing."""
        for worker in self._workers:
            worker.connection.close()
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()


def _where(work: Work, row: int) -> str:
    kind = kind_of(work.name)
    if kind.content == "lines":
        with contextlib.suppress(OSError):  # of a file that is gone
            return f"{work.name}, line {lines_before(work.path, work.unit) + row + 1}"
    return f"{work.name}, {'row group' if kind.content == 'parquet' else 'block'} {work.unit}, row {row}"
