"""PyTorch's profiler over a few steps of a run: a trace of each of the first ranks, and rank 0's table.

Imported by runs that profile and by no other. While it is on, ranges mark the steps, their wait for a batch and the
head; what everything else belongs to is found out from the trace.
"""

import gzip
import os
from collections.abc import Generator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from common.os_errors import refusal
from common.progress import format_bytes
from common.publish import sweep_temporaries, write_json_whole, write_whole
from common.run_folder import RunFolder
from common.scratch_folder import scratch_folder
from common.step_profile import StepProfile, profile_lines, table_name, trace_name
from model.gpt import GPT
from model.ranks import Ranks
from train.batches.loader import StepBatch
from train.profiler.names import HEAD, WAIT
from train.profiler.trace_table import read_events, tabulate
from train.run.acts import Acts
from train.run.recorder import Recorder
from train.settings.sections import Config

MOST_TRACES = 8  # ranks that write one: they take megabytes, and are much alike
MOST_TABLED_BYTES = 256 << 20  # of a trace: a million events, which take gigabytes of memory and a minute to read
SCRATCH = "longhaul-profile-"
FAST = 3  # gzip's level: somewhat larger files than its best, in a fraction of the time
LAST_KEY = b'"traceName"'  # of a trace that is whole
LAST_BYTES = 8192  # in which that stands


def build_step_profiler(
    config: Config, next_step: int, folder: RunFolder, ranks: Ranks, recorder: Recorder, acts: Acts, model: GPT
) -> "StepProfiler | None":
    """What profiles the steps that the configuration names, as far as they are to come; None where none is."""
    first, last = config.profile.first, min(config.profile.first + config.profile.steps - 1, config.run.max_steps)
    steps = range(max(first, next_step), last + 1)
    if steps:
        return StepProfiler(steps, folder, ranks, recorder, acts, model)
    if not any(folder.profile.glob(f"steps-*-{last:05d}.json")):
        recorder.log(f"profile: step {last} is past and was not profiled: give a profile.first of {next_step} or more")
    return None


class StepProfiler:
    """Profiles some steps of this rank. All ranks call its methods together, whether they write a trace or not."""

    def __init__(
        self, steps: range, folder: RunFolder, ranks: Ranks, recorder: Recorder, acts: Acts, model: GPT
    ) -> None:
        self._steps = steps
        self._folder = folder
        self._ranks = ranks
        self._recorder = recorder
        self._acts = acts
        self._model = model
        self._profile: profile | None = None
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._step_range: record_function | None = None
        self._head_range: record_function | None = None
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would report its own starts on standard error

    def watched(self, batches: Generator[StepBatch]) -> Generator[StepBatch]:
        """The same batches; the wait for each is marked. Closing them ends a profile that is under way."""
        try:
            while True:
                with record_function(WAIT):
                    batch = next(batches)
                yield batch
        finally:
            self._abandon()
            batches.close()

    def before(self, step: int) -> None:
        """A step is about to begin, with its wait for a batch."""
        if step in self._steps and self._ranks.rank < MOST_TRACES:
            if step == self._steps[0]:
                self._start()
            self._step_range = record_function(f"step {step}")
            self._step_range.__enter__()

    def after(self, step: int) -> None:
        """A step has been done, recorded and agreed on. Publishes the profile after the last."""
        if self._step_range is not None:
            self._step_range.__exit__(None, None, None)
            self._step_range = None
        if step == self._steps[-1]:
            self._publish()

    def _start(self) -> None:
        """Profile from here on. What fails is reported with the profile's end."""
        device = [ProfilerActivity.CUDA] if self._ranks.device.type == "cuda" else []
        self._profile = profile(activities=[ProfilerActivity.CPU, *device])
        self._hooks = [  # the head is what a forward does after its last norm
            self._model.ln_f.register_forward_hook(self._begin_head),
            self._model.register_forward_hook(self._end_head),
        ]
        self._profile.start()

    def _begin_head(self, *_: Any) -> None:
        self._head_range = record_function(HEAD)
        self._head_range.__enter__()

    def _end_head(self, *_: Any) -> None:
        if self._head_range is not None:
            self._head_range.__exit__(None, None, None)
            self._head_range = None

    def _stop(self) -> profile | None:
        """Stop profiling; return what has been recorded, or None where nothing was or that fails."""
        found, self._profile = self._profile, None
        for hook in self._hooks:
            hook.remove()
        if found is not None:
            found.stop()
        return found

    def _abandon(self) -> None:
        """End what the run's own end has cut short: a start that resumes it profiles the steps that it does."""
        if self._profile is not None:
            self._stop()
            self._recorder.log(f"profile: ended before step {self._steps[-1]} was done: nothing of it is kept")

    def _publish(self) -> None:
        """Stop, write this rank's trace and rank 0's table. What fails is reported, and ends nothing."""
        trouble = ""
        self._acts.enter("profiling")  # a large trace takes longer than a step: that is no hang
        try:
            if (done := self._stop()) is not None:
                self._write(self._exported(done))
        except OSError as error:
            trouble = refusal("written", error, error.filename or self._folder.profile)
        except ValueError as error:
            trouble = str(error)
        except Exception as error:  # whatever the profiler comes up with: it only looks on
            trouble = f"{type(error).__name__}: {' '.join(str(error).split())}"
        for rank, why in enumerate(self._ranks.gather(trouble)):
            if why:
                self._recorder.log(f"WARNING: profile of rank {rank}: {why}")

    def _exported(self, done: profile) -> bytes:
        """The trace as JSON. Raises OSError, RuntimeError; ValueError if it is not whole."""
        with scratch_folder(SCRATCH) as scratch:
            path = scratch / "trace.json"
            done.export_chrome_trace(str(path))
            trace = path.read_bytes() if path.exists() else b""
            if LAST_KEY not in trace[-LAST_BYTES:]:  # PyTorch raises nothing where the disk is full
                raise ValueError(
                    f"PyTorch has written {format_bytes(len(trace))} of a trace: is {scratch.parent} full?"
                )
            return trace

    def _write(self, trace: bytes) -> None:
        """Publish this rank's trace; and the table, if it is rank 0.

        Raises OSError; ValueError for a trace that is too large for a table, or not what a trace should be.
        """
        first, last, rank = self._steps[0], self._steps[-1], self._ranks.rank
        folder, traced = self._folder.profile, min(self._ranks.world_size, MOST_TRACES)
        traces = [trace_name(first, last, number) for number in range(traced)]
        folder.mkdir(parents=True, exist_ok=True)
        sweep_temporaries(folder, [traces[rank], *([table_name(first, last)] if rank == 0 else [])])
        write_whole(folder / traces[rank], gzip.compress(trace, FAST, mtime=0))
        if rank > 0:
            return
        if len(trace) > MOST_TABLED_BYTES:
            raise ValueError(f"no table, its trace is too large ({format_bytes(len(trace))}): lower profile.steps")
        table = StepProfile(
            first_step=first,
            last_step=last,
            rank=rank,
            world_size=self._ranks.world_size,
            device=self._ranks.device.type,
            traces=traces,
            **tabulate(read_events(trace)),
        )
        write_json_whole(folder / table_name(first, last), table)
        for line in profile_lines(table):
            self._recorder.log(line)
        self._recorder.log(f"  traces, for Perfetto (ui.perfetto.dev): {folder}")
