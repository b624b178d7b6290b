"""Multiple-choice files of one's own between steps, over all ranks."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from common.curves import Curve
from common.paths import expand_path
from eval.hellaswag_task.examples import evenly_spaced
from eval.hellaswag_task.own_examples import OwnExamples, read_own_examples
from train.evaluations.answering import answer, make_questions
from train.evaluations.evaluation import WHOLE, Evaluation, Parts, Tools, is_due
from train.progress import Progress
from train.settings.sections import Config

if TYPE_CHECKING:
    from data_prep.token_sets.token_set import TokenSet


class Choices(Evaluation):
    """Measures, of each file of `eval.choices`, what HellaSwag's is measured by."""

    name, phase = "choices", "answering questions"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        asked = config.eval.choices if config.eval.choices_every_steps else {}
        self.curves = tuple(curve for name in asked for curve in curves_of(name))
        self._files: dict[str, OwnExamples] = {}

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
        """Raises UserError where the tokenizer lacks a character, or the model's context is too short for an ending."""
        if not self.config.eval.choices_every_steps:
            return
        self._tools = tools
        if not self._files:
            self.check(tools.tokens)
        count = self.config.eval.choices_examples
        self._examples = {name: evenly_spaced(found.examples, count) for name, found in self._files.items()}
        self._questions = {name: make_questions(tools, examples) for name, examples in self._examples.items()}

    def measure(self, progress: Progress, parts: Parts) -> None:
        started, tools = time.monotonic(), self._tools
        record = {"kind": self.name, "step": progress.step, "tokens": progress.tokens}
        for name, examples in self._examples.items():
            found = answer(tools, examples, self._questions[name])
            record |= {
                f"{name}_acc_norm": found.accuracy.value,
                f"{name}_acc_norm_stderr": found.accuracy.standard_error,
                f"{name}_bits_per_byte": found.bits_per_byte,
                f"{name}_examples": len(examples),
                f"{name}_sha256": self._files[name].sha256,
            }
            tools.recorder.log(f"{name} at step {progress.step}: {found} ({len(examples)} examples)")
        record |= {"choices_seconds": time.monotonic() - started, "time": time.time()}
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
