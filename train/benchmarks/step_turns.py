"""Turns: each contestant in a process of its own, one at work at a time, the others waiting. No torch in this one."""

import multiprocessing
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from train.benchmarks.step_cases import Case, Request

LEAVE_SECONDS = 10.0  # for a process that was told to end


class Failed(Exception):
    """What became of a contestant, in one line."""


class Worker:
    """One contestant's process, seen from outside."""

    def __init__(self, name: str, case: Case) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, case), name=name, daemon=True)
        self._process.start()
        theirs.close()  # so that its end is noticed here

    def receive(self) -> dict[str, Any]:
        """Its next answer. Raises Failed where that is an error, or its end."""
        try:
            answer: dict[str, Any] = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            status = self._process.exitcode
            why = f"signal {-status}" if status is not None and status < 0 else f"exit status {status}"
            raise Failed(f"its process ended ({why}{', as when memory runs out' if status == -9 else ''})") from None
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def ask(self, request: Request) -> dict[str, Any]:
        """Raises Failed."""
        with suppress(OSError):  # it ended while it waited: `receive` knows how
            self._connection.send(request)
        return self.receive()

    def end(self) -> None:
        with suppress(OSError):
            self._connection.send(None)
        self._process.join(LEAVE_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _serve(connection: Connection, name: str, case: Case) -> None:
    from train.benchmarks.step_worker import serve  # with torch, which only contestants need

    serve(connection, name, case)


def take_turns(case: Case) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """What each contestant answers, in the order in which they do: (its name, which kind of answer, the answer).

    Kinds: `facts` of each, `warm_up` of each, then `turn` of each, and again; `trace` last. Whoever fails has an
    `error` ({"error": one line}) and takes no more turns.
    """
    rounds: list[tuple[str, Request | None]] = [("facts", None), ("warm_up", Request(case.warm_up))]
    rounds += [("turn", Request(case.steps))] * case.turns
    workers: dict[str, Worker] = {}
    try:
        for name in case.contestants:  # they get ready at the same time
            workers[name] = Worker(name, case)
        for kind, request in rounds:
            for name in list(workers):
                yield _answer(workers, name, kind, request)
        if case.profile is not None:
            for name in list(workers):
                trace = Request(1, case.profile / f"{case.name}-{name}.json.gz")
                yield _answer(workers, name, "trace", trace)
    finally:
        for worker in workers.values():
            worker.end()


def _answer(
    workers: dict[str, Worker], name: str, kind: str, request: Request | None
) -> tuple[str, str, dict[str, Any]]:
    """One contestant's; where it fails it is taken out of the workers."""
    try:
        return name, kind, workers[name].ask(request) if request else workers[name].receive()
    except Failed as failure:
        workers.pop(name).end()
        return name, "error", {"error": str(failure)}
