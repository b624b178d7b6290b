"""The reward of answers to prompts of the validation split, and what the record of each step's rollout is shown as."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from common.curves import Curve
from train.evaluations.evaluation import WHOLE, Evaluation, Parts, Tools, is_due
from train.objectives.rewards import recorded_rewards
from train.progress import Progress

if TYPE_CHECKING:
    from train.settings.sections import Config

KIND, ROLLOUT = "held_out_reward", "rollout"
SHOWN = {  # figures of rollouts and their labels
    "reward": ("reward of sampled answers", True),
    "kl": ("KL from the start policy, nats a token", False),
    "entropy": ("entropy, nats a token", False),
    "clip_share": ("share of tokens clipped", False),
    "kl_reward": ("KL in the reward of an answer", True),
    "mean_return": ("mean return of tokens", True),
    "value_loss": ("loss of values", False),
    "explained_variance": ("share of returns that values explain", True),
    "equal_groups": ("share of groups with equal rewards", False),
    "cut_share": ("share of answers cut", False),
    "answer_length": ("tokens of an answer", False),
    "repetition": ("repeated pieces of answers", False),
    "generation_tokens_per_second": ("tokens/s sampled", True),
    "training_tokens_per_second": ("tokens/s learned from", True),
}


class HeldOutReward(Evaluation):
    """The mean reward of the likeliest answers to the first prompts of the validation split."""

    name, phase = KIND, "answering held-out prompts"
    curves = (
        Curve(
            kind=KIND,
            figure="held_out_reward",
            label="held-out reward",
            error="held_out_reward_stderr",
            seconds="held_out_seconds",
            measured_on=(("held_out_sha256",), ("held_out_prompts",), ("held_out_judges",)),
            higher_is_better=True,
        ),
        *(Curve(ROLLOUT, key, label, higher_is_better=better) for key, (label, better) in SHOWN.items()),
    )

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        parts = [reward["name"] for reward in recorded_rewards(config.rollout.reward)]
        if len(parts) > 1:
            own = (Curve(ROLLOUT, f"reward_{name}", f"reward {name}", higher_is_better=True) for name in parts)
            self.curves = (*self.curves[:2], *own, *self.curves[2:])  # behind their sum
        self.at_start = config.rollout.held_out_prompts > 0

    def due(self, step: int, *, last: bool) -> Parts:
        return WHOLE if self.at_start and (last or is_due(step, self.config.eval.every_steps)) else ()

    def build(self, tools: Tools) -> None:
        if not self.at_start:
            return
        from train.batches.prompts import Prompts

        rollout = self.config.rollout
        self._tools = tools
        prompts = Prompts(tools.tokens, "val", self.config.model.block_size - rollout.max_tokens)
        self._numbers = np.arange(min(rollout.held_out_prompts, prompts.count))
        assert tools.sampler is not None
        self._sampler = tools.sampler.asking(prompts)

    def measure(self, progress: Progress, parts: Parts) -> None:
        started = time.monotonic()
        found = self._sampler.roll_out(self._numbers, progress.step, samples=1, temperature=0.0)
        count = len(found.rewards)
        figures: dict[str, Any] = {f"held_out_{key}": value for key, value in found.figures().items()}
        del figures["held_out_reward_deviation"]
        error = float(found.rewards.std(ddof=1) / count**0.5) if count > 1 else None
        self._tools.recorder.note({
            "kind": KIND,
            "step": progress.step,
            "tokens": progress.tokens,
            **figures,
            "held_out_reward_stderr": error,
            "held_out_prompts": count,
            "held_out_sha256": self._tools.tokens.manifest.val_sha256,
            "held_out_judges": ", ".join(self.config.rollout.reward),
            **self.of_weights(),
            "held_out_seconds": time.monotonic() - started,
            "time": time.time(),
        })  # fmt: skip
        self._tools.recorder.log(
            f"held-out reward at step {progress.step}: {found.rewards.mean():.4f} of {count:,} prompts, "
            f"{found.figures()['cut_share']:.0%} of the answers cut ({time.monotonic() - started:.1f} s)"
        )
