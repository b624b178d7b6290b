"""A rollout: answers to a step's prompts, sampled by all ranks, with their rewards.

Prompts are answered in blocks of `rollout.prompts_per_block`, each by one rank, and all ranks get all answers. Nothing
of a rollout is saved: a run that is killed inside a step does the whole step again.

P prompts, G samples of each, R = P·G rows (row i·G + j is sample j of prompt i), N tokens of an answer at most.
"""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from model.gpt import GPT
from model.number_formats import Dtype
from model.ranks import Ranks
from train.batches.prompts import Prompt, Prompts
from train.objectives.model_reward import ModelReward
from train.objectives.rewards import Reward, total
from train.objectives.sampling import Sampled, random_numbers, sample_answers

REPEATED = 3  # tokens of a piece of an answer that counts as repeated when it stands there before


@dataclass(frozen=True)
class Rollout:
    """Answers and what they are worth, the same on all ranks.

    Attributes:
        prompts: P of them. answers: of R rows.
        parts: rewards by name, (R,) each. rewards: their weighted sum, or `rollout.cut_reward`, (R,).
        seconds: that sampling and judging took on this rank.
    """

    prompts: list[Prompt]
    answers: Sampled
    parts: dict[str, npt.NDArray[np.float64]]
    rewards: npt.NDArray[np.float64]
    seconds: float

    def figures(self) -> dict[str, float]:
        """What is recorded of it: means over rows, and shares of them."""
        tokens, lengths, ended = self.answers
        repeated = [repetition(row[:length]) for row, length in zip(tokens, lengths.tolist(), strict=True)]
        return {
            "reward": float(self.rewards.mean()),
            "reward_deviation": float(self.rewards.std()),
            **{f"reward_{name}": float(values.mean()) for name, values in self.parts.items()},
            "cut_share": float((~ended).mean()),
            "answer_length": float(lengths.mean()),
            "repetition": float(np.mean(repeated)),
        }


def repetition(tokens: npt.NDArray[np.int64]) -> float:
    """The share of pieces of 3 tokens that stand in an answer (n,) before; 0 where it is shorter."""
    pieces = list(zip(*(tokens[start:].tolist() for start in range(REPEATED)), strict=False))
    return 1 - len(set(pieces)) / len(pieces) if pieces else 0.0


class Sampler:
    """What answers a split's prompts and judges the answers. Made on every rank."""

    def __init__(
        self,
        model: GPT,
        prompts: Prompts,
        rewards: Sequence[Reward | ModelReward],
        ranks: Ranks,
        *,
        max_tokens: int,
        prompts_per_block: int,
        seed: int,
        dtype: Dtype,
        cut_reward: float | None = None,
    ) -> None:
        """Args: cut_reward: what an answer is worth that was cut; None: what the rewards say."""
        self.prompts = prompts
        self._model, self._rewards, self._ranks = model, rewards, ranks
        self._max_tokens, self._block = max_tokens, prompts_per_block
        self._seed, self._dtype, self._cut_reward = seed, dtype, cut_reward

    def asking(self, prompts: Prompts) -> "Sampler":
        """The same for another split's prompts, with the same reward models in memory."""
        other = copy.copy(self)
        other.prompts = prompts
        return other

    def roll_out(self, numbers: npt.NDArray[np.int64], step: int, *, samples: int, temperature: float) -> Rollout:
        """Answer these prompts (P,), each `samples` times. All ranks call, and get the same.

        Raises UserError on all ranks where a reward can't be had.
        """
        started, ranks = time.monotonic(), self._ranks
        blocks = [slice(first, first + self._block) for first in range(0, len(numbers), self._block)]
        each = -(-len(blocks) // ranks.world_size)  # of a rank; some have one less
        width = self._max_tokens + 2 + len(self._rewards)
        packed = np.zeros((each, self._block * samples, width))  # tokens, length, ended, rewards
        problem = None
        for place, block in enumerate(blocks[ranks.rank :: ranks.world_size]):
            try:
                rows = self._answer(numbers[block], block.start, step, samples, temperature)
            except UserError as error:
                problem = problem or str(error)
                continue
            packed[place, : len(rows)] = rows
        if (met := next(filter(None, ranks.gather(problem)), None)) is not None:
            raise UserError(met)
        shares = ranks.gather_array(packed)
        whole = np.concatenate([shares[b % ranks.world_size][b // ranks.world_size] for b in range(len(blocks))])
        whole = whole[: len(numbers) * samples]  # (R, N + 2 + rewards): only the last block may have fewer rows
        tokens, more = whole[:, : self._max_tokens].astype(np.int64), whole[:, self._max_tokens :]
        parts = {reward.name: more[:, 2 + index] for index, reward in enumerate(self._rewards)}
        answers = Sampled(tokens, more[:, 0].astype(np.int64), more[:, 1].astype(bool))
        prompts = [self.prompts[number] for number in numbers.tolist()]
        rewards = total(self._rewards, parts)
        if self._cut_reward is not None:
            rewards = np.where(answers.ended, rewards, self._cut_reward)
        return Rollout(prompts, answers, parts, rewards, time.monotonic() - started)

    def _answer(
        self, numbers: npt.NDArray[np.int64], first: int, step: int, samples: int, temperature: float
    ) -> npt.NDArray[np.float64]:
        """A block's answers and rewards, (B, N + 2 + rewards). Args: first: the block's first place in the step."""
        prompts = [self.prompts[number] for number in numbers.tolist()]
        drawn = np.stack([
            random_numbers(self._seed, step, first + place, sample, self._max_tokens)
            for place in range(len(prompts)) for sample in range(samples)
        ])  # fmt: skip
        found = sample_answers(
            self._model,
            [prompt.ids for prompt in prompts],
            drawn,
            temperature=temperature,
            end_ids=self.prompts.tokenizer.end_ids,
            dtype=self._dtype,
        )
        asked = [prompt for prompt in prompts for _ in range(samples)]
        texts = [self.text_of(found, row) for row in range(len(asked))]
        whole = [
            np.concatenate([prompt.ids, tokens[:length]]).tolist()
            for prompt, tokens, length in zip(asked, found.tokens, found.lengths, strict=True)
        ]
        worth = [
            reward([prompt.text for prompt in asked], list(texts), [dict(prompt.fields) for prompt in asked])
            if isinstance(reward, Reward)
            else reward(whole)
            for reward in self._rewards
        ]
        return np.column_stack([found.tokens, found.lengths, found.ended, *worth])

    def text_of(self, answers: Sampled, row: int) -> str:
        """A row's answer without the token that ends it."""
        length = int(answers.lengths[row]) - int(answers.ended[row])
        text: str = self.prompts.tokenizer.decode(answers.tokens[row, :length], continues=True)
        return text
