"""HellaSwag on a fixed subset between steps, over all ranks; the training curve stays as it is."""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.paths import expand_path
from data_prep.tokenization.tokenizer import Tokenizer
from eval.hellaswag_task.examples import Example, evenly_spaced, read_hellaswag, require_hellaswag
from eval.hellaswag_task.metrics import Accuracy, accuracy, choose_by_token, plain_question
from eval.hellaswag_task.multiple_choice import Question, log_likelihoods, require_room
from model.gpt import GPT
from model.precision import Dtype
from model.ranks import Ranks
from train.progress import Progress
from train.run.recorder import Recorder
from train.settings.sections import EvalConfig


def check_hellaswag(config: EvalConfig) -> None:
    """Raises UserError where HellaSwag is asked for and its file is missing. Before anything else is begun."""
    if config.hellaswag_every_steps:
        require_hellaswag(_path(config))


def _path(config: EvalConfig) -> Path | None:
    return expand_path(config.hellaswag_data) if config.hellaswag_data is not None else None


@dataclass
class HellaSwagProbe:
    """Measures `acc_norm`, the mean per token over contexts without the activity label."""

    model: GPT
    examples: tuple[Example, ...]
    questions: tuple[Question, ...]
    every_steps: int
    data_sha256: str
    official: bool  # else the text form, whose scores compare with nothing published
    ranks: Ranks
    dtype: Dtype
    recorder: Recorder

    @classmethod
    def build(
        cls, config: EvalConfig, model: GPT, tokenizer: Tokenizer, ranks: Ranks, dtype: Dtype, recorder: Recorder
    ) -> "HellaSwagProbe | None":
        """None where the configuration doesn't ask for it.

        Raises UserError for a file of something else, and where the model is too short for an ending.
        """
        if not config.hellaswag_every_steps:
            return None
        data = read_hellaswag(_path(config))
        examples = evenly_spaced(data, config.hellaswag_examples)
        questions = tuple(plain_question(example, tokenizer) for example in examples)
        require_room(questions, model.config.block_size)
        every, sha256 = config.hellaswag_every_steps, data.sha256
        return cls(model, examples, questions, every, sha256, data.official, ranks, dtype, recorder)

    def measure(self, progress: Progress) -> None:
        """Answer and record; scores that are no numbers, whose largest means nothing, as null. (All ranks call.)"""
        started = time.monotonic()
        scores = log_likelihoods(self.model, self.questions, self.ranks, dtype=self.dtype)
        result = Accuracy(math.nan, None)
        if not np.isnan(scores).any():
            result = accuracy(choose_by_token(scores, self.questions), self.examples)
        seconds = time.monotonic() - started
        record = {
            "kind": "hellaswag",
            "step": progress.step,
            "tokens": progress.tokens,
            "hellaswag_acc_norm": result.value,
            "hellaswag_acc_norm_stderr": result.standard_error,
            "hellaswag_examples": len(self.examples),
            "hellaswag_official": self.official,
            "hellaswag_sha256": self.data_sha256,
            "hellaswag_seconds": seconds,
            "time": time.time(),
        }
        self.recorder.note(record)
        error = "" if result.standard_error is None else f" ± {result.standard_error:.4f}"
        which = "" if self.official else ", text form"
        self.recorder.say(
            f"HellaSwag at step {progress.step}: acc_norm {result.value:.4f}{error} "
            f"({len(self.examples)} examples{which}, {seconds:.1f} s)"
        )
