"""The trainer: one step after another, and what happens between them."""

import contextlib
import gc
import itertools
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from common.progress import FIRST_SECONDS, format_duration
from common.run_folder import RunFolder, Stop
from common.run_note import launched_at
from model.devices import peak_memory_gib
from model.gpt import GPT
from model.ranks import Ranks, agreed
from train.bad_steps import BadSteps
from train.batches.loader import StepBatch, StepLoader
from train.checkpoints.check_weights import check_replicas
from train.checkpoints.saver import CheckpointKeeper
from train.errors import LockLost, NonFiniteLoss, NonFiniteWeights, ReplicasDiffer, StorageFailed, TooManySpikes
from train.evaluations.evaluation import WHOLE, Due, Evaluation, described, due_after, is_due
from train.optimization.optimizer import set_learning_rate, set_momentum, set_weight_decay
from train.optimization.schedule import Course
from train.optimization.step import Stepper, StepResult, Verdict, of_all
from train.progress import Progress
from train.run.acts import Acts
from train.run.compile_seconds import keep_seconds, last_seconds
from train.run.lock import why_lost
from train.run.recorder import Recorder
from train.run.slow_ranks import SlowRanks
from train.run.spikes import Spikes
from train.run.state import RunState
from train.settings.sections import Config
from train.stopping.deadline import StopMargin
from train.stopping.stop_requests import StopRequest, kind, reason, remove_stop_file

if TYPE_CHECKING:
    from train.layer_statistics.layer_statistics import LayerStatistics  # imported by runs that ask for them
    from train.profiler.step_profiler import StepProfiler  # imported by runs that profile

COLLECT_STEPS = 1000  # steps from one garbage collection to the next
STATE_SECONDS = 10.0  # how often `state` is renewed between saves


@dataclass(frozen=True)
class Outcome:
    """How training ended, and why."""

    status: Literal["done", "preempted"]
    reason: str
    progress: Progress
    stop: Stop | None = None  # what requested it


@dataclass
class Trainer:
    """One process's part of a run. All ranks go through every method together."""

    config: Config
    course: Course
    ranks: Ranks
    folder: RunFolder
    model: GPT
    optimizer: torch.optim.Optimizer
    stepper: Stepper
    loader: StepLoader
    evaluations: Sequence[Evaluation]  # in this order, those before the save first
    keeper: CheckpointKeeper
    recorder: Recorder
    stop: StopRequest
    state: RunState
    acts: Acts
    slow_ranks: SlowRanks
    layer_statistics: "LayerStatistics | None"
    spikes: Spikes
    margin: StopMargin
    flops_per_token: int
    peak_flops: float | None  # of all ranks together, per second; None where the device is unknown
    start_facts: dict[str, Any] = field(default_factory=dict)  # what else the record of this start holds
    _verdict: Verdict = Verdict.LEARNED  # of the last step
    _batch: StepBatch = field(init=False)  # of the last step
    _state_written: float = 0.0
    _log_seconds: float = 0.0
    _trouble_told: str = ""
    _bad_steps: BadSteps = field(init=False)

    def __post_init__(self) -> None:
        own = (self.folder, self.model, self.loader, self.evaluations, self.keeper, self.spikes, self.acts)
        self._bad_steps = BadSteps(*own, dtype=self.stepper.dtype, earliest=self.course.warm_up.start)

    def run(self, progress: Progress, missing: Due) -> Outcome:
        """Train from `progress` to the last step, or until a stop is requested.

        Args:
            missing: what was due at `progress`, is not recorded, and is done first.
        """
        last_step = self.config.run.max_steps
        self._note_start(progress)
        if (stop_code := self._agree(progress)) == 0:
            self._warm_up(progress)
            stop_code = self._agree(progress)
        if stop_code:
            return Outcome("preempted", reason(stop_code), progress, kind(stop_code))
        if progress.step == 0:
            missing = missing | {e.name: WHOLE for e in self.evaluations if e.at_start}
        self._measure_before_save(progress, missing)
        gc.collect()
        gc.disable()  # a collection in the middle of a step would make the other ranks wait
        profiler = self._step_profiler(progress)
        batches = self._batches(progress, profiler)
        try:
            if (stop_code := self._measure_after_save(progress, missing)) != 0:
                return Outcome("preempted", reason(stop_code), progress, kind(stop_code))
            while progress.step < last_step:
                if profiler is not None:
                    profiler.before(progress.step + 1)
                with self.margin.timing("step"):
                    progress = self._step(progress, batches)
                stop_code = self._agree(progress)
                if self._verdict.skips:  # on all ranks, as has been agreed
                    self._bad_steps.examine(self._batch, progress.step, "the step was skipped")
                if profiler is not None:
                    profiler.after(progress.step)
                if is_due(progress.step, self.config.run.check_replicas_every_steps):
                    check_replicas(self.ranks, self.model)
                if (sustained := self.spikes.sustained(progress.step)) is not None:
                    batches.close()
                    progress = self._bad_steps.roll_back(sustained, progress, self._batch)
                    self._write_state(progress, "rolled back")
                    batches = self._batches(progress, profiler)
                    continue
                last = progress.step == last_step
                due = due_after(progress.step, self.evaluations, last=last)
                self._measure_before_save(progress, due)
                if stop_code or last or is_due(progress.step, self.config.checkpoint.every_steps):
                    self._save(progress, final=last or stop_code > 0)
                asked_before = self._measure_after_save(progress, due, stop_code)
                if asked_before or (stop_code and not last):
                    self._save(progress, final=True)
                    stop_code = stop_code or asked_before
                    return Outcome("preempted", reason(stop_code), progress, kind(stop_code))
                if is_due(progress.step, COLLECT_STEPS):
                    gc.collect()  # on all ranks at once
        except (NonFiniteLoss, NonFiniteWeights, ReplicasDiffer, TooManySpikes):  # of all ranks together
            self.keeper.finish()
            raise
        except BaseException:
            self.keeper.abandon()
            raise
        finally:
            batches.close()
            gc.enable()
        return Outcome("done", "all steps done", progress)

    def _step(self, progress: Progress, batches: Generator[StepBatch]) -> Progress:
        """One optimizer step and its record."""
        # Wait for the batch
        started, step = time.monotonic(), progress.step + 1
        self.acts.enter("training", step=step)
        self.acts.start("waiting for data")
        batch = next(batches)
        waited = time.monotonic() - started

        # Learn from it
        lr = self.course.rate(step)
        set_learning_rate(self.optimizer, lr)
        set_weight_decay(self.optimizer, self.course.decay_factor(step))
        set_momentum(self.optimizer, self.config.optim, step)
        self.stepper.limits = self.spikes.limits
        results: list[StepResult] = []
        try:
            for part in self.stepper.objective.updates(batch, step):
                results.append(self.stepper(part, step))
                if results[-1].verdict is not Verdict.LEARNED:
                    break
        except NonFiniteLoss:
            self._bad_steps.examine(batch, step, "the loss or the gradient norm is not finite")
            raise
        result = of_all(results)
        self._verdict, self._batch = result.verdict, batch

        sequences = self.loader.plan_at(progress.tokens).sequences
        tokens = sequences * self.config.model.block_size
        before, progress = progress, Progress(step, progress.tokens + tokens, progress.sequences + sequences)
        average = self.keeper.writer.average
        if average is not None and result.verdict is Verdict.LEARNED:
            average.update(before.tokens, progress.tokens)
        seconds = time.monotonic() - started

        # Record it
        record = self._record(progress, result, tokens, seconds) | {"lr": lr, "data_wait_seconds": waited}
        logging_started = time.monotonic()
        self.recorder.step(record)
        self._note_objective(progress, result)
        if self.layer_statistics is not None:
            self.layer_statistics.record(step)
        self._bad_steps.judge(step, result, before.sequences, sequences)
        self._note_hangs()
        self.slow_ranks.step(step, self.stepper.compute_timer.seconds)
        self._log_seconds = time.monotonic() - logging_started
        if time.monotonic() - self._state_written > STATE_SECONDS:
            self._write_state(progress, "training")
        return progress

    def _record(self, progress: Progress, result: StepResult, tokens: int, seconds: float) -> dict[str, Any]:
        """What metrics.jsonl has of the step that led to `progress`. All ranks call.

        Args:
            tokens: of the step, of all ranks.
            seconds: it took, the wait for its batch included.
        """
        rate = tokens / seconds
        record: dict[str, Any] = {
            "step": progress.step,
            "tokens": progress.tokens,
            "flops": float(progress.tokens * self.flops_per_token),  # up to here
            **self.stepper.objective.record(result.loss),
            **result.terms,
            "grad_norm": result.grad_norm,
            "tokens_per_second": rate,
            "mfu": rate * self.flops_per_token / self.peak_flops if self.peak_flops else None,
            "step_seconds": seconds,
            "log_seconds": self._log_seconds,  # of the step before
            "memory_gib": peak_memory_gib(self.ranks.device),
            "time": time.time(),
        }
        if result.verdict is not Verdict.LEARNED:
            record["skipped"] = True
        if self.config.data.is_packed:
            record[self.stepper.objective.unit] = int(result.targets)  # of the step: the rest is no target, or padding
        if by_source := self.loader.order.read_by_source(progress.sequences):
            length = self.config.model.block_size
            record["source_tokens"] = {name: count * length for name, count in by_source.items()}
            record["source_targets"] = dict(zip(by_source, self._batch.source_target_counts, strict=True))
            record["train_loss_by_source"] = dict(result.by_source)
        if self.config.log.sequences:
            shares = self.ranks.gather(self._batch.windows.ravel().tolist())
            record["sequences"] = [*map(self.loader.order.named, sorted(itertools.chain.from_iterable(shares)))]
        return record

    def _note_objective(self, progress: Progress, result: StepResult) -> None:
        """Record what the objective reports of a step beside its training record."""
        report = self.stepper.objective.report(result.terms)
        if report is None:
            return
        common = {"step": progress.step, "tokens": progress.tokens, "updates": result.updates, "time": time.time()}
        self.recorder.note(report.note | common)
        if is_due(progress.step, self.config.log.every_steps):
            self.recorder.log(f"step {progress.step}/{self.config.run.max_steps} | {report.line}")
        if is_due(progress.step, self.config.eval.sample_every_steps):
            for sample in report.samples:
                self.recorder.sample(progress.step, *sample)

    def _batches(self, progress: Progress, profiler: "StepProfiler | None") -> Generator[StepBatch]:
        """What the following steps learn from."""
        batches = self.loader.steps(progress.sequences, progress.tokens)
        return batches if profiler is None else profiler.watched(batches)

    def _note_hangs(self) -> None:
        for hang in self.acts.take_hangs():
            self.recorder.note(hang)

    def _step_profiler(self, progress: Progress) -> "StepProfiler | None":
        """What profiles the steps that section `profile` names; None where it names none that is to come."""
        if not self.config.profile.first:
            return None
        from train.profiler.step_profiler import build_step_profiler

        own = (self.folder, self.ranks, self.recorder, self.acts, self.model)
        return build_step_profiler(self.config, progress.step + 1, *own)

    def _save(self, progress: Progress, *, final: bool) -> None:
        self.acts.enter("saving")
        with self.margin.timing("snapshot"):
            published = self.keeper.save(progress, final=final)
        if published:
            self._note_save(progress)

    def _measure_before_save(self, progress: Progress, due: Due) -> None:
        """What a save at this step records."""
        asked = [evaluation for evaluation in self.evaluations if evaluation.before_save and evaluation.name in due]
        with self._weights_to_measure(any(asked)):
            for evaluation in asked:
                self._measure(evaluation, progress, due)

    def _measure_after_save(self, progress: Progress, due: Due, stop_code: int = 0) -> int:
        """The other evaluations: a failure in them costs no work.

        Args:
            stop_code: what has already requested a stop. They are left to the next start then, as they are where
                something requests one before the first or between two.

        Returns the code of what has requested a stop before all were done, or 0.
        """
        asked = [evaluation for evaluation in self.evaluations if not evaluation.before_save and evaluation.name in due]
        with self._weights_to_measure(any(asked)):
            for evaluation in asked:
                if stop_code := stop_code or self._agree(progress):
                    return stop_code
                self._measure(evaluation, progress, due)
        return 0

    def _weights_to_measure(self, any_due: bool) -> contextlib.AbstractContextManager[None]:
        """Around evaluations: the averaged weights, where they are asked for."""
        average = self.keeper.writer.average
        if average is None or self.config.eval.weights != "ema" or not any_due:
            return contextlib.nullcontext()
        check_replicas(self.ranks, self.model)  # a rank gets its weights back from their owners
        return average.in_place()

    def _measure(self, evaluation: Evaluation, progress: Progress, due: Due) -> None:
        self.acts.enter(evaluation.phase)
        with self.margin.timing(evaluation.name):
            evaluation.measure(progress, due[evaluation.name])

    def _agree(self, progress: Progress) -> int:
        """What all ranks do next: the code of what has requested a stop of any, or 0. Publishes a save that is all
        written.

        Raises LockLost if the run has another trainer by now or was moved; StorageFailed if saves failed, on any rank,
        and the run may not continue without them, or if its record can't be kept; ReplicasDiffer if only some ranks
        have learned from the last step.
        """
        self.acts.start("agreement")
        verdict = int(self._verdict)
        flags = [self.stop.code(), int(self.state.lock.lost), int(self.recorder.lost), verdict, -verdict]
        agreed_flags = self.ranks.agree([*flags, *self.keeper.flags()])
        stop_code, lost, record_lost, highest, minus_lowest, unwritten, failed = agreed_flags
        if highest != -minus_lowest:
            raise ReplicasDiffer(
                f"only some ranks have learned from step {progress.step}: a faulty device or memory is likely"
            )
        if lost:
            raise LockLost(why_lost(self.folder.path))
        if record_lost:
            raise StorageFailed(self.ranks.from_first(f"{self.recorder.trouble}, and the memory for records is full"))
        if self.keeper.settle(unwritten, failed):
            self._note_save(progress)
        elif self._trouble() != self._trouble_told:
            self._write_state(progress, "training")
        return stop_code

    def _note_save(self, progress: Progress) -> None:
        if self.keeper.last_saved is not None:
            self.margin.saw("save", self.keeper.last_saved.save_seconds)
        self._write_state(progress, "saved")

    def _note_start(self, progress: Progress) -> None:
        times = {"launched": launched_at(), "time": time.time()}
        start = {"kind": "start", "step": progress.step, "world_size": self.ranks.world_size, **times}
        self.recorder.note(start | self.start_facts | described(self.evaluations))

    def _warm_up(self, progress: Progress) -> None:
        """Go through every shape once, and wait until all ranks have: compilation takes some longer than others."""
        self.acts.enter("warming up", step=progress.step)
        started, batch, length = time.monotonic(), self.loader.plan.micro_batch, self.config.model.block_size
        size, last = f"one micro-batch of {batch} x {length:,} tokens", None
        if compiles := self.config.run.compile:
            last = last_seconds(work := self._what_is_compiled())
            blocks = f"one graph for all {self.config.model.n_layer} blocks, forward and backward, and the head's loss"
            took = "up to some minutes the first time" if last is None else f"{format_duration(last)} the last time"
            self.recorder.log(f"compiling {blocks} ({took}), then warming up: {size}")
        else:
            self.recorder.log(f"warming up: {size}")
        with self.recorder.waiting(
            "compiling and warming up" if compiles else "warming up",
            lambda: f"{self.acts.compilations} compilations done" if compiles else "",
            last,
        ):
            self.stepper.warm_up(self.config.model.block_size, document_mask=self.config.data.masks_documents)
            for evaluation in self.evaluations:
                evaluation.warm_up()
            self.ranks.barrier()
        if (seconds := time.monotonic() - started) > FIRST_SECONDS:
            self.recorder.log(f"warmed up in {format_duration(seconds)}")
        if compiles and self.ranks.is_first:
            keep_seconds(work, seconds)

    def _what_is_compiled(self) -> str:
        """What decides how long that takes, on one machine."""
        own = (self.config.model, self.config.recompute, self.config.data.masks_documents, self.stepper.dtype)
        measured = [evaluation.name for evaluation in self.evaluations]
        where = (self.ranks.device.type, self.ranks.world_size, torch.__version__)
        return repr((*own, self.loader.plan.micro_batch, measured, *where))

    def finish(self, outcome: Outcome) -> None:
        """Record how the run ended.

        Raises StorageFailed on all ranks where that can't be done.
        """
        self.acts.catch_up()
        self._note_hangs()
        agreed(self.ranks, lambda: self._write_end(outcome), StorageFailed)
        resumes = "; the same command resumes" if outcome.status == "preempted" else ""
        self.recorder.log(f"{outcome.status} at step {outcome.progress.step}: {outcome.reason}{resumes}")
        self.recorder.close()

    def _write_end(self, outcome: Outcome) -> None:
        self.recorder.sync_all(self.margin.seconds())
        self.state.write(outcome.status, outcome.reason, outcome.progress, outcome.stop)
        heard = outcome.stop in ("file", None)  # one that came during another stop is still there
        if heard and (stays := remove_stop_file(self.folder.stop_file)):
            self.recorder.log(f"WARNING: {stays}")

    def _trouble(self) -> str:
        return self.keeper.trouble or self.recorder.trouble

    def _write_state(self, progress: Progress, why: str) -> None:
        if self.ranks.is_first:
            self._trouble_told = self._trouble()
            self.state.write("running", why, progress, trouble=self._trouble_told)
            self._state_written = time.monotonic()
