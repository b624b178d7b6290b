"""What a run reports while it runs: `metrics.jsonl` is the record, terminal and log are views of it."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm import tqdm

from common.curves import KnownCurves
from common.os_errors import refusal
from common.patient_file import PatientFile
from common.plain_text import bar_file, one_line
from common.progress import ProgressLines, WaitingLines, format_count, format_duration
from common.run_folder import RunFolder
from model.ranks import Ranks
from train.errors import StorageFailed
from train.run.mirror import Mirror, as_sample, is_mirrored
from train.run.storage import RETRY_DELAYS, is_transient


class Recorder:
    """Writes only on rank 0; on other ranks every call does nothing.

    A file system that refuses records does not end a step: they wait in memory, and `lost` is true once they don't fit.
    """

    def __init__(
        self,
        folder: RunFolder,
        ranks: Ranks,
        max_steps: int,
        *,
        first_step: int,
        line_every: int,
        work: tuple[int, int] | None = None,
    ) -> None:
        """Made on every rank. Args: work: tokens of the run at this start and after its last step, for the ETA."""
        self._work = work
        self._active = ranks.is_first
        self._max_steps = max_steps
        self._line_every = line_every
        self._started: float | None = None
        self._first_step = first_step
        self.lost = False
        self._logged_trouble = ""
        self._announced: set[str] = set()  # kinds of long work
        self._by_source: dict[str, tuple[float, int]] = {}  # losses summed since the last line, and their number
        if not self._active:
            return
        self._folder = folder
        self._curves = KnownCurves()
        self._mirrors: list[Mirror] = []
        self._bar: tqdm[Any] | None = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=max_steps, initial=first_step, unit="step", dynamic_ncols=True, file=bar_file())

    def open_files(self) -> None:
        """Raises StorageFailed, only on rank 0."""
        if not self._active:
            return
        try:
            self._metrics = PatientFile(self._folder.metrics)
            self._samples = PatientFile(self._folder.samples)
            self._log_file = self._open_log()
        except OSError as error:
            raise StorageFailed(refusal("written", error, error.filename or self._folder.path)) from None

    def _open_log(self) -> TextIO:
        return open(self._folder.log, "a", encoding="utf-8", errors="backslashreplace", buffering=1)

    def mirror_to(self, mirror: Mirror) -> None:
        """Pass every record on to a mirror as well."""
        self._mirrors.append(mirror)

    def log(self, text: str) -> None:
        """Log one line, on the terminal and in log.txt."""
        if not self._active:
            return
        text = one_line(text)
        with contextlib.suppress(OSError):  # the disk is full: the terminal shows it all the same
            if self._log_file.closed:  # a rank hangs that only had to leave
                self._log_file = self._open_log()
            self._log_file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S%z')} {text}\n")
        try:
            if self._bar is not None:
                self._bar.write(text, file=sys.stdout)
            else:
                print(text + "\n", end="", flush=True)  # one write: mirrors say something from their own threads
        except OSError:  # the terminal or the pipe's reader is gone: the run continues without
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    @contextmanager
    def working(self, what: str, size: str, total: int, unit: str) -> Iterator[Callable[[int], object]]:
        """Log what is about to be done between steps, the first time, and show on the terminal how long it still takes.

        Gives what is to be called with the number of `unit`s that have been done since the last call.

        Args:
            what: such as "validating at step 10". size: how much that is, in words.
            total: units. unit: in the singular.
        """
        if not self._active:
            yield lambda count: None
            return
        kind = what.split(" at step")[0]
        if kind not in self._announced:
            self._announced.add(kind)
            self.log(f"{what}: {size}")
        lines = ProgressLines(total, unit, what, self._show)
        try:
            yield lines.update
        finally:
            if lines.shown and self._bar is not None:
                self._show("")

    @contextmanager
    def waiting(self, what: str, so_far: Callable[[], str] = str, last_seconds: float | None = None) -> Iterator[None]:
        """Show on the terminal how long this takes, whose end can't be seen from inside.

        Args:
            so_far: what is done by now. last_seconds: what it took the last time, if that is known.
        """
        if not self._active:
            yield
            return
        with WaitingLines(what, so_far, self._show, last_seconds) as lines:
            yield
        if lines.shown and self._bar is not None:
            self._show("")

    def _show(self, text: str) -> None:
        """A line for whoever looks at the terminal, which the log does not need."""
        with contextlib.suppress(OSError):  # the terminal, or the pipe's reader, is gone
            if self._bar is None:
                print(text + "\n", end="", flush=True)  # one write: mirrors say something from their own threads
            else:
                self._bar.set_description_str(text)

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
        self._add_sources(record)
        if record["step"] % self._line_every == 0 or record["step"] == self._max_steps:
            self.log(self._line(record))
            if self._by_source:
                means = (f"{name} {total / count:.4f}" for name, (total, count) in self._by_source.items())
                self.log(f"step {record['step']}/{self._max_steps} | loss by source: {', '.join(means)}")
                self._by_source.clear()

    def _add_sources(self, record: Mapping[str, Any]) -> None:
        """Add a step's losses by source, each with its number of targets, unless nothing was learned from it."""
        if record.get("skipped"):
            return
        for name, loss in record.get("train_loss_by_source", {}).items():
            (total, count), more = self._by_source.get(name, (0.0, 0)), record["source_targets"][name]
            self._by_source[name] = total + loss * more, count + more

    def note(self, record: dict[str, Any]) -> None:
        """Record anything else that belongs to a step (a validation, a start)."""
        if not self._active:
            return
        self._record(record)
        if record.get("kind") == "start":
            self._curves.learn(record)
            if complaint := self._curves.complaint_about(self._folder.metrics):
                self.log(f"WARNING: {complaint}: correct the curves of its evaluation")

    def _record(self, record: dict[str, Any]) -> None:
        self._append(self._metrics, record)
        if self._mirrors and is_mirrored(record, self._curves):
            for mirror in self._mirrors:
                mirror.put(record)

    def sync(self) -> None:
        """Wait until the metrics so far are on the disk: a checkpoint that outlives a power cut must not outlive them.

        Raises OSError where they may not be.
        """
        if self._active:
            with contextlib.suppress(OSError):  # samples can be made again
                self._samples.sync()
            try:
                self._metrics.sync()
            finally:
                self._log_trouble()

    def sync_all(self, patience_seconds: float, retry_delays: Sequence[float] = RETRY_DELAYS) -> None:
        """Wait until every record is on the disk, at the end of the run, in several tries.

        Raises StorageFailed where they can't be: what they measured is then measured by the next start.
        """
        until = time.monotonic() + patience_seconds
        for file in (self._metrics, self._samples) if self._active else ():
            _retry(file.sync, until, retry_delays, self.log)

    @property
    def trouble(self) -> str:
        """What currently can't be written."""
        files = (self._metrics, self._samples) if self._active else ()
        return "; ".join(_refusal(file) for file in files if file.trouble is not None)

    def _append(self, file: PatientFile, record: dict[str, Any]) -> None:
        try:
            file.append(record)
        except OSError:
            self.lost = True  # all ranks must know before it ends the run
        self._log_trouble()

    def _log_trouble(self) -> None:
        """Log a line whenever writing has started to fail, or works again."""
        trouble = self.trouble
        if trouble != self._logged_trouble:
            self._logged_trouble = trouble
            self.log(f"WARNING: {trouble}: records wait in memory" if trouble else "all records are written again")

    def sample(self, step: int, prompt: str, text: str, reward: float | None = None) -> None:
        """Record what the model generated after a prompt, perhaps with its reward, and log it on one line."""
        if self._active:
            rewarded = {} if reward is None else {"reward": reward}
            sample = {"step": step, "prompt": prompt, "text": text, **rewarded, "time": time.time()}
            self._append(self._samples, sample)
            for mirror in self._mirrors:
                mirror.put(as_sample(sample))
            worth = "" if reward is None else f" (reward {reward:.3g})"
            self.log(f"  sample: {prompt}│{json.dumps(text, ensure_ascii=False)[1:-1]}{worth}")

    def close(self) -> None:
        if self._active:
            for mirror in self._mirrors:
                mirror.close()
            if self._bar is not None:
                self._bar.close()
            for file in (self._metrics, self._samples):
                try:
                    file.close()
                except OSError as error:  # the reason why the run ends matters more
                    self._logged_trouble = self.trouble
                    self.log(f"WARNING: {file.path} may lack its last lines: {error.strerror}")
            with contextlib.suppress(OSError):
                self._log_file.close()

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
        first, last = self._work or (self._first_step, self._max_steps)
        now = record["tokens" if self._work else "step"]
        if now > first and self._started is not None:
            seconds = (time.monotonic() - self._started) / (now - first) * (last - now)
            parts.append(f"ETA {format_duration(seconds)}")
        return " | ".join(parts)


def _refusal(file: PatientFile) -> str:
    assert file.trouble is not None
    return f"{file.path} can't be written: {file.trouble.strerror or file.trouble}"


def _retry(act: Callable[[], None], until: float, delays: Sequence[float], log: Callable[[str], None]) -> None:
    """Do what a file system may refuse for a moment, waiting between tries, not beyond `until` (time.monotonic()).

    Raises StorageFailed.
    """
    for delay in (*delays, None):
        try:
            act()
            return
        except OSError as error:
            why = f"{error.filename} can't be written: {error.strerror}"
            if delay is None or not is_transient(error) or time.monotonic() + delay > until:
                raise StorageFailed(f"{why}: the same command resumes from the newest checkpoint") from None
            log(f"WARNING: {why}: trying again in {format_duration(delay)}")
            time.sleep(delay)
