"""What objectives have in common that learn from answers which the model samples: a step from prompts to updates.

R rows of all ranks (row i·G + j is sample j of prompt i), of which A micro-batches of M are this rank's; T tokens of a
row; N tokens of an answer at most.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.errors import UserError
from data_prep.token_sets.packing import IGNORE
from model.gpt import GPT
from model.number_formats import Dtype
from model.precision import autocast
from model.ranks import Ranks
from train.batches.loader import MicroBatch, StepBatch
from train.batches.plan import BatchPlan
from train.objectives.objective import Sample, StepReport
from train.objectives.policy import TokenFigures, log_probabilities
from train.objectives.rollout import Rollout, Sampler
from train.settings.sections import RolloutConfig

KIND = "rollout"  # of the records of rollouts
WIDTH_MULTIPLE = 8  # tokens
SHOWN = 4  # answers of a step that are shown, each to another prompt


class RolloutObjective:
    """An objective without its loss. All that a step learns from is made here, from the numbers of its prompts."""

    unit = "answer_tokens"
    terms: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()

    def __init__(self, config: RolloutConfig) -> None:
        """What the loss of a batch takes; `prepare` brings the rest."""
        self._config = config
        self._figures: dict[str, Any] = {}
        self._samples: tuple[Sample, ...] = ()
        self._started, self._length = 0.0, 0

    def prepare(
        self,
        sampler: Sampler,
        model: GPT,
        reference: GPT | None,
        ranks: Ranks,
        plan: BatchPlan,
        dtype: Dtype,
        *,
        trims: bool,
        on_act: Callable[[str], None] = lambda act: None,
    ) -> None:
        """Args:
        reference: the policy that the run started from, in evaluation mode; None without KL.
        trims: leave out what is padding in all of a step's rows; not where every shape is compiled.
        on_act: called at the start of a rollout, by which a rank that hangs is named.

        Raises UserError where a step's micro-batches don't divide among its minibatches.
        """
        config = self._config
        if plan.accumulation % config.minibatches:
            size = plan.sequences // plan.world_size // config.minibatches
            raise UserError(
                f"{plan.accumulation} micro-batches of a rank don't divide among rollout.minibatches "
                f"{config.minibatches}: use a batch.micro_batch that divides {size}"
            )
        self._sampler, self._model, self._reference = sampler, model, reference
        self._ranks, self._plan, self._dtype, self._trims = ranks, plan, dtype, trims
        self._on_act = on_act

    def updates(self, batch: StepBatch, step: int) -> Iterator[StepBatch]:
        """Sample answers, then give what each update of the step learns from: `epochs` times all minibatches."""
        config, samples = self._config, self._config.samples
        assert batch.numbers is not None
        numbers = batch.numbers[::samples] // samples  # (P,)
        self._on_act("sampling answers")
        rollout = self._sampler.roll_out(numbers, step, samples=samples, temperature=config.temperature)
        whole, figures = self._judged(self._rows(batch, rollout), rollout)
        self._note(rollout, figures)
        self._length = whole.tokens.shape[2]
        for _ in range(config.epochs):
            for number in range(config.minibatches):
                yield self._part(whole, number, rollout)

    def _judged(self, rows: StepBatch, rollout: Rollout) -> tuple[StepBatch, dict[str, Any]]:
        """Rows with all that their loss needs, and what is recorded of it. All ranks call."""
        raise NotImplementedError

    def _divisor(self, answers: int, tokens: int) -> int:
        """What the sum of an update's losses is divided by. Args: that it learns from, of all ranks; 1 or more."""
        raise NotImplementedError

    def _places(self, rank: int) -> npt.NDArray[np.int64]:
        """Which of the step's rows are a rank's, (A·M,)."""
        plan = self._plan
        numbers = np.array([plan.micro_batch_number(rank, index) for index in range(plan.accumulation)])
        places: npt.NDArray[np.int64] = (numbers[:, None] * plan.micro_batch + np.arange(plan.micro_batch)).ravel()
        return places

    def _rows(self, batch: StepBatch, rollout: Rollout) -> StepBatch:
        """This rank's rows of a rollout: prompts with their answers, whose tokens are the targets."""
        mine = self._places(self._ranks.rank)
        inputs = np.zeros((len(mine), self._width(batch, rollout)), dtype=np.int64)  # (A·M, T)
        targets = np.full_like(inputs, IGNORE)
        learned, (tokens, lengths, _) = self._learned(rollout), rollout.answers
        for row, place in enumerate(mine.tolist()):
            prompt, answer = rollout.prompts[place // self._config.samples].ids, tokens[place, : lengths[place]]
            whole = np.concatenate([prompt.astype(np.int64), answer])
            inputs[row, : len(whole) - 1] = whole[:-1]
            if learned[place]:
                targets[row, len(prompt) - 1 : len(whole) - 1] = answer
        shape = (self._plan.accumulation, self._plan.micro_batch, -1)
        return replace(
            batch,
            tokens=torch.from_numpy(inputs).reshape(shape),  # (A, M, T)
            targets=torch.from_numpy(targets).reshape(shape),  # (A, M, T)
            document_ids=None,
        )

    def _width(self, batch: StepBatch, rollout: Rollout) -> int:
        """Tokens of a row: no more than the step's longest row needs, the same for any number of ranks."""
        if not self._trims:
            return batch.tokens.shape[2]
        asked = np.repeat([len(prompt.ids) for prompt in rollout.prompts], self._config.samples)
        longest = int((asked + rollout.answers.lengths).max()) - 1
        return min(batch.tokens.shape[2], -(-longest // WIDTH_MULTIPLE) * WIDTH_MULTIPLE)

    def _without_learning(self, model: GPT, rows: StepBatch, *, values: bool = False) -> TokenFigures:
        """Figures (A, M, T) of the rows' targets, by the very forward that a step learns with."""
        device = self._ranks.device
        with torch.no_grad(), autocast(self._dtype, device):
            found = [
                log_probabilities(model, part.tokens, part.targets, self._config.temperature, values=values)
                for part in rows.micro_batches(device)
            ]
        log_probs, entropy, of_head = zip(*found, strict=True)
        return TokenFigures(torch.stack(log_probs), torch.stack(entropy), torch.stack(of_head) if values else None)

    def _learned(self, rollout: Rollout) -> npt.NDArray[np.bool_]:
        """Which answers (R,) are learned from: with `mask_cut` only those that have ended."""
        ended = rollout.answers.ended
        return ended if self._config.mask_cut else np.ones_like(ended)

    def _counts(self, rollout: Rollout, number: int) -> tuple[int, int]:
        """Answers that a minibatch learns from, and their tokens, of all ranks; 1 or more."""
        share = self._plan.sequences // self._config.minibatches
        rows = slice(number * share, (number + 1) * share)
        learned, lengths = self._learned(rollout)[rows], rollout.answers.lengths[rows]
        return max(1, int(learned.sum())), max(1, int(lengths[learned].sum()))

    def _part(self, whole: StepBatch, number: int, rollout: Rollout) -> StepBatch:
        """A minibatch: this rank's part of rows that are the same for any number of ranks."""
        size = len(whole.tokens) // self._config.minibatches
        part = slice(number * size, (number + 1) * size)
        return replace(
            whole,
            tokens=whole.tokens[part],
            targets=whole.targets[part],
            windows=whole.windows[part],
            target_count=0,
            total_target_count=self._divisor(*self._counts(rollout, number)),
            more={name: values[part] for name, values in whole.more.items()},
        )

    def target_count(self, batch: StepBatch) -> int:
        """Not asked for: `total_target_count` has that of all ranks."""
        return batch.target_count

    def total_target_count(self, batch: StepBatch) -> int | None:
        """What the sum of the losses is divided by."""
        return batch.total_target_count

    def loss(self, model: Callable[..., Any], batch: MicroBatch, scale: Tensor) -> tuple[Tensor, Tensor]:
        """As `Objective.loss`."""
        raise NotImplementedError

    def record(self, loss: float) -> dict[str, float]:
        """The loss is near 0 by its nature; rewards are in the record of the rollout."""
        return {"loss": loss}

    def _note(self, rollout: Rollout, figures: Mapping[str, Any]) -> None:
        """Keep what is to be recorded of a rollout. Args: figures: the objective's own."""
        generated = int(rollout.answers.lengths.sum())
        self._figures = {
            **rollout.figures(),
            **figures,
            "answer_tokens": generated,
            "rollout_seconds": rollout.seconds,
            "generation_tokens_per_second": generated / max(rollout.seconds, 1e-9),
        }
        self._started = time.monotonic()
        rows = range(0, min(SHOWN, len(rollout.prompts)) * self._config.samples, self._config.samples)
        shown = [(rollout.prompts[row // self._config.samples], row) for row in rows]
        self._samples = tuple(
            Sample(prompt.text, self._sampler.text_of(rollout.answers, row), float(rollout.rewards[row]))
            for prompt, row in shown
        )

    def report(self, terms: Mapping[str, float]) -> StepReport | None:
        """The rollout's record, with the means of the terms over the step's updates."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        learned = self._plan.sequences * self._length * self._config.epochs
        speed = {"training_tokens_per_second": learned / seconds}
        note = {"kind": KIND, **self._figures, **terms, **speed}
        kl = f" | KL {note['kl']:.4f}" if "kl" in note else ""
        line = (
            f"reward {note['reward']:.4f}{kl} | entropy {note['entropy']:.3f} | {note['answer_length']:.1f} tokens an "
            f"answer | {note['cut_share']:.0%} cut | {self._own_line(note)}"
        )
        return StepReport(note, line, self._samples)

    def _own_line(self, note: Mapping[str, Any]) -> str:
        """The end of the log's line."""
        raise NotImplementedError
