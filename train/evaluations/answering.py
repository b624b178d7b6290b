"""What a model in training answers to multiple-choice questions, by HellaSwag's scorer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from train.evaluations.evaluation import Tools

if TYPE_CHECKING:
    from eval.hellaswag_task.examples import Example
    from eval.hellaswag_task.metrics import Accuracy
    from eval.hellaswag_task.multiple_choice import Question


@dataclass(frozen=True)
class Answers:
    """Of some examples: the mean accuracy by the mean per token, and bits per byte of the right endings.

    Scores that are NaN, whose largest means nothing, give NaN for both.
    """

    accuracy: Accuracy
    bits_per_byte: float

    def __str__(self) -> str:
        error = self.accuracy.standard_error
        spread = "" if error is None else f" ± {error:.4f}"
        return f"acc_norm {self.accuracy.value:.4f}{spread}, {self.bits_per_byte:.4f} bits per byte"


def make_questions(tools: Tools, examples: Sequence[Example]) -> tuple[Question, ...]:
    """Raises UserError where the tokenizer lacks a character, or the model's context is too short for an ending."""
    from eval.hellaswag_task.metrics import plain_question
    from eval.hellaswag_task.multiple_choice import require_room

    questions = tuple(plain_question(example, tools.tokenizer) for example in examples)
    require_room(questions, tools.model.config.block_size)
    return questions


def answer(tools: Tools, examples: Sequence[Example], questions: Sequence[Question]) -> Answers:
    """All ranks call, and all get the same."""
    from eval.hellaswag_task.metrics import Accuracy, accuracy, choose_by_token, right_bits_per_byte
    from eval.hellaswag_task.multiple_choice import log_likelihoods

    scores = log_likelihoods(tools.model, questions, tools.ranks, dtype=tools.dtype)
    result = Accuracy(math.nan, None)
    if not np.isnan(scores).any():
        result = accuracy(choose_by_token(scores, questions), examples)
    right = [example.label for example in examples]
    return Answers(result, right_bits_per_byte(scores, questions, right, tools.tokenizer.piece_bytes))
