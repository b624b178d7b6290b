"""HellaSwag's three accuracies, which are never mixed.

| name | prompt | the ending chosen has the highest | comparable with |
|---|---|---|---|
| `acc` | context without the activity label | summed log-probability | build-nanogpt's `acc` |
| `acc_norm` | the same | mean log-probability per token | GPT-2's 0.2945, nanoGPT's kin, GPT-3's paper |
| `acc_norm_chars` | lm-evaluation-harness's | sum divided by the ending's characters | lm-eval's `acc_norm` |
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from data_prep.tokenization.tokenizer import Tokenizer
from eval.hellaswag_task.examples import Example
from eval.hellaswag_task.multiple_choice import BatchSize, Ids, Question, log_likelihoods
from model.gpt import GPT
from model.number_formats import Dtype
from model.precision import non_finite_predictions
from model.ranks import Ranks

Choices = npt.NDArray[np.int64]  # (examples): the ending chosen
Metric = Literal["acc", "acc_norm", "acc_norm_chars"]


@dataclass(frozen=True)
class Accuracy:
    """The fraction that is right, and the standard error of that fraction (None for a single example)."""

    value: float
    standard_error: float | None


@dataclass(frozen=True)
class Questions:
    """A file's examples as token ids: the plain prompts, and lm-evaluation-harness's."""

    plain: tuple[Question, ...]
    harness: tuple[Question, ...]

    def distinct(self) -> tuple[Question, ...]:
        """Each question once: in the text form the two prompts are mostly the same tokens."""
        return tuple(dict.fromkeys((*self.plain, *self.harness)))


def plain_question(example: Example, tokenizer: Tokenizer) -> Question:
    """Context and endings encoded apart, a space before each ending, as nanoGPT's kin do."""
    context = _ids(tokenizer, example.context)
    endings = tuple(tuple(tokenizer.encode(f" {ending}", continues=True).tolist()) for ending in example.endings)
    return Question(_opening(tokenizer, context) + context, endings)


def harness_question(example: Example, tokenizer: Tokenizer) -> Question:
    """As lm-evaluation-harness encodes pairs: both together, cut where the context by itself ends.

    Spaces at the context's end move to the ending.
    """
    context = example.harness_context.rstrip() or example.harness_context
    spaces = example.harness_context[len(context) :]
    ids = _ids(tokenizer, context)
    wholes = [_ids(tokenizer, f"{context}{spaces} {ending}") for ending in example.harness_endings]
    return Question(_opening(tokenizer, ids) + ids, tuple(whole[len(ids) :] for whole in wholes))


def build_questions(examples: Sequence[Example], tokenizer: Tokenizer) -> Questions:
    """Raises UserError where the tokenizer lacks a character."""
    return Questions(
        tuple(plain_question(example, tokenizer) for example in examples),
        tuple(harness_question(example, tokenizer) for example in examples),
    )


def choose_all(
    model: GPT,
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    ranks: Ranks,
    *,
    dtype: Dtype = "fp32",
    batch_size: BatchSize | None = None,
    done: Callable[[int], object] = lambda count: None,
) -> dict[Metric, Choices]:
    """What the model chooses for each example by each definition. (All ranks call, all get everything.)

    Raises UserError where the tokenizer lacks a character, or the scores are NaN or inf, whose largest means nothing.
    """
    questions = build_questions(examples, tokenizer)
    distinct = questions.distinct()
    scores = log_likelihoods(model, distinct, ranks, dtype=dtype, batch_size=batch_size, done=done)
    if np.isnan(scores).any():
        raise UserError(non_finite_predictions(dtype))
    rows = {question: row for row, question in enumerate(distinct)}
    plain = scores[[rows[question] for question in questions.plain]]  # (examples, 4)
    harness = scores[[rows[question] for question in questions.harness]]
    characters = np.array([[float(len(ending)) for ending in example.harness_endings] for example in examples])
    with np.errstate(divide="ignore"):  # an ending of no characters is the worst, as for lm-evaluation-harness
        per_character = harness / characters
    return {
        "acc": plain.argmax(axis=1),
        "acc_norm": choose_by_token(plain, questions.plain),
        "acc_norm_chars": per_character.argmax(axis=1),
    }


def choose_by_token(scores: npt.NDArray[np.float64], questions: Sequence[Question]) -> Choices:
    """The ending with the highest mean log-probability per token; scores (questions, the most endings)."""
    tokens = np.zeros(scores.shape)
    for row, question in enumerate(questions):
        tokens[row, : len(question.endings)] = [len(ending) for ending in question.endings]
    return np.where(tokens > 0, scores / np.maximum(tokens, 1), -np.inf).argmax(axis=1)


def accuracy(choices: Choices, examples: Sequence[Example]) -> Accuracy:
    """The standard error is that of a mean, sqrt(p (1 - p) / (n - 1)), as in lm-evaluation-harness."""
    count = len(examples)
    value = float(np.mean(choices == np.array([example.label for example in examples])))
    return Accuracy(value, math.sqrt(value * (1 - value) / (count - 1)) if count > 1 else None)


def right_bits_per_byte(
    scores: npt.NDArray[np.float64],
    questions: Sequence[Question],
    right: Sequence[int],
    piece_bytes: npt.NDArray[np.int32],
) -> float:
    """Summed bits of the right endings, divided by the bytes of their text (with the space before each).

    Args:
        scores: (questions, endings) log-likelihoods in nats. right: which ending of each. piece_bytes: (V,)
    """
    endings = [question.endings[label] for question, label in zip(questions, right, strict=True)]
    nats = -float(np.sum(scores[np.arange(len(right)), list(right)]))
    size = sum(int(piece_bytes[list(ending)].sum()) for ending in endings)
    return nats / math.log(2) / size if size else math.nan


def _ids(tokenizer: Tokenizer, text: str) -> Ids:
    return tuple(tokenizer.encode(text).tolist())


def _opening(tokenizer: Tokenizer, context: Ids) -> Ids:
    """The ids (n,) before a context: those that the tokenizer itself puts there, or those that start an empty one."""
    opening: Ids = tuple(tokenizer.opening.tolist()) if tokenizer.begins_contexts or not context else ()
    if not context and not opening:
        raise UserError(
            "a context is empty, which this tokenizer can't start from (it has no end-of-text token): remove it"
        )
    return opening
