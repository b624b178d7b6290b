"""What a run tells while it goes on: `metrics.jsonl` is the record, terminal and log are views of it."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.errors import UserError
from common.metrics_file import MetricsFile, record_kind
from common.progress import format_count, format_duration
from common.run_folder import RunFolder
from model.ranks import Ranks
from train.wandb_mirror import MIRRORED, WandbMirror


class Recorder:
    """Written to by rank 0 alone; on other ranks every call does nothing."""

    def __init__(self, folder: RunFolder, ranks: Ranks, max_steps: int, *, first_step: int, line_every: int) -> None:
        self._active = ranks.is_first
        self._max_steps = max_steps
        self._line_every = line_every
        self._started: float | None = None
        self._first_step = first_step
        if not self._active:
            return
        self._metrics = MetricsFile(folder.metrics)
        self._samples = MetricsFile(folder.samples)
        self._log = open(folder.log, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (closed by close)
        self._mirror: WandbMirror | None = None
        self._bar: tqdm[Any] | None = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=max_steps, initial=first_step, unit="step", dynamic_ncols=True, file=sys.stderr)

    def mirror_to(self, mirror: WandbMirror) -> None:
        """Pass every record on to a mirror as well."""
        self._mirror = mirror

    def say(self, text: str) -> None:
        """A line for people, on the terminal and in log.txt."""
        if not self._active:
            return
        with contextlib.suppress(OSError):  # the disk is full: who holds the terminal is told all the same
            self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S%z')} {text}\n")
        try:
            if self._bar is not None:
                self._bar.write(text, file=sys.stdout)
            else:
                print(text, flush=True)
        except OSError:  # the terminal or the pipe's reader is gone: the run goes on without
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def step(self, record: dict[str, Any]) -> None:
        """Record a training step."""
        if not self._active:
            return
        self._record(record)
        if self._started is None:
            self._started, self._first_step = time.monotonic(), record["step"]  # the first step is not typical
        if self._bar is not None:
            figures = [f"loss {record['loss']:.3f}", f"{format_count(record['tokens_per_second'])} tokens/s"]
            if record["mfu"] is not None:
                figures.append(f"MFU {record['mfu']:.1%}")
            self._bar.set_postfix_str(", ".join(figures), refresh=False)
            try:
                self._bar.update(record["step"] - self._bar.n)
            except OSError:  # the terminal is gone
                self._bar = None
        if record["step"] % self._line_every == 0 or record["step"] == self._max_steps:
            self.say(self._line(record))

    def note(self, record: dict[str, Any]) -> None:
        """Record anything else that belongs to a step (a validation, a start)."""
        if self._active:
            self._record(record)

    def _record(self, record: dict[str, Any]) -> None:
        self._append(self._metrics, record)
        if self._mirror is not None and record_kind(record) in MIRRORED:
            self._mirror.put(record)

    def sync(self) -> None:
        """Wait until the record so far is on the disk: a checkpoint that outlives a power cut must not outlive it."""
        if self._active:
            with _writing(self._metrics.path):
                self._metrics.sync()

    def _append(self, file: MetricsFile, record: dict[str, Any]) -> None:
        with _writing(file.path):
            file.append(record)

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Record what the model wrote after a prompt, and show it on one line."""
        if self._active:
            self._append(self._samples, {"step": step, "prompt": prompt, "text": text, "time": time.time()})
            self.say(f"  sample: {prompt}│{json.dumps(text, ensure_ascii=False)[1:-1]}")

    def close(self) -> None:
        if self._active:
            if self._mirror is not None:
                self._mirror.close()
            if self._bar is not None:
                self._bar.close()
            for file in (self._metrics, self._samples):
                try:
                    file.close()
                except OSError as error:  # why the run ends counts for more
                    self.say(f"WARNING: {file.path} may lack its last lines: {error.strerror}")
            with contextlib.suppress(OSError):
                self._log.close()

    def _line(self, record: dict[str, Any]) -> str:
        parts = [
            f"step {record['step']}/{self._max_steps}",
            f"loss {record['loss']:.4f}",
            f"lr {record['lr']:.2e}",
            f"norm {record['grad_norm']:.2f}",
            f"{format_count(record['tokens_per_second'])} tokens/s",
        ]
        if record["mfu"] is not None:
            parts.append(f"MFU {record['mfu']:.1%}")
        done = record["step"] - self._first_step
        if done > 0 and self._started is not None:
            seconds = (time.monotonic() - self._started) / done * (self._max_steps - record["step"])
            parts.append(f"ETA {format_duration(seconds)}")
        return " | ".join(parts)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Raises UserError where a record can't be written: a run with gaps in it would be another one."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} can't be written: {error.strerror}: make room, then the same command goes on from the newest "
            "checkpoint"
        ) from None
