"""A reward model: learn from pairs of answers to score each by itself (Ouyang et al. 2022, section 3.5).

The score s(x, y) of an answer y to x is the scalar head's value at the answer's last token, its end of turn. With y_w
the answer that was preferred and y_l the other one, the loss of a pair is

    -log σ(s(x, y_w) - s(x, y_l))       Ouyang et al. 2022 (arXiv:2203.02155), equation 1, for two answers to a prompt

and that of a step the mean over its pairs, of all ranks. M = 2P sequences, chosen and rejected by turns; T tokens.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from data_prep.token_sets.packing import IGNORE
from model.gpt import GPT
from model.number_formats import Dtype
from model.ranks import Ranks
from train.batches.loader import MicroBatch, StepBatch, StepLoader
from train.batches.pairs import width_of
from train.objectives.objective import StepReport
from train.objectives.reference import figures_of_pairs

KIND = "preferences"  # of the records of steps, as DPO's
FIGURES = (
    "margin",
    "preference_accuracy",
    "chosen_score",
    "rejected_score",
    "chosen_tokens",
    "rejected_tokens",
    "length_accuracy",
)


class ScoreFigures(NamedTuple):
    """Of pairs, (P,) each; only the losses have a gradient. FIGURES names the others as records do.

    margins: s(x, y_w) - s(x, y_l). correct: 1 where that is above 0, ½ where it is 0. longer: 1 where the chosen answer
    is the longer one, ½ where both are as long.
    """

    losses: Tensor
    margins: Tensor
    correct: Tensor
    chosen: Tensor
    rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    longer: Tensor


def last_places(targets: Tensor) -> Tensor:
    """(M,) where in its row (T) each answer's last token is an input: after the place at which it is the target.

    It is found by which targets count, never by an id: texts may contain that of padding or of an end.
    """
    length = targets.shape[1]
    places = torch.arange(1, length + 1, device=targets.device)  # of the token that is the target
    return torch.where(targets != IGNORE, places, 0).amax(dim=1).clamp(max=length - 1)


def score_figures(model: Callable[..., Any], batch: MicroBatch) -> ScoreFigures:
    """Of a micro-batch's pairs; the model is called once."""
    values = model(batch.tokens, values=True)  # (M, T) float32
    places = last_places(batch.targets)  # (M)
    scores = values.gather(1, places.unsqueeze(1)).view(-1, 2)  # (P, 2)
    lengths = (batch.targets != IGNORE).sum(dim=1).to(scores.dtype).view(-1, 2)  # (P, 2)
    margins, kept = scores[:, 0] - scores[:, 1], scores.detach()
    return ScoreFigures(
        -F.logsigmoid(margins),
        margins.detach(),
        _share_above(kept),
        kept[:, 0],
        kept[:, 1],
        lengths[:, 0],
        lengths[:, 1],
        _share_above(lengths),
    )


def _share_above(of_pairs: Tensor) -> Tensor:
    """(P, 2) to (P): 1 where the first is larger, ½ where they are equal, else 0."""
    first, second = of_pairs.unbind(dim=1)
    return (first > second).float() + 0.5 * (first == second).float()


class RewardModel:
    """The objective."""

    unit = "pairs"
    sources: tuple[str, ...] = ()
    terms: tuple[str, ...] = FIGURES

    def __init__(self) -> None:
        self._trims = False

    def prepare(self, *, trims: bool) -> None:
        """Args: trims: leave out what is padding in all of a step's rows; not where every shape is compiled."""
        self._trims = trims

    def updates(self, batch: StepBatch, step: int) -> Iterable[StepBatch]:
        """One, from the batch."""
        return (trimmed_to_scores(batch) if self._trims else batch,)

    def target_count(self, batch: StepBatch) -> int:
        """The pairs of this rank."""
        return batch.target_count

    def total_target_count(self, batch: StepBatch) -> int | None:
        """As many in every step."""
        return batch.total_target_count

    def loss(self, model: Callable[..., Any], batch: MicroBatch, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The summed loss of a micro-batch's pairs, (); that and the sums of FIGURES, detached."""
        sums = [values.sum() for values in score_figures(model, batch)]
        return sums[0], torch.stack([sums[0].detach(), *sums[1:]])

    def record(self, loss: float) -> dict[str, float]:
        """Nats per pair."""
        return {"loss": loss}

    def report(self, terms: Mapping[str, float]) -> StepReport | None:
        """The step's means of FIGURES."""
        line = (
            f"margin {terms['margin']:.4f} | {terms['preference_accuracy']:.0%} right | score of chosen "
            f"{terms['chosen_score']:.3f}, rejected {terms['rejected_score']:.3f}"
        )
        return StepReport({"kind": KIND, **terms}, line)


def trimmed_to_scores(batch: StepBatch) -> StepBatch:
    """Without what is padding in all of this rank's rows of a step; each answer's last token stays an input."""
    shifted = torch.full_like(batch.targets, IGNORE)
    shifted[..., 1:] = batch.targets[..., :-1]
    width = width_of(shifted.numpy())
    return replace(batch, tokens=batch.tokens[..., :width], targets=batch.targets[..., :width])


@dataclass(frozen=True)
class HeldBackScores:
    """Pairs to validate a reward model on: a loader of this rank's share."""

    loader: StepLoader
    trims: bool
    names: ClassVar[tuple[str, ...]] = ("loss", *FIGURES)

    def figures(self, model: GPT, ranks: Ranks, dtype: Dtype) -> npt.NDArray[np.float64]:
        """(P, 1 + F): each pair's loss and FIGURES by a model, on all ranks. All ranks call."""
        rows = trimmed_to_scores if self.trims else lambda batch: batch
        return figures_of_pairs(self.loader, ranks, dtype, rows, lambda part: score_figures(model, part))
