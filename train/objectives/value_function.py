"""What PPO learns by beside the policy's formulas, as functions: advantages from values, and the loss of values.

R answers, N tokens of an answer at most.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

WHITENING_FLOOR = 1e-8  # added to the variance, as Huang et al. do

Numbers = npt.NDArray[np.float64]


def generalized_advantages(
    rewards: Numbers, values: Numbers, lengths: npt.NDArray[np.int64], *, gamma: float, lam: float
) -> Numbers:
    """Advantages (R, N) of tokens, 0 behind each answer.

    A_t = Σ_l (γ λ)^l δ_(t+l) with δ_t = r_t + γ V(s_(t+1)) - V(s_t) (Schulman et al. 2016, arXiv:1506.02438, equation
    16). An answer's end, or where it was cut, is the end: what comes after is worth 0.

    Args: rewards, values: (R, N) of tokens. lengths: (R,) of answers.
    """
    inside = np.arange(rewards.shape[1]) < lengths[:, None]  # (R, N)
    rewards, values = np.where(inside, rewards, 0.0), np.where(inside, values, 0.0)
    found = np.zeros_like(values)
    after, value_after = np.zeros(len(values)), np.zeros(len(values))  # (R)
    for place in reversed(range(rewards.shape[1])):
        delta = rewards[:, place] + gamma * value_after - values[:, place]
        after = delta + gamma * lam * after
        found[:, place], value_after = after, values[:, place]
    return found


def whitened(advantages: Numbers, learned: npt.NDArray[np.bool_]) -> Numbers:
    """Advantages (R, N) with mean 0 and variance 1 over the tokens that are learned from, 0 elsewhere.

    (A - mean) / sqrt(variance + 1e-8), as Huang et al. 2024 do (arXiv:2403.17031, section 7).
    """
    found = np.zeros_like(advantages)
    if learned.any():
        chosen = advantages[learned]
        found[learned] = (chosen - chosen.mean()) / np.sqrt(chosen.var() + WHITENING_FLOOR)
    return found


def explained_variance(values: Numbers, returns: Numbers) -> float | None:
    """1 - variance(returns - values) / variance(returns): 1 where values foresee all, 0 where nothing; None without
    any variance.
    """
    variance = float(returns.var()) if len(returns) else 0.0
    return None if variance == 0 else 1 - float((returns - values).var()) / variance


def clipped_value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Losses of values, and which of them the clipping decides: of the shape of all.

    ½ max((V - R)², (clip(V, V_old - ε, V_old + ε) - R)²), which PPO's code has, not its paper (Huang et al. 2024,
    arXiv:2403.17031, section 7).
    """
    near = old + (values - old).clamp(-clip, clip)
    plain, held = (values - returns).square(), (near - returns).square()
    return 0.5 * torch.maximum(plain, held), (held > plain).detach()
