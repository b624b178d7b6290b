"""Reward models that score a policy's answers, in evaluation mode, as eval/reward.py scores conversations."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from eval.reward_task.scoring import scores_of
from eval.shared.loading import evaluation_dtype
from model.gpt import GPT
from model.number_formats import Dtype
from model.ranks import Ranks
from model.weights import load_model
from train.objectives.rewards import NamedModel, Reward

AT_ONCE = 8  # answers, as eval/reward.py scores


@dataclass(frozen=True)
class ModelReward:
    """A reward model. name: its run's, by which its figures are recorded. identity: SHA-256 of its weights."""

    name: str
    weight: float
    model: GPT
    dtype: Dtype
    identity: str

    def __call__(self, sequences: Sequence[Sequence[int]]) -> npt.NDArray[np.float64]:
        """A score for each of prompts with their answers, ids of the policy's tokenizer, at the last of each; (n,).

        Raises UserError where one is no finite number.
        """
        scores = scores_of(self.model, sequences, micro_batch=AT_ONCE, dtype=self.dtype)
        if not np.isfinite(scores).all():
            raise UserError(f"the reward model {self.name} gives a score that is no finite number: use another")
        return scores


def open_rewards(rewards: Sequence[Reward | NamedModel], ranks: Ranks) -> list[Reward | ModelReward]:
    """The rewards with their models in memory. All ranks call, and load the first rank's checkpoints.

    Raises UserError where one can't be loaded.
    """
    dtype = evaluation_dtype("auto", ranks.device)
    found: list[Reward | ModelReward] = []
    for reward in rewards:
        if isinstance(reward, Reward):
            found.append(reward)
            continue
        checkpoint = Path(ranks.from_first(str(reward.checkpoint)))
        model = load_model(checkpoint, ranks.device).requires_grad_(requires_grad=False)
        found.append(ModelReward(reward.name, reward.weight, model, dtype, reward.identity))
    return found
