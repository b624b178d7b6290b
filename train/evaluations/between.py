"""What happens between steps and leaves the training curve untouched: validation and samples."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from common.errors import UserError
from common.seeds import seed_of
from data_prep.token_sets.sequences import Windows
from data_prep.tokenization.tokenizer import Tokenizer, load_tokenizer
from eval.generation.sampling import continue_tokens
from eval.shared.loss import LossResult, evaluate_loss
from model.gpt import GPT
from model.precision import Dtype
from model.ranks import Ranks
from train.progress import Progress
from train.run.recorder import Recorder
from train.settings.sections import EvalConfig


@dataclass
class Validator:
    """Loss on the same windows of the validation split every time, shared out over all ranks."""

    model: GPT
    windows: Windows
    window_count: int
    ranks: Ranks
    micro_batch: int
    dtype: Dtype
    recorder: Recorder
    data_sha256: str  # of the whole validation split
    split_documents_at: int | None = None
    latest: float | None = None
    latest_step: int | None = None

    def warm_up(self) -> None:
        """Go through a validation's shapes once, unrecorded, on every rank that has a share of it."""
        a_micro_batch_each = (self.ranks.world_size - 1) * self.micro_batch + 1
        self._evaluate(min(self.window_count, a_micro_batch_each))

    def validate(self, progress: Progress) -> None:
        """Measure and record. (All ranks call.)"""
        started = time.monotonic()
        result = self._evaluate(self.window_count)
        assert result.tokens == self.measured_on["val_tokens"], result
        self.latest, self.latest_step = result.loss, progress.step
        seconds = time.monotonic() - started
        record = {
            "step": progress.step,
            "tokens": progress.tokens,
            "val_loss": result.loss,
            **self.measured_on,
            "val_seconds": seconds,
            "time": time.time(),
        }
        self.recorder.note(record)
        perplexity = math.exp(result.loss) if result.loss < 50 else math.inf
        self.recorder.say(
            f"validation at step {progress.step}: loss {result.loss:.4f}, perplexity {perplexity:,.1f} "
            f"({seconds:.1f} s)"
        )

    @property
    def measured_on(self) -> dict[str, Any]:
        """What stands beside every loss: losses compare where all of it is the same (`common.measured`)."""
        return {
            "val_sha256": self.data_sha256,
            "val_tokens": self.window_count * self.windows.block_size,
            "val_block_size": self.windows.block_size,
            "val_document_mask": self.split_documents_at is not None,
        }

    def facts(self) -> dict[str, Any]:
        """The latest loss, the step it was measured at and on what, for a checkpoint's manifest."""
        return {"val_loss": self.latest, "val_step": self.latest_step, **self.measured_on}

    def _evaluate(self, window_count: int) -> LossResult:
        return evaluate_loss(
            self.model,
            self.windows,
            self.ranks,
            window_count=window_count,
            micro_batch=self.micro_batch,
            dtype=self.dtype,
            split_documents_at=self.split_documents_at,
        )


def check_prompts(config: EvalConfig, tokenizer_spec: dict[str, Any]) -> None:
    """Raises UserError where the data's tokenizer can't be had, or samples are asked for that it can't begin.

    Before anything else is begun.
    """
    tokenizer = load_tokenizer(tokenizer_spec)
    if not config.sample_every_steps or not config.prompts:
        return
    for prompt in config.prompts:
        try:
            empty = not tokenizer.prompt(prompt)
        except UserError as error:
            raise UserError(f"eval.prompts has {prompt!r}, but {error}: give other --eval.prompts") from None
        if empty:
            raise UserError("eval.prompts has an empty text, but the data mark no end of text to begin with: write one")


@dataclass
class SampleWriter:
    """Lets the model go on from fixed prompts, each on another rank."""

    model: GPT
    tokenizer: Tokenizer
    config: EvalConfig
    ranks: Ranks
    seed: int
    recorder: Recorder

    def write(self, step: int, prompts: Sequence[int]) -> None:
        """Sample and record. (All ranks call.) The same step gives the same text for any number of ranks.

        Args:
            prompts: which of the configured ones, by their place.
        """
        texts: dict[int, str | None] = {}
        # a context grows with every token: compiled blocks would be compiled again for each length
        with torch.compiler.set_stance("force_eager"):
            for index in prompts[self.ranks.rank :: self.ranks.world_size]:
                texts[index] = self._continue(step, index, self.config.prompts[index])
        for index, text in sorted(item for share in self.ranks.gather(texts) for item in share.items()):
            if text is None:
                self.recorder.say(f"WARNING: no sample at step {step}: the model's predictions are no numbers")
            else:
                self.recorder.sample(step, self.config.prompts[index], text)

    def _continue(self, step: int, index: int, prompt: str) -> str | None:
        """None where the predictions are no numbers: what has become of the weights is for the step or save to say."""
        tokens = self.tokenizer.prompt(prompt)
        try:
            written = continue_tokens(
                self.model,
                tokens,
                self.config.sample_tokens,
                temperature=self.config.temperature,
                top_k=self.config.top_k,
                seed=seed_of(f"sample {self.seed} {step} {index}", bits=63),
                stops=self.tokenizer.end_ids,
            )
        except UserError:
            return None
        return self.tokenizer.decode(written, continues=bool(prompt))
