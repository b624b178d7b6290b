"""PPO: learn from the reward of each answer, with a value for every token that says what was to be expected.

Schulman et al. 2017 (arXiv:1707.06347), with the details that Huang et al. 2024 (arXiv:2403.17031) found to matter. The
policy and its value function share the model: V(s_t) is the scalar head's value at the token before y_t, with
s_t = (x, y_<t). The reward of a token is what it costs to move away from the reference q, plus at the answer's last one
what the whole answer is worth (Ouyang et al. 2022, arXiv:2203.02155, equation 2, by token):

    R_t = -β (log p_old(y_t) - log q(y_t)) + [t is the last] r(x, y)

An update minimises the mean over all tokens of the clipped surrogate of their advantages, which are estimated by
`value_function.generalized_advantages` and whitened over the step, plus `rollout.value_weight` times the clipped loss
of the values. What p_old and V_old say comes from the forward that learns, not from the one that sampled.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_prep.token_sets.packing import IGNORE
from train.batches.loader import MicroBatch, StepBatch
from train.objectives.policy import clipped_surrogate, kl_estimate, log_probabilities
from train.objectives.rollout import Rollout
from train.objectives.rollout_objective import RolloutObjective
from train.objectives.value_function import (
    clipped_value_loss,
    explained_variance,
    generalized_advantages,
    whitened,
)
from train.settings.sections import RolloutConfig

Numbers = npt.NDArray[np.float64]


class Ppo(RolloutObjective):
    """The objective."""

    def __init__(self, config: RolloutConfig) -> None:
        super().__init__(config)
        self.terms = ("entropy", "clip_share", "value_loss", "value_clip_share", *(("kl",) if config.kl else ()))

    def _judged(self, rows: StepBatch, rollout: Rollout) -> tuple[StepBatch, dict[str, Any]]:
        """With what the old policy thought of each token, its advantage and its return."""
        config, lengths = self._config, rollout.answers.lengths
        old = self._without_learning(self._model, rows, values=True)
        assert old.values is not None
        found = [old.log_probs, old.values]
        if self._reference is not None:
            found.append(self._without_learning(self._reference, rows).log_probs)
        log_probs, values, *others = self._of_all(torch.stack(found), rollout)  # (R, N) each
        learned = (np.arange(config.max_tokens) < lengths[:, None]) & self._learned(rollout)[:, None]  # (R, N)
        costs = -config.kl * (log_probs - others[0]) if others else np.zeros_like(values)  # (R, N)
        rewards = np.where(learned, costs, 0.0)
        rewards[np.arange(len(lengths)), lengths - 1] += rollout.rewards
        advantages = generalized_advantages(rewards, values, lengths, gamma=config.gamma, lam=config.gae_lambda)
        returns = advantages + values
        more = {"old": old.log_probs, "old_values": old.values}
        if others:
            more["reference"] = found[2]
        more["advantages"] = self._in_rows(whitened(advantages, learned), rows, rollout)
        more["returns"] = self._in_rows(returns, rows, rollout)
        answers = max(1, int(learned.any(axis=1).sum()))
        figures = {
            "mean_return": float(returns[learned].mean()) if learned.any() else 0.0,
            "explained_variance": explained_variance(values[learned], returns[learned]),
            **({"kl_reward": float(costs[learned].sum() / answers)} if others else {}),
        }
        return replace(rows, more=more), figures

    def _of_all(self, mine: Tensor, rollout: Rollout) -> Numbers:
        """Figures (K, A, M, T) of this rank's rows as (K, R, N) of all answers, 0 behind each. All ranks call."""
        own = mine.flatten(1, 2).cpu().double().numpy()  # (K, A·M, T)
        answers = np.zeros((*own.shape[:2], self._config.max_tokens))  # (K, A·M, N)
        for row, (start, length) in enumerate(self._spans(rollout)):
            answers[:, row, :length] = own[:, row, start : start + length]
        whole = np.zeros((len(own), self._plan.sequences, self._config.max_tokens))
        for rank, share in enumerate(self._ranks.gather_array(answers)):
            whole[:, self._places(rank)] = share
        return whole

    def _in_rows(self, values: Numbers, rows: StepBatch, rollout: Rollout) -> Tensor:
        """Of numbers (R, N) this rank's in its rows, (A, M, T) float32, where they are targets."""
        found = np.zeros((rows.tokens.shape[0] * rows.tokens.shape[1], rows.tokens.shape[2]), dtype=np.float32)
        mine = self._places(self._ranks.rank)
        for row, (start, length) in enumerate(self._spans(rollout)):
            found[row, start : start + length] = values[mine[row], :length]
        return torch.from_numpy(found).reshape(rows.tokens.shape)

    def _spans(self, rollout: Rollout) -> list[tuple[int, int]]:
        """Of each of this rank's rows: at which place its first answer token is the target, and the answer's length."""
        return [
            (len(rollout.prompts[place // self._config.samples].ids) - 1, int(rollout.answers.lengths[place]))
            for place in self._places(self._ranks.rank).tolist()
        ]

    def _divisor(self, answers: int, tokens: int) -> int:
        return tokens

    def loss(self, model: Callable[..., Any], batch: MicroBatch, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The summed loss of a micro-batch; that and the sums of `terms`, detached."""
        config, more = self._config, batch.more
        counts = batch.targets != IGNORE  # (M, T)
        figures = log_probabilities(model, batch.tokens, batch.targets, config.temperature, values=True)
        log_probs, values = figures.log_probs, figures.values  # (M, T) each
        assert values is not None
        none = torch.zeros_like(log_probs)  # what a micro-batch to warm up has none of
        losses, clipped = clipped_surrogate(
            log_probs, more.get("old", log_probs.detach()), more.get("advantages", none), config.clip
        )
        value_losses, held = clipped_value_loss(
            values, more.get("old_values", values.detach()), more.get("returns", none), config.value_clip
        )
        losses = losses + config.value_weight * value_losses
        terms = [figures.entropy, clipped.float(), value_losses.detach(), held.float()]
        if config.kl:
            terms.append(kl_estimate(log_probs, more.get("reference", log_probs.detach())))
        total = losses.masked_fill(~counts, 0.0).sum()
        reported = [term.masked_fill(~counts, 0.0).sum() for term in terms]
        return total, torch.stack([total.detach(), *reported])

    def _own_line(self, note: Mapping[str, Any]) -> str:
        explained = note["explained_variance"]
        known = "unknown" if explained is None else f"{explained:.2f}"
        return f"value loss {note['value_loss']:.4f}, explained variance {known}"
