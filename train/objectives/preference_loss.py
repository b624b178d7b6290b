"""What is learned from pairs of answers, as functions of their log-probabilities.

y_w is the answer to x that was preferred, y_l the other one; π the policy that learns, π_0 the one it started from.
log π(y|x) is the sum over the answer's tokens, its end of turn included. P pairs, M = 2P sequences, T tokens.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from data_prep.token_sets.packing import IGNORE
from train.settings.sections import PreferenceConfig


class Answers(NamedTuple):
    """log π(y|x) in nats, and the number of tokens of y: (M,) float32 each."""

    log_probs: Tensor
    lengths: Tensor


def log_probs_of_answers(model: Callable[..., Any], tokens: Tensor, targets: Tensor) -> Answers:
    """Of sequences (M, T), by their targets that count; the model is called once."""
    losses = model(tokens, targets, reduction="none")  # (M, T), -log π(y_t | x, y_<t)
    return Answers(-losses.sum(dim=1), (targets != IGNORE).sum(dim=1).to(losses.dtype))


class PairFigures(NamedTuple):
    """Of pairs, (P,) each; only the losses have a gradient. FIGURES names the others as records do.

    losses: what is learned from. margins: β h. correct: 1 where h > 0, ½ where it is 0. changes: of the chosen answers'
    log-probability since the start. longer: 1 where the chosen answer is the longer one, ½ where both are as long: how
    often length alone would be right.
    """

    losses: Tensor
    margins: Tensor
    correct: Tensor
    chosen: Tensor
    rejected: Tensor
    changes: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    longer: Tensor


FIGURES = (
    "margin",
    "preference_accuracy",
    "chosen_log_prob",
    "rejected_log_prob",
    "chosen_log_prob_change",
    "chosen_tokens",
    "rejected_tokens",
    "length_accuracy",
)


def preference_figures(answers: Answers, reference: Tensor, config: PreferenceConfig) -> PairFigures:
    """Args: answers: of sequences, chosen and rejected by turns. reference: (M,) their log-probabilities by π_0.

    With h = log π(y_w|x)/π_0(y_w|x) - log π(y_l|x)/π_0(y_l|x) the loss of a pair is

        sigmoid:  -(1 - ε) log σ(β h) - ε log σ(-β h)    Rafailov et al. 2023 (arXiv:2305.18290), equation 7; with
                                                         label smoothing ε > 0 Mitchell 2023, "A note on DPO with noisy
                                                         preferences", equation 3
        ipo:      (h - 1/(2β))²                          Azar et al. 2023 (arXiv:2310.12036), equation 17

    and, with the option `likelihood` α, plus -α log π(y_w|x) / |y_w| (Pang et al. 2024, arXiv:2404.19733, equation 1).
    """
    log_probs, lengths = answers.log_probs.view(-1, 2), answers.lengths.view(-1, 2)  # (P, 2)
    ratios = log_probs - reference.view(-1, 2)  # (P, 2), 0 for equal policies, exactly
    h = ratios[:, 0] - ratios[:, 1]  # (P)
    if config.loss == "ipo":
        losses = (h - 1 / (2 * config.beta)).square()
    else:
        smoothing = config.label_smoothing
        losses = -(1 - smoothing) * F.logsigmoid(config.beta * h) - smoothing * F.logsigmoid(-config.beta * h)
    if config.likelihood:
        losses = losses - config.likelihood * log_probs[:, 0] / lengths[:, 0].clamp(min=1)
    kept = log_probs.detach()
    return PairFigures(
        losses,
        config.beta * h.detach(),
        _share_above(h.detach(), torch.zeros_like(h)),
        kept[:, 0],
        kept[:, 1],
        ratios.detach()[:, 0],
        lengths[:, 0],
        lengths[:, 1],
        _share_above(lengths[:, 0], lengths[:, 1]),
    )


def _share_above(first: Tensor, second: Tensor) -> Tensor:
    """(P): 1 where the first is larger, ½ where they are equal, else 0."""
    return (first > second).float() + 0.5 * (first == second).float()
