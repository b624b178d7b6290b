"""GRPO: learn from the rewards of a group of answers to each prompt, without a value function.

Shao et al. 2024 (arXiv:2402.03300, section 4.1). A step samples G answers o_1 … o_G to each of its prompts from the
policy as it is, and then maximises, by one or more updates of the optimizer, equation 3:

    1/G Σ_i 1/|o_i| Σ_t ( min(r_it A_i, clip(r_it, 1 - ε, 1 + ε) A_i) - β KL_it ),    r_it = p(o_it) / p_old(o_it)

with the advantages A_i of `policy.group_advantages`. `rollout.length_term` has the two other ways to divide: by the
tokens of all answers together (Yu et al. 2025, DAPO, arXiv:2503.14476, equation 8), so that each token counts alike, or
by a constant (Liu et al. 2025, Dr. GRPO, arXiv:2503.20783), which has no preference for short answers that are right.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from data_prep.token_sets.packing import IGNORE
from train.batches.loader import MicroBatch, StepBatch
from train.objectives.policy import (
    clipped_surrogate,
    group_advantages,
    kl_estimate,
    kl_loss,
    log_probabilities,
)
from train.objectives.rollout import Rollout
from train.objectives.rollout_objective import RolloutObjective
from train.settings.sections import RolloutConfig

UNITS = {"answers": "answers", "tokens": "answer_tokens", "constant": "answer_places"}  # what a loss is the mean over


class Grpo(RolloutObjective):
    """The objective."""

    def __init__(self, config: RolloutConfig) -> None:
        super().__init__(config)
        self.unit = UNITS[config.length_term]
        self.terms = ("entropy", "clip_share", *(("kl",) if config.kl else ()))

    def _judged(self, rows: StepBatch, rollout: Rollout) -> tuple[StepBatch, dict[str, Any]]:
        """With the advantage of each answer, and log-probabilities by the old policy and the reference."""
        config = self._config
        groups = group_advantages(rollout.rewards, config.samples, deviation=config.deviation_term)
        mine = groups.advantages[self._places(self._ranks.rank)]  # (A·M,)
        more = {"advantages": torch.from_numpy(mine).float().reshape(rows.tokens.shape[:2])}  # (A, M)
        if config.epochs * config.minibatches > 1:  # else the policy that learns is the old one
            more["old"] = self._without_learning(self._model, rows).log_probs
        if self._reference is not None:
            more["reference"] = self._without_learning(self._reference, rows).log_probs
        return replace(rows, more=more), {"equal_groups": groups.equal / len(rollout.prompts)}

    def _divisor(self, answers: int, tokens: int) -> int:
        constant = answers * self._config.max_tokens
        return {"answers": answers, "tokens": tokens, "constant": constant}[self._config.length_term]

    def _part(self, whole: StepBatch, number: int, rollout: Rollout) -> StepBatch:
        part = super()._part(whole, number, rollout)
        _, tokens = self._counts(rollout, number)
        by_length = 1 / (part.targets != IGNORE).sum(dim=2).clamp(min=1)  # (a, M)
        weights = by_length if self._config.length_term == "answers" else torch.ones_like(by_length)
        # makes what is reported a mean over tokens
        per_token = torch.full_like(by_length, (part.total_target_count or 1) / tokens)
        return replace(part, more={**part.more, "weights": weights, "per_token": per_token})

    def loss(self, model: Callable[..., Any], batch: MicroBatch, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The summed loss of a micro-batch; that, entropy, clipped tokens and KL, (3 or 4,), detached."""
        config, more = self._config, batch.more
        counts = batch.targets != IGNORE  # (M, T)
        figures = log_probabilities(model, batch.tokens, batch.targets, config.temperature)
        log_probs = figures.log_probs  # (M, T)
        none = log_probs.new_zeros(len(log_probs), 1)  # (M, 1), of a micro-batch to warm up
        old = more.get("old", log_probs.detach())
        losses, clipped = clipped_surrogate(
            log_probs, old, more["advantages"].unsqueeze(1) if "advantages" in more else none, config.clip
        )
        terms = [figures.entropy, clipped.float()]
        if config.kl:
            reference = more.get("reference", log_probs.detach())
            losses = losses + config.kl * kl_loss(log_probs, old, reference)
            terms.append(kl_estimate(log_probs, reference))
        weights = more["weights"].unsqueeze(1) if "weights" in more else none
        per_token = more["per_token"].unsqueeze(1) if "per_token" in more else none
        total = (losses * weights).masked_fill(~counts, 0.0).sum()
        reported = [(term * per_token).masked_fill(~counts, 0.0).sum() for term in terms]
        return total, torch.stack([total.detach(), *reported])

    def _own_line(self, note: Mapping[str, Any]) -> str:
        return f"{note['equal_groups']:.0%} of groups equal"
