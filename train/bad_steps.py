"""What becomes of steps that went wrong: recorded, their batch examined, the run rolled back to before them."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from common.run_folder import RunFolder
from model.gpt import GPT
from model.number_formats import Dtype
from train.batches.loader import StepBatch, StepLoader
from train.checkpoints.roll_back import roll_back
from train.checkpoints.saver import CheckpointKeeper
from train.evaluations.evaluation import Evaluation
from train.optimization.step import StepResult
from train.progress import Progress
from train.run.acts import Acts
from train.run.spikes import Spikes, Sustained, describe


@dataclass
class BadSteps:
    """All ranks call all methods together.

    Attributes:
        earliest: the first step that a roll-back may go back to: the schedule started again there.
    """

    folder: RunFolder
    model: GPT
    loader: StepLoader
    evaluations: Sequence[Evaluation]
    keeper: CheckpointKeeper
    spikes: Spikes
    acts: Acts
    dtype: Dtype
    earliest: int

    def judge(self, step: int, result: StepResult, position: int, sequences: int) -> None:
        """Record a step that is a spike, or not finite.

        Args: position: of the loader, before the step. sequences: of the step.
        """
        if (spike := self.spikes.take(step, result)) is not None:
            numbers = self.loader.numbers_at(position, sequences)
            self.keeper.recorder.note(spike | {"position": position, "sequences": numbers, "time": time.time()})
            self.keeper.recorder.log(describe(spike))

    def examine(self, batch: StepBatch, step: int, why: str) -> None:
        """Write down which layer a bad batch breaks first. Each step's is examined once."""
        from train.layer_statistics.bad_batch import BadBatches  # needed by few runs

        self.acts.start("examination of a bad batch")
        ranks, recorder = self.keeper.writer.ranks, self.keeper.recorder
        BadBatches(self.model, ranks, self.folder, recorder, self.dtype).examine(batch, step, why)

    def roll_back(self, sustained: Sustained, progress: Progress, batch: StepBatch) -> Progress:
        """Go back to before a spike that the run does not get over, and past the data read since.

        Args: batch: of the step after which this was decided.

        Raises as `train.checkpoints.roll_back.roll_back` does.
        """
        self.acts.enter("rolling back")
        log = self.keeper.recorder.log
        log(f"WARNING: step {progress.step}: {sustained.why}: rolling back")
        self.examine(batch, progress.step, "the run rolled back after it")
        back = roll_back(self.keeper, self.spikes, sustained, progress, earliest=self.earliest)
        for evaluation in self.evaluations:
            evaluation.forget()
        log(
            f"rolled back from step {progress.step} to step {back.step}, roll-back {len(self.spikes.rollbacks)} of "
            f"{self.spikes.max_rollbacks}: step {back.step + 1} continues after sequence {back.sequences:,}"
        )
        before = self.loader.order.read_by_source(self.spikes.rollbacks[-1]["sequences_from"])
        if before:  # a source may end above its max_epochs: no reason to stop the run
            read, length = self.loader.order.read_by_source(back.sequences), self.loader.sequences.block_size
            more = ", ".join(f"{name} {(read[name] - count) * length:,}" for name, count in before.items())
            log(f"data.mix: these tokens are read beyond what was planned at the start: {more}")
        return back
