"""What is measured between steps and leaves the training curve untouched.

An evaluation is one class in one file, and one line in `train.evaluations.registry`. What it measures goes to
metrics.jsonl as a record with its `kind`; its `curves` describe that record to the report, the live view and the other
readers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from common.curves import BUILT_IN, Curve
from common.errors import UserError
from common.metrics_file import metrics_of_step, record_kind
from common.os_errors import refusal
from common.run_folder import RunFolder
from train.progress import Progress
from train.settings.sections import Config

if TYPE_CHECKING:  # a finished run is recognised without torch
    from data_prep.token_sets.token_set import TokenSet
    from data_prep.tokenization.tokenizer import Tokenizer
    from model.gpt import GPT
    from model.number_formats import Dtype
    from model.ranks import Ranks
    from train.batches.plan import BatchPlan
    from train.objectives.reference import HeldBack
    from train.objectives.reward_model import HeldBackScores
    from train.objectives.rollout import Sampler
    from train.run.recorder import Recorder

Parts = tuple[int, ...]  # which parts of an evaluation are due, by number: () is nothing
WHOLE: Parts = (0,)  # the parts of an evaluation that has none
Due = dict[str, Parts]  # by the evaluation's name: what is due after a step


@dataclass(frozen=True)
class Tools:
    """What evaluations are built from, once the model is there."""

    model: GPT
    tokens: TokenSet
    ranks: Ranks
    plan: BatchPlan
    dtype: Dtype
    recorder: Recorder
    untrained: bool  # the model has neither been trained nor read from a checkpoint
    pairs: HeldBack | HeldBackScores | None = None  # of a run that learns from pairs of answers
    sampler: Sampler | None = None  # of a run that samples answers

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The data's."""
        from data_prep.tokenization.loading import load_tokenizer

        return load_tokenizer(self.tokens.tokenizer_spec)


@dataclass(frozen=True)
class Written:
    """What a run has recorded of one step."""

    step: int
    records: list[dict[str, Any]]  # of metrics.jsonl
    folder: RunFolder  # for other files


class Evaluation:
    """One evaluation. It is made from the configuration only; what needs the model comes with `build`."""

    name = ""  # the kind of its records, and what a start finds it by
    phase = ""  # what a rank is doing, for its heartbeat
    before_save = False  # whether it comes before a save that is due at the same step, as that records the figure
    at_start = False  # whether it is also due before the first step
    curves: tuple[Curve, ...] = ()  # of the figures that its records hold

    def __init__(self, config: Config) -> None:
        self.config = config

    def check(self, tokens: TokenSet) -> None:
        """Raises UserError where it is asked for and impossible. Called before anything else is started."""

    def due(self, step: int, *, last: bool) -> Parts:
        """What is due after a step (1 or later). Args: last: whether it is the run's last."""
        raise NotImplementedError

    def missing(self, parts: Parts, written: Written) -> Parts:
        """The parts that were due at a step and are not recorded, as the run was stopped or killed before."""
        recorded = any(record_kind(record) == self.name for record in written.records)
        return () if recorded else parts

    def build(self, tools: Tools) -> None:
        """Prepare to measure. (All ranks call.) Raises UserError where the data or the model don't allow it."""

    def warm_up(self) -> None:
        """Go once through the shapes that training uses, too, unrecorded. (All ranks call.)"""

    def measure(self, progress: Progress, parts: Parts) -> None:
        """Measure and record. (All ranks call.)"""
        raise NotImplementedError

    def of_weights(self) -> dict[str, Any]:
        """What a record says of the weights that were measured: nothing of trained ones."""
        return {} if self.config.eval.weights == "trained" else {"weights": self.config.eval.weights}

    def forget(self) -> None:
        """The run has gone back: what was measured is of weights that are no more."""

    def facts(self) -> dict[str, Any]:
        """What a checkpoint's manifest records of it."""
        return {}


def described(evaluations: Iterable[Evaluation]) -> dict[str, Any]:
    """What the record of a start holds for readers: the curves that they don't know."""
    curves = [curve for evaluation in evaluations for curve in evaluation.curves if curve not in BUILT_IN]
    return {"curves": [curve.as_json() for curve in curves]} if curves else {}


def is_due(step: int, every: int) -> bool:
    """Whether a step is a multiple of `every`; 0 means never."""
    return every > 0 and step % every == 0


def due_after(step: int, evaluations: Iterable[Evaluation], *, last: bool) -> Due:
    """What is due after a step."""
    found = {evaluation.name: evaluation.due(step, last=last) for evaluation in evaluations}
    return {name: parts for name, parts in found.items() if parts}


def missing_after(step: int, evaluations: Iterable[Evaluation], folder: RunFolder, *, last: bool) -> Due:
    """What was due after the step that a run resumes from, and is not recorded.

    Cheap where nothing was due, and else reads no more than the end of metrics.jsonl and the samples.

    Raises UserError where these can't be read.
    """
    by_name = {evaluation.name: evaluation for evaluation in evaluations}
    due = due_after(step, by_name.values(), last=last)
    if not due:
        return due
    try:
        written = Written(step, metrics_of_step(folder.metrics, step), folder)
        found = {name: by_name[name].missing(parts, written) for name, parts in due.items()}
    except OSError as error:
        path = error.filename or folder.metrics
        raise UserError(refusal("read", error, path, otherwise="start the same command again")) from None
    return {name: parts for name, parts in found.items() if parts}
