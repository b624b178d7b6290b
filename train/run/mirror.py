"""Mirrors of a run's record: a thread of its own each, which may fail or hang without costing a step.

A mirror is a `Writer` (wandb_mirror.py, tensorboard_mirror.py): it says where it writes, and takes figures and samples.
What is shared is here: the thread, which records are mirrored, and the figures' names, in groups as their viewers show
them: `train/loss`, `val/loss`, `hellaswag/acc_norm`, `speed/tokens_per_second`, `layers/gradient_norm/h.3.attn`.
"""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from common.curves import KnownCurves
from common.errors import UserError
from common.layer_figures import KIND as LAYERS
from common.layer_figures import flattened
from common.metric_fields import VALIDATED, by_source
from common.metrics_file import record_kind

SAMPLES = "samples"  # the kind that a mirror knows a generated text by
QUEUE_RECORDS = 100_000  # a mirror that hangs costs memory up to here
AXES = ("step", "tokens", "flops", "time")  # what curves are drawn over
SPEED = ("tokens_per_second", "mfu", "step_seconds", "data_wait_seconds", "log_seconds", "memory_gib")
PREFIXES = {"validation": "val"}  # of figures' keys, where that is not the kind


class Writer(Protocol):
    """Where a mirror writes. `name` is for people. Every method may raise what it likes, and take as long."""

    name: str

    def open(self) -> str:
        """Start, or resume; return where it writes, in words."""
        ...

    def take(self, record: dict[str, Any]) -> bool:
        """Write a record's figures; return whether they were not there yet."""
        ...

    def take_samples(self, step: int, texts: list[tuple[str, str]]) -> bool:
        """Write what was generated after a step: prompts and continuations."""
        ...

    def finish(self) -> None: ...


def is_mirrored(record: dict[str, Any], known: KnownCurves) -> bool:
    """Whether a record is part of a curve."""
    return record_kind(record) in {"train", LAYERS, *known.kinds}


def grouped(record: dict[str, Any]) -> dict[str, Any]:
    """A record's values under the names that viewers group by; step, tokens, FLOPs and time keep theirs.

    What no viewer can use, or encode, is left out: a damaged record may hold anything.
    """
    kind = record_kind(record)
    if kind == LAYERS:
        return {"step": record["step"], **flattened(record)}
    prefix, found = PREFIXES.get(kind, kind), dict[str, Any]()
    for key, value in record.items():
        if (
            key in ("kind", "sequences")
            or not key.isprintable()
            or (isinstance(value, str) and not value.isprintable())
        ):
            continue
        if isinstance(value, dict):  # of a mix's sources
            named = by_source(record, key).items()
            found |= {f"{_name(prefix, key)}/{name.removeprefix(f'{key}.')}": each for name, each in named}
        elif key in AXES:
            found[key] = value
        elif key in SPEED:
            found[f"speed/{key}"] = value
        elif not key.startswith(f"{VALIDATED}."):  # what a reader has made of the same
            found[_name(prefix, key)] = value
    return found


def _name(prefix: str, key: str) -> str:
    return f"{prefix}/{key.removeprefix(f'{prefix}_')}"


def as_sample(sample: dict[str, Any]) -> dict[str, Any]:
    """A line of samples.jsonl as a record for `feed`."""
    texts = {key: str(sample.get(key) or "") for key in ("prompt", "text")}
    return {"kind": SAMPLES, "step": sample["step"], **texts}


def feed(writer: Writer, records: Iterable[dict[str, Any]]) -> int:
    """Give a writer records and samples in their order, the samples of a step together; return how many were new."""
    new, step, texts = 0, 0, list[tuple[str, str]]()
    for record in records:
        is_sample = record_kind(record) == SAMPLES
        if texts and not (is_sample and record["step"] == step):
            new += len(texts) * writer.take_samples(step, texts)
            texts = []
        if is_sample:
            step = record["step"]
            texts.append((record["prompt"], record["text"]))
        else:
            new += writer.take(record)
    if texts:
        new += len(texts) * writer.take_samples(step, texts)
    return new


class Mirror:
    """Feeds a writer from a thread."""

    def __init__(self, writer: Writer, say: Callable[[str], None], finish_seconds: float) -> None:
        """Start the thread. Nothing that goes wrong in it raises here; `say` tells it, once, and where it writes.

        Args:
            finish_seconds: how long `close` waits for it.
        """
        self._writer, self._say, self._finish_seconds = writer, say, finish_seconds
        self._records: queue.Queue[dict[str, Any] | None] = queue.Queue(QUEUE_RECORDS)
        self.broken = threading.Event()
        self._thread = threading.Thread(target=self._run, name=writer.name, daemon=True)
        self._thread.start()

    def put(self, record: dict[str, Any]) -> None:
        """Hand over a record; never waits."""
        if self.broken.is_set():
            return
        try:
            self._records.put_nowait(record)
        except queue.Full:
            self._give_up("it has not taken a record for too long")

    def close(self) -> None:
        """Give the mirror some time to send what is left."""
        if self.broken.is_set():
            return
        with contextlib.suppress(queue.Full):  # then it hangs anyway
            self._records.put_nowait(None)
        self._thread.join(self._finish_seconds)
        if self._thread.is_alive():
            self._give_up(f"it did not finish within {self._finish_seconds:.0f} s")

    def _run(self) -> None:
        try:
            self._say(f"{self._writer.name} mirrors this run: {self._writer.open()}")
            feed(self._writer, self._taken())
            self._writer.finish()
        except BaseException as error:  # whatever a library that talks to a network comes up with
            self._give_up(str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")

    def _taken(self) -> Iterator[dict[str, Any]]:
        while (record := self._records.get()) is not None:
            yield record

    def _give_up(self, why: str) -> None:
        if not self.broken.is_set():
            self.broken.set()
            why = " ".join(why.split())
            self._say(f"{self._writer.name} is not mirroring this run ({why}); metrics.jsonl has everything")
