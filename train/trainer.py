"""The training loop: one step after another, and what happens between them."""

import gc
import math
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from common.run_folder import RunFolder, Stop
from model.devices import peak_memory_gib
from model.gpt import GPT
from model.ranks import Ranks, agreed
from train.batches.loader import StepBatch, StepLoader
from train.checkpoints.saver import CheckpointKeeper
from train.errors import LockLost, NonFiniteLoss, NonFiniteWeights, ReplicasDiffer, StorageFailed
from train.evaluations.between import SampleWriter, Validator
from train.evaluations.due import NOTHING, Due, due_after, is_due
from train.evaluations.hellaswag import HellaSwagProbe
from train.optimization.optimizer import set_learning_rate
from train.optimization.schedule import Course
from train.optimization.step import Stepper
from train.progress import Progress
from train.run.heartbeat import Heartbeat
from train.run.lock import why_lost
from train.run.recorder import Recorder
from train.run.state import RunState
from train.settings.sections import Config
from train.stopping.deadline import StopMargin
from train.stopping.stop_requests import StopRequest, kind, reason, remove_stop_file

COLLECT_STEPS = 1000  # steps from one garbage collection to the next
FIRST_LOSS_MARGIN = 0.5  # nats
STATE_SECONDS = 10.0  # how often `state` is renewed between saves


@dataclass(frozen=True)
class Outcome:
    """How the loop ended, and why."""

    status: Literal["done", "preempted"]
    reason: str
    progress: Progress
    stop: Stop | None = None  # what asked for it


@dataclass
class TrainingLoop:
    """One process's part of a run. All ranks go through every method together."""

    config: Config
    course: Course
    ranks: Ranks
    folder: RunFolder
    model: GPT
    optimizer: torch.optim.Optimizer
    stepper: Stepper
    loader: StepLoader
    validator: Validator
    samples: SampleWriter
    hellaswag: HellaSwagProbe | None
    keeper: CheckpointKeeper
    recorder: Recorder
    stop: StopRequest
    state: RunState
    heartbeat: Heartbeat
    margin: StopMargin
    flops_per_token: int
    peak_flops: float | None  # of all ranks together, per second; None where the device is unknown
    untrained: bool = True  # its first loss should be that of a model that knows nothing
    start_facts: dict[str, Any] = field(default_factory=dict)  # what else the record of this start holds
    _state_written: float = 0.0
    _log_seconds: float = 0.0
    _trouble_told: str = ""

    def run(self, progress: Progress, missing: Due = NOTHING) -> Outcome:
        """Train from `progress` to the last step, or until asked to stop.

        Args:
            missing: what was due at `progress` and is done first.
        """
        last_step = self.config.run.max_steps
        start = {"kind": "start", "step": progress.step, "world_size": self.ranks.world_size, "time": time.time()}
        self.recorder.note(start | self.start_facts)
        self.heartbeat.step = progress.step
        self._warm_up()
        if (stop_code := self._agree(progress)) != 0:
            return Outcome("preempted", reason(stop_code), progress, kind(stop_code))
        if progress.step == 0 or missing.validation:
            self._validate(progress)
        if progress.step == 0 and self.untrained:
            self._check_first_loss()
        gc.collect()
        gc.disable()  # a collection in the middle of a step would make the other ranks wait
        batches = self.loader.steps(progress.sequences)
        try:
            if (stop_code := self._measure(progress, missing)) != 0:
                return Outcome("preempted", reason(stop_code), progress, kind(stop_code))
            while progress.step < last_step:
                with self.margin.timing("step"):
                    progress = self._step(progress, batches)
                stop_code = self._agree(progress)
                last, due = progress.step == last_step, due_after(progress.step, self.config)
                if due.validation:
                    self._validate(progress)  # before the save, which records the loss
                if stop_code or last or is_due(progress.step, self.config.checkpoint.every_steps):
                    self._save(progress, final=last or stop_code > 0)
                asked_before = self._measure(progress, due, stop_code)
                if asked_before or (stop_code and not last):
                    self._save(progress, final=True)
                    stop_code = stop_code or asked_before
                    return Outcome("preempted", reason(stop_code), progress, kind(stop_code))
                if is_due(progress.step, COLLECT_STEPS):
                    gc.collect()  # on all ranks at once
        except (NonFiniteLoss, NonFiniteWeights, ReplicasDiffer):  # of all ranks together
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
        started = time.monotonic()
        batch = next(batches)
        waited = time.monotonic() - started
        step = progress.step + 1
        self.heartbeat.step, self.heartbeat.phase = step, "training"
        lr = self.course.rate(step)
        set_learning_rate(self.optimizer, lr)
        result = self.stepper(batch, step)
        seconds = time.monotonic() - started
        tokens = self.config.batch.tokens_per_step
        rate = tokens / seconds
        progress = Progress(step, progress.tokens + tokens, progress.sequences + self.loader.plan.sequences)
        record: dict[str, Any] = {
            "step": step,
            "tokens": progress.tokens,
            "loss": result.loss,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "tokens_per_second": rate,
            "mfu": rate * self.flops_per_token / self.peak_flops if self.peak_flops else None,
            "step_seconds": seconds,
            "data_wait_seconds": waited,
            "log_seconds": self._log_seconds,  # of the step before
            "memory_gib": peak_memory_gib(self.ranks.device),
            "time": time.time(),
        }
        if result.skipped:
            record["skipped"] = True
        if self.config.log.sequences:
            shares = self.ranks.gather(batch.windows.ravel().tolist())
            record["sequences"] = sorted(window for share in shares for window in share)
        logging_started = time.monotonic()
        self.recorder.step(record)
        self._log_seconds = time.monotonic() - logging_started
        if time.monotonic() - self._state_written > STATE_SECONDS:
            self._write_state(progress, "training")
        return progress

    def _validate(self, progress: Progress) -> None:
        self.heartbeat.phase = "validating"
        with self.margin.timing("validation"):
            self.validator.validate(progress)

    def _save(self, progress: Progress, *, final: bool) -> None:
        self.heartbeat.phase = "saving"
        with self.margin.timing("snapshot"):
            published = self.keeper.save(progress, final=final)
        if published:
            self._note_save(progress)

    def _measure(self, progress: Progress, due: Due, stop_code: int = 0) -> int:
        """HellaSwag and samples where due, after the save: what fails in them costs no work.

        Args:
            stop_code: what has already asked to stop. They are left to the next start then, as they are where something
                asks before the first or between the two.

        Returns the code of what has asked to stop before all were done, or 0.
        """
        if due.hellaswag and self.hellaswag is not None:
            if stop_code := stop_code or self._agree(progress):
                return stop_code
            self.heartbeat.phase = "answering HellaSwag"
            with self.margin.timing("HellaSwag"):
                self.hellaswag.measure(progress)
        if due.samples:
            if stop_code := stop_code or self._agree(progress):
                return stop_code
            self.heartbeat.phase = "sampling"
            with self.margin.timing("samples"):
                self.samples.write(progress.step, due.samples)
        return 0

    def _agree(self, progress: Progress) -> int:
        """What all ranks do next: the code of what has asked any to stop, or 0. Publishes a save that is all written.

        Raises LockLost if the run has another trainer by now or was moved; StorageFailed if saves failed, on any rank,
        and the run may not continue without them, or if its record can't be kept.
        """
        stop_code, lost, record_lost, unwritten, failed = self.ranks.agree(
            [self.stop.code(), int(self.state.lock.lost), int(self.recorder.lost), *self.keeper.flags()]
        )
        if lost:
            raise LockLost(why_lost(self.folder.path))
        if record_lost:
            raise StorageFailed(self.ranks.from_first(f"{self.recorder.trouble}, and memory for records is full"))
        if self.keeper.settle(unwritten, failed):
            self._note_save(progress)
        elif self._trouble() != self._trouble_told:
            self._write_state(progress, "training")
        return stop_code

    def _note_save(self, progress: Progress) -> None:
        if self.keeper.last_saved is not None:
            self.margin.saw("save", self.keeper.last_saved.save_seconds)
        self._write_state(progress, "saved")

    def _warm_up(self) -> None:
        """Go through every shape once, and wait until all ranks have: compilation takes some longer than others."""
        self.stepper.warm_up(self.config.model.block_size, document_mask=self.config.data.document_mask)
        self.validator.warm_up()
        self.ranks.barrier()

    def _check_first_loss(self) -> None:
        """A model that knows nothing gives every token the same probability, ln V nats."""
        expected = math.log(self.config.model.vocab_size)
        loss = self.validator.latest
        if loss is not None and abs(loss - expected) > FIRST_LOSS_MARGIN:
            self.recorder.say(
                f"WARNING: the untrained model's loss is {loss:.2f}, far from ln({self.config.model.vocab_size}) = "
                f"{expected:.2f}: check initialisation, data and tokenizer before spending time on it"
            )

    def finish(self, outcome: Outcome) -> None:
        """Record how the run ended.

        Raises StorageFailed on all ranks where that can't be done.
        """
        agreed(self.ranks, lambda: self._write_end(outcome), StorageFailed)
        self.recorder.say(f"{outcome.status} at step {outcome.progress.step}: {outcome.reason}")
        self.recorder.close()

    def _write_end(self, outcome: Outcome) -> None:
        self.recorder.sync_all(self.margin.seconds())
        self.state.write(outcome.status, outcome.reason, outcome.progress, outcome.stop)
        heard = outcome.stop in ("file", None)  # one that came during another stop is yet to be
        if heard and (stays := remove_stop_file(self.folder.stop_file)):
            self.recorder.say(f"WARNING: {stays}")

    def _trouble(self) -> str:
        return self.keeper.trouble or self.recorder.trouble

    def _write_state(self, progress: Progress, why: str) -> None:
        if self.ranks.is_first:
            self._trouble_told = self._trouble()
            self.state.write("running", why, progress, trouble=self._trouble_told)
            self._state_written = time.monotonic()
