"""What policies learn by, as functions of tensors: log-probabilities, advantages, the clipped surrogate, KL.

A rollout's answers were sampled by the weights of before the step, the old policy; the reference is the policy that the
run started from. M rows, T tokens of a row, V padded vocabulary, G samples of a prompt.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

DEVIATION_FLOOR = 1e-4  # added to a group's standard deviation, as trl does


class TokenFigures(NamedTuple):
    """Of every token of (M, T), 0 where it is no target: the target's log-probability, and the distribution's entropy,
    in nats. The entropy has no gradient. values: of the scalar head at every token, (M, T), where they are wanted.
    """

    log_probs: Tensor
    entropy: Tensor
    values: Tensor | None


def log_probabilities(
    model: Callable[..., Any], tokens: Tensor, targets: Tensor, temperature: float, *, values: bool = False
) -> TokenFigures:
    """log softmax(logits / temperature) of targets (M, T), float32, and the entropy of that distribution.

    The same temperature is sampled with: at another one the ratio of two policies would not be 1 for equal weights.
    One forward of the model, which never holds all logits.
    """
    losses, entropy, *more = model(tokens, targets, temperature=temperature, values=values)  # (M, T) each
    return TokenFigures(-losses, entropy, more[0] if values else None)


class GroupAdvantages(NamedTuple):
    """advantages: (P·G,) float64. equal: how many of the P groups have equal rewards, from which nothing is learned."""

    advantages: npt.NDArray[np.float64]
    equal: int


def group_advantages(rewards: npt.NDArray[np.float64], samples: int, *, deviation: bool) -> GroupAdvantages:
    """How much better than the mean of its group each of the rewards (P·G,) is.

    A_i = (r_i - mean(r)) / (std(r) + 1e-4), by group (Shao et al. 2024, arXiv:2402.03300, section 4.1.2); without the
    deviation A_i = r_i - mean(r) (Liu et al. 2025, arXiv:2503.20783, which shows that it favours questions that are
    almost always, or almost never, answered). The deviation divides by G - 1.

    Groups of equal rewards have exactly 0, whatever rounding makes of their mean.
    """
    groups = rewards.reshape(-1, samples)  # (P, G)
    centred = groups - groups.mean(axis=1, keepdims=True)
    equal = groups.max(axis=1) == groups.min(axis=1)  # (P)
    centred[equal] = 0.0
    if deviation:
        spread = np.sqrt(np.square(centred).sum(axis=1, keepdims=True) / max(1, samples - 1))
        centred = centred / (spread + DEVIATION_FLOOR)
    return GroupAdvantages(centred.ravel(), int(equal.sum()))


def clipped_surrogate(log_probs: Tensor, old: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Losses of tokens, and which of them the clipping keeps from being learned from: (M, T) each.

    -min(r A, clip(r, 1 - clip, 1 + clip) A) with r = exp(log_probs - old) (Schulman et al. 2017, arXiv:1707.06347,
    equation 7).

    Args: all (M, T), the advantages perhaps (M, 1).
    """
    ratio = (log_probs - old).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    losses = -torch.minimum(ratio * advantages, clipped * advantages)
    beyond = (ratio * advantages > clipped * advantages).detach()
    return losses, beyond


def kl_loss(log_probs: Tensor, old: Tensor, reference: Tensor) -> Tensor:
    """A loss of tokens (M, T) whose expected gradient is that of KL(policy ‖ reference) of the next token.

    r · ½ (log p - log q)², r = p / p_old without gradient. For a token that the old policy sampled the gradient is
    r (log p - log q) ∇log p, of which the expectation is Σ (log p - log q) ∇p, the gradient of Σ p (log p - log q).
    The estimator of Shao et al. 2024 (equation 4), q/p - log(q/p) - 1, has this KL as its value, but the gradient of
    KL(reference ‖ policy) when it is put into a loss (Tang & Munos 2025, arXiv:2506.09477). How the weights change
    which tokens come before is not in either of them.
    """
    ratio = (log_probs - old).exp().detach()
    return ratio * 0.5 * (log_probs - reference).square()


def kl_estimate(log_probs: Tensor, reference: Tensor) -> Tensor:
    """An estimate of KL(policy ‖ reference) at each token of (M, T), never negative, without gradient.

    q/p - log(q/p) - 1 (Schulman 2020, http://joschu.net/blog/kl-approx.html, k3; Shao et al. 2024, equation 4).
    """
    difference = (reference - log_probs).detach()
    return difference.exp() - difference - 1
