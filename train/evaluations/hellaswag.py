"""HellaSwag on a fixed subset between steps, over all ranks."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from common.curves import HELLASWAG, Curve
from common.paths import expand_path
from eval.hellaswag_task.examples import evenly_spaced, read_hellaswag, require_hellaswag
from train.evaluations.answering import answer, make_questions
from train.evaluations.evaluation import WHOLE, Evaluation, Parts, Tools, is_due
from train.progress import Progress
from train.settings.sections import Config

if TYPE_CHECKING:
    from data_prep.token_sets.token_set import TokenSet


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
        """Raises UserError where the file holds something else, or the model's context is too short for an ending."""
        config = self.config.eval
        if not config.hellaswag_every_steps:
            return
        data = read_hellaswag(self._path())
        self._tools, self._data = tools, data
        self._examples = evenly_spaced(data.examples, config.hellaswag_examples)
        self._questions = make_questions(tools, self._examples)

    def measure(self, progress: Progress, parts: Parts) -> None:
        """Answer and record; scores that are NaN, whose largest means nothing, as null."""
        started, tools = time.monotonic(), self._tools
        found = answer(tools, self._examples, self._questions)
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
