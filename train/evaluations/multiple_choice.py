"""Multiple-choice questions between steps, over all ranks: HellaSwag on a fixed subset, and files of one's own."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.curves import HELLASWAG, Curve
from common.paths import expand_path
from eval.hellaswag_task.examples import evenly_spaced, read_hellaswag, require_hellaswag
from eval.hellaswag_task.own_examples import OwnExamples, read_own_examples
from train.evaluations.evaluation import WHOLE, Evaluation, Parts, Tools, is_due
from train.progress import Progress
from train.settings.sections import Config

if TYPE_CHECKING:
    from data_prep.token_sets.token_set import TokenSet
    from eval.hellaswag_task.examples import Example
    from eval.hellaswag_task.metrics import Accuracy
    from eval.hellaswag_task.multiple_choice import Question

BITS = Curve(
    kind=HELLASWAG.kind,
    figure="hellaswag_bits_per_byte",
    label="HellaSwag, bits per byte of the right ending",
    measured_on=HELLASWAG.measured_on,
)


class HellaSwag(Evaluation):
    """Measures `acc_norm`, the mean per token over contexts without the activity label; and bits per byte of the right
    endings, which say more of small models, whose choices are near chance.
    """

    name, phase = HELLASWAG.kind, "answering HellaSwag"
    curves: tuple[Curve, ...] = (HELLASWAG,)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.eval.hellaswag_every_steps:
            self.curves = (HELLASWAG, BITS)

    def check(self, tokens: TokenSet) -> None:
        """Raises UserError where its file is missing."""
        if self.config.eval.hellaswag_every_steps:
            require_hellaswag(self._path())

    def due(self, step: int, *, last: bool) -> Parts:
        every = self.config.eval.hellaswag_every_steps
        return WHOLE if every > 0 and (last or is_due(step, every)) else ()

    def build(self, tools: Tools) -> None:
        """Raises UserError where the file holds something else, or no example fits into the model's context."""
        config = self.config.eval
        if not config.hellaswag_every_steps:
            return
        data = read_hellaswag(self._path())
        self._tools, self._data = tools, data
        asked = evenly_spaced(data.examples, config.hellaswag_examples)
        self._examples, self._questions = make_questions(tools, "HellaSwag", asked)

    def measure(self, progress: Progress, parts: Parts) -> None:
        """Answer and record; scores that are NaN, whose largest means nothing, as null."""
        started, tools = time.monotonic(), self._tools
        found = answer(tools, "HellaSwag", self._examples, self._questions)
        seconds = time.monotonic() - started
        record = {
            "kind": self.name,
            "step": progress.step,
            "tokens": progress.tokens,
            "hellaswag_acc_norm": found.accuracy.value,
            "hellaswag_acc_norm_stderr": found.accuracy.standard_error,
            BITS.figure: found.bits_per_byte,
            "hellaswag_examples": len(self._examples),
            "hellaswag_official": self._data.official,  # else the text form: its scores compare with nothing published
            "hellaswag_sha256": self._data.sha256,
            "hellaswag_seconds": seconds,
            **self.of_weights(),
            "time": time.time(),
        }
        tools.recorder.note(record)
        which = "" if self._data.official else ", text form"
        tools.recorder.log(
            f"HellaSwag at step {progress.step}: {found} ({len(self._examples)} examples{which}, {seconds:.1f} s)"
        )

    def _path(self) -> Path | None:
        path = self.config.eval.hellaswag_data
        return expand_path(path) if path is not None else None


class Choices(Evaluation):
    """Measures, of each file of `eval.choices`, what HellaSwag's is measured by."""

    name, phase = "choices", "answering questions"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        asked = config.eval.choices if config.eval.choices_every_steps else {}
        self.curves = tuple(curve for name in asked for curve in curves_of(name))
        self._files: dict[str, OwnExamples] = {}
        self._examples: dict[str, tuple[Example, ...]] = {}
        self._questions: dict[str, tuple[Question, ...]] = {}

    def check(self, tokens: TokenSet) -> None:
        """Raises UserError where a file is missing or holds something else."""
        if self.config.eval.choices_every_steps:
            self._files = {
                name: read_own_examples(expand_path(path)) for name, path in self.config.eval.choices.items()
            }

    def due(self, step: int, *, last: bool) -> Parts:
        every = self.config.eval.choices_every_steps
        return WHOLE if every > 0 and (last or is_due(step, every)) else ()

    def build(self, tools: Tools) -> None:
        """Raises UserError where the tokenizer lacks a character, or of a file no example fits the model's context."""
        if not self.config.eval.choices_every_steps:
            return
        self._tools = tools
        count = self.config.eval.choices_examples
        for name, found in self._files.items():
            asked = evenly_spaced(found.examples, count)
            self._examples[name], self._questions[name] = make_questions(tools, name, asked)

    def measure(self, progress: Progress, parts: Parts) -> None:
        started, tools = time.monotonic(), self._tools
        record = {"kind": self.name, "step": progress.step, "tokens": progress.tokens}
        for name, examples in self._examples.items():
            found = answer(tools, name, examples, self._questions[name])
            record |= {
                f"{name}_acc_norm": found.accuracy.value,
                f"{name}_acc_norm_stderr": found.accuracy.standard_error,
                f"{name}_bits_per_byte": found.bits_per_byte,
                f"{name}_examples": len(examples),
                f"{name}_sha256": self._files[name].sha256,
            }
            tools.recorder.log(f"{name} at step {progress.step}: {found} ({len(examples)} examples)")
        record |= {"choices_seconds": time.monotonic() - started, **self.of_weights(), "time": time.time()}
        tools.recorder.note(record)


def curves_of(name: str) -> tuple[Curve, Curve]:
    """A file's accuracy, and the bits per byte of its right endings."""
    measured_on = ((f"{name}_sha256",), (f"{name}_examples",))
    accuracy = Curve(
        kind=Choices.name,
        figure=f"{name}_acc_norm",
        label=name,
        error=f"{name}_acc_norm_stderr",
        seconds="choices_seconds",
        measured_on=measured_on,
        higher_is_better=True,
    )
    bits = Curve(
        kind=Choices.name,
        figure=f"{name}_bits_per_byte",
        label=f"{name}, bits per byte of the right ending",
        measured_on=measured_on,
    )
    return accuracy, bits


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


def make_questions(
    tools: Tools, name: str, examples: Sequence[Example]
) -> tuple[tuple[Example, ...], tuple[Question, ...]]:
    """The examples with room in the model's context, and what is asked of each; the log has how many have none.

    Raises UserError where the tokenizer lacks a character, or no example has room.
    """
    from eval.hellaswag_task.metrics import plain_question
    from eval.hellaswag_task.multiple_choice import left_out_note, with_room

    questions = [plain_question(example, tools.tokenizer) for example in examples]
    size = tools.model.config.block_size
    numbers = with_room([(question,) for question in questions], size)
    if left_out := len(examples) - len(numbers):
        tools.recorder.log(f"{name}: {left_out_note(left_out, len(examples), size)}")
    return tuple(examples[number] for number in numbers), tuple(questions[number] for number in numbers)


def answer(tools: Tools, name: str, examples: Sequence[Example], questions: Sequence[Question]) -> Answers:
    """All ranks call, and all get the same. Args: name: of the questions, for people."""
    from eval.hellaswag_task.metrics import Accuracy, accuracy, choose_by_token, right_bits_per_byte
    from eval.hellaswag_task.multiple_choice import BatchSize, log_likelihoods, trunk_share

    batch = BatchSize.for_device(tools.ranks.device)
    share = trunk_share(questions, tools.model.config.block_size, tools.ranks, batch)
    size = f"{len(examples):,} questions"
    with tools.recorder.working(f"answering {name}", size, share, "context") as done:
        scores = log_likelihoods(tools.model, questions, tools.ranks, dtype=tools.dtype, batch_size=batch, done=done)
    result = Accuracy(math.nan, None)
    if not np.isnan(scores).any():
        result = accuracy(choose_by_token(scores, questions), examples)
    right = [example.label for example in examples]
    return Answers(result, right_bits_per_byte(scores, questions, right, tools.tokenizer.piece_bytes))
