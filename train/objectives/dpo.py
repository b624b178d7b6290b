"""DPO: learn from pairs of answers which of them was preferred, without a reward model (Rafailov et al. 2023).

The loss of a step is the mean over its pairs, of all ranks (`preference_loss` has the formula). The policy that the run
started from does not change: `reference` has computed its log-probabilities before the first step.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from train.batches.loader import MicroBatch, StepBatch
from train.batches.pairs import width_of
from train.objectives.objective import StepReport
from train.objectives.preference_loss import FIGURES, log_probs_of_answers, preference_figures
from train.settings.sections import PreferenceConfig

KIND = "preferences"  # of the records of steps


class Dpo:
    """The objective. `prepare` brings the log-probabilities that it compares with."""

    unit = "pairs"
    sources: tuple[str, ...] = ()
    terms: tuple[str, ...] = FIGURES

    def __init__(self, config: PreferenceConfig) -> None:
        self._config = config
        self._reference: npt.NDArray[np.float32] | None = None
        self._trims = False

    def prepare(self, reference: npt.NDArray[np.float32], *, trims: bool) -> None:
        """Args:
        reference: (sequences,) log-probabilities of the training split's answers by the start policy.
        trims: leave out what is padding in all of a step's rows; not where every shape is compiled.
        """
        self._reference, self._trims = reference, trims

    def updates(self, batch: StepBatch, step: int) -> Iterable[StepBatch]:
        """One, from the batch with its sequences' reference log-probabilities."""
        assert self._reference is not None
        own = torch.from_numpy(self._reference[batch.windows])  # (A, M)
        return (replace(trimmed(batch) if self._trims else batch, more={"reference": own}),)

    def target_count(self, batch: StepBatch) -> int:
        """The pairs of this rank."""
        return batch.target_count

    def total_target_count(self, batch: StepBatch) -> int | None:
        """As many in every step."""
        return batch.total_target_count

    def loss(self, model: Callable[..., Any], batch: MicroBatch, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The summed loss of a micro-batch's pairs, (); that and the sums of FIGURES, detached.

        Without a reference, as a micro-batch to warm up is, the policy is compared with itself.
        """
        answers = log_probs_of_answers(model, batch.tokens, batch.targets)
        reference = batch.more.get("reference", answers.log_probs.detach())  # (M)
        figures = preference_figures(answers, reference, self._config)
        sums = [values.sum() for values in figures]
        return sums[0], torch.stack([sums[0].detach(), *sums[1:]])

    def record(self, loss: float) -> dict[str, float]:
        """Nats per pair, of IPO nats squared."""
        return {"loss": loss}

    def report(self, terms: Mapping[str, float]) -> StepReport | None:
        """The step's means of FIGURES."""
        line = (
            f"margin {terms['margin']:.4f} | {terms['preference_accuracy']:.0%} right | log-probability of chosen "
            f"{terms['chosen_log_prob']:.2f}, rejected {terms['rejected_log_prob']:.2f}"
        )
        return StepReport({"kind": KIND, **terms}, line)


def trimmed(batch: StepBatch) -> StepBatch:
    """Without what is padding in all of this rank's rows of a step."""
    width = width_of(batch.targets.numpy())
    return replace(batch, tokens=batch.tokens[..., :width], targets=batch.targets[..., :width])
