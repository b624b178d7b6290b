"""HellaSwag's score, by which runs are compared with published models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.curves import HELLASWAG
from common.metric_fields import is_step
from eval.reporting.references import HELLASWAG_EXAMPLES
from eval.reporting.run_data import RunData

PUBLISHED = HELLASWAG
PICTURE = "hellaswag.png"
HEADING, TILE = "HellaSwag and published models", "HellaSwag acc_norm"
NOT_MEASURED = "HellaSwag was not measured during training."


@dataclass(frozen=True)
class PublishedScore:
    """acc_norm, of report/hellaswag.json, or of training where that has a later one; None where there is none."""

    acc_norm: float | None
    examples: int | None
    step: int | None  # that it was measured at

    def as_json(self) -> dict[str, Any]:
        return {
            "hellaswag_acc_norm": self.acc_norm,
            "hellaswag_examples": self.examples,
            "hellaswag_step": self.step,
        }


def published_score(run: RunData) -> PublishedScore:
    """acc_norm, the number of examples and the step: of report/hellaswag.json, else of the last record of training.

    A run that was extended after that file was written has later records, and these count. Those of the text form,
    whose contexts are others, compare with nothing published and are left out.
    """
    last: dict[str, Any] = (run.table.of_kind(PUBLISHED.figure) or [{}])[-1]
    measured = run.score
    data = measured.get("data")
    if isinstance(data, dict) and data.get("form") == "text":
        measured = {}
    official = is_official(last)
    step = measured.get("step")
    superseded = isinstance(step, int) and official and step < last.get("step", step)
    if "acc_norm" in measured and "examples" in measured and not superseded:
        return PublishedScore(measured["acc_norm"], measured["examples"], step)
    if not official:
        return PublishedScore(None, None, None)
    return PublishedScore(PUBLISHED.value(last), _examples(last), last.get("step"))


def is_official(event: Mapping[str, Any]) -> bool:
    """Whether it was measured on the official data: the text form's contexts are others."""
    return event.get("hellaswag_official") is not False


def examples_of(runs: Sequence[RunData]) -> str:
    """On how many examples the runs were measured, as people read it."""
    found = {_examples(event) for run in runs for event in run.table.comparable(PUBLISHED.figure)}
    counts = sorted(count for count in found if count is not None)
    if not counts:
        return "unknown number of"
    text = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    return text if counts == [HELLASWAG_EXAMPLES] else f"{text} of {HELLASWAG_EXAMPLES:,}"


def describe_examples(event: Mapping[str, Any]) -> str:
    """On what one record's score was measured, as people read it."""
    return f"{_examples(event)} examples{'' if is_official(event) else ', text form'}"


def _examples(event: Mapping[str, Any]) -> int | None:
    count = event.get("hellaswag_examples")
    return count if is_step(count) else None
