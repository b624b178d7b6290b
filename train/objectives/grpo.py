"""GRPO: learn from the rewards of a group of answers to each prompt, without a value function.

Shao et al. 2024 (arXiv:2402.03300, section 4.1). A step samples G answers o_1 … o_G to each of its prompts from the
policy as it is, and then maximises, by one or more updates of the optimizer, equation 3:

    1/G Σ_i 1/|o_i| Σ_t ( min(r_it A_i, clip(r_it, 1 - ε, 1 + ε) A_i) - β KL_it ),    r_it = p(o_it) / p_old(o_it)

with the advantages A_i of `policy.group_advantages`. `rollout.length_term` has the two other ways to divide: by the
tokens of all answers together (Yu et al. 2025, DAPO, arXiv:2503.14476, equation 8), so that each token counts alike, or
by a constant (Liu et al. 2025, Dr. GRPO, arXiv:2503.20783), which has no preference for short answers that are right.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.errors import UserError
from data_prep.token_sets.packing import IGNORE
from model.gpt import GPT
from model.number_formats import Dtype
from model.precision import autocast
from model.ranks import Ranks
from train.batches.loader import MicroBatch, StepBatch
from train.batches.plan import BatchPlan
from train.objectives.objective import Sample, StepReport
from train.objectives.policy import (
    clipped_surrogate,
    group_advantages,
    kl_estimate,
    kl_loss,
    log_probabilities,
)
from train.objectives.rollout import Rollout, Sampler
from train.settings.sections import RolloutConfig

KIND = "rollout"  # of the records of rollouts
WIDTH_MULTIPLE = 8  # tokens
SHOWN = 4  # answers of a step that are shown, each to another prompt
UNITS = {"answers": "answers", "tokens": "answer_tokens", "constant": "answer_places"}  # what a loss is the mean over


class Grpo:
    """The objective. All that a step learns from is made here, from the numbers of its prompts."""

    sources: tuple[str, ...] = ()

    def __init__(self, config: RolloutConfig) -> None:
        """What the loss of a batch takes; `prepare` brings the rest."""
        self._config, self.unit = config, UNITS[config.length_term]
        self.terms: tuple[str, ...] = ("entropy", "clip_share", *(("kl",) if config.kl else ()))
        self._figures: dict[str, Any] = {}
        self._samples: tuple[Sample, ...] = ()
        self._started, self._length = 0.0, 0

    def prepare(
        self,
        sampler: Sampler,
        model: GPT,
        reference: GPT | None,
        ranks: Ranks,
        plan: BatchPlan,
        dtype: Dtype,
        *,
        trims: bool,
        on_act: Callable[[str], None] = lambda act: None,
    ) -> None:
        """Args:
        reference: the policy that the run started from, in evaluation mode; None without KL.
        trims: leave out what is padding in all of a step's rows; not where every shape is compiled.
        on_act: called at the start of a rollout, by which a rank that hangs is named.

        Raises UserError where a step's micro-batches don't divide among its minibatches.
        """
        config = self._config
        if plan.accumulation % config.minibatches:
            size = plan.sequences // plan.world_size // config.minibatches
            raise UserError(
                f"{plan.accumulation} micro-batches of a rank don't divide among rollout.minibatches "
                f"{config.minibatches}: use a batch.micro_batch that divides {size}"
            )
        self._sampler, self._model, self._reference = sampler, model, reference
        self._ranks, self._plan, self._dtype, self._trims = ranks, plan, dtype, trims
        self._on_act = on_act

    def updates(self, batch: StepBatch, step: int) -> Iterator[StepBatch]:
        """Sample answers, then give what each update of the step learns from: `epochs` times all minibatches."""
        config, samples = self._config, self._config.samples
        assert batch.numbers is not None
        numbers = batch.numbers[::samples] // samples  # (P,)
        self._on_act("sampling answers")
        rollout = self._sampler.roll_out(numbers, step, samples=samples, temperature=config.temperature)
        groups = group_advantages(rollout.rewards, samples, deviation=config.deviation_term)
        whole = self._to_learn(batch, rollout, groups.advantages)
        self._note(rollout, groups.equal)
        self._length = whole.tokens.shape[2]
        share = self._plan.sequences // config.minibatches  # of all ranks' rows
        for _ in range(config.epochs):
            for number in range(config.minibatches):
                rows = slice(number * share, (number + 1) * share)
                yield self._part(whole, number, rollout, rows)

    def _to_learn(self, batch: StepBatch, rollout: Rollout, advantages: npt.NDArray[np.float64]) -> StepBatch:
        """This rank's rows of a rollout, with all that their loss needs."""
        plan, device, config = self._plan, self._ranks.device, self._config
        places = [plan.micro_batch_number(self._ranks.rank, index) for index in range(plan.accumulation)]
        mine = (np.array(places)[:, None] * plan.micro_batch + np.arange(plan.micro_batch)).ravel()  # (A·M,)
        inputs = np.zeros((len(mine), self._width(batch, rollout)), dtype=np.int64)  # (A·M, T)
        targets = np.full_like(inputs, IGNORE)
        learned, (tokens, lengths, _) = self._learned(rollout), rollout.answers
        for row, place in enumerate(mine.tolist()):
            prompt, answer = rollout.prompts[place // config.samples].ids, tokens[place, : lengths[place]]
            whole = np.concatenate([prompt.astype(np.int64), answer])
            inputs[row, : len(whole) - 1] = whole[:-1]
            if learned[place]:
                targets[row, len(prompt) - 1 : len(whole) - 1] = answer
        shape = (plan.accumulation, plan.micro_batch)
        rows = replace(
            batch,
            tokens=torch.from_numpy(inputs).reshape(*shape, -1),  # (A, M, T)
            targets=torch.from_numpy(targets).reshape(*shape, -1),  # (A, M, T)
            document_ids=None,
            more={"advantages": torch.from_numpy(advantages[mine]).float().reshape(shape)},  # (A, M)
        )
        more = dict(rows.more)
        if config.epochs * config.minibatches > 1:  # else the policy that learns is the old one
            more["old"] = self._without_learning(self._model, rows, device)
        if self._reference is not None:
            more["reference"] = self._without_learning(self._reference, rows, device)
        return replace(rows, more=more)

    def _width(self, batch: StepBatch, rollout: Rollout) -> int:
        """Tokens of a row: no more than the step's longest row needs, the same for any number of ranks."""
        if not self._trims:
            return batch.tokens.shape[2]
        asked = np.repeat([len(prompt.ids) for prompt in rollout.prompts], self._config.samples)
        longest = int((asked + rollout.answers.lengths).max()) - 1
        return min(batch.tokens.shape[2], -(-longest // WIDTH_MULTIPLE) * WIDTH_MULTIPLE)

    def _without_learning(self, model: GPT, rows: StepBatch, device: torch.device) -> Tensor:
        """Log-probabilities (A, M, T) of the rows' targets, by the very forward that a step learns with."""
        with torch.no_grad(), autocast(self._dtype, device):
            found = [
                log_probabilities(model, part.tokens, part.targets, self._config.temperature).log_probs
                for part in rows.micro_batches(device)
            ]
        return torch.stack(found)

    def _learned(self, rollout: Rollout) -> npt.NDArray[np.bool_]:
        """Which answers (R,) are learned from: with `mask_cut` only those that have ended."""
        ended = rollout.answers.ended
        return ended if self._config.mask_cut else np.ones_like(ended)

    def _part(self, whole: StepBatch, number: int, rollout: Rollout, rows: slice) -> StepBatch:
        """A minibatch: this rank's part of rows that are the same for any number of ranks."""
        size = len(whole.tokens) // self._config.minibatches
        part = slice(number * size, (number + 1) * size)
        learned, lengths = self._learned(rollout)[rows], rollout.answers.lengths[rows]
        tokens = max(1, int(lengths[learned].sum()))
        divisor = {
            "answers": max(1, int(learned.sum())),
            "tokens": tokens,
            "constant": max(1, int(learned.sum())) * rollout.answers.tokens.shape[1],
        }[self._config.length_term]
        more = {name: values[part] for name, values in whole.more.items()}
        counted = whole.targets[part] != IGNORE  # (a, M, T)
        by_length = 1 / counted.sum(dim=2).clamp(min=1)  # (a, M)
        more["weights"] = by_length if self._config.length_term == "answers" else torch.ones_like(by_length)
        more["per_token"] = torch.full_like(by_length, divisor / tokens)  # makes what is reported a mean over tokens
        return replace(
            whole,
            tokens=whole.tokens[part],
            targets=whole.targets[part],
            windows=whole.windows[part],
            target_count=0,
            total_target_count=divisor,
            more=more,
        )

    def target_count(self, batch: StepBatch) -> int:
        """Not asked for: `total_target_count` has that of all ranks."""
        return batch.target_count

    def total_target_count(self, batch: StepBatch) -> int | None:
        """What the sum of the losses is divided by: answers, their tokens, or a constant for each answer."""
        return batch.total_target_count

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

    def record(self, loss: float) -> dict[str, float]:
        """The loss is near 0 by its nature; rewards are in the record of the rollout."""
        return {"loss": loss}

    def _note(self, rollout: Rollout, equal: int) -> None:
        """Keep what is to be recorded of a rollout."""
        generated = int(rollout.answers.lengths.sum())
        self._figures = {
            **rollout.figures(),
            "equal_groups": equal / len(rollout.prompts),
            "answer_tokens": generated,
            "rollout_seconds": rollout.seconds,
            "generation_tokens_per_second": generated / max(rollout.seconds, 1e-9),
        }
        self._started = time.monotonic()
        rows = range(0, min(SHOWN, len(rollout.prompts)) * self._config.samples, self._config.samples)
        shown = [(rollout.prompts[row // self._config.samples], row) for row in rows]
        self._samples = tuple(
            Sample(prompt.text, self._sampler.text_of(rollout.answers, row), float(rollout.rewards[row]))
            for prompt, row in shown
        )

    def report(self, terms: Mapping[str, float]) -> StepReport | None:
        seconds = max(time.monotonic() - self._started, 1e-9)
        learned = self._plan.sequences * self._length * self._config.epochs
        speed = {"training_tokens_per_second": learned / seconds}
        note = {"kind": KIND, **self._figures, **terms, **speed}
        kl = f" | KL {note['kl']:.4f}" if "kl" in note else ""
        line = (
            f"reward {note['reward']:.4f}{kl} | entropy {note['entropy']:.3f} | {note['answer_length']:.1f} tokens an "
            f"answer | {note['cut_share']:.0%} cut | {note['equal_groups']:.0%} of groups equal"
        )
        return StepReport(note, line, self._samples)
