"""What readers of `metrics.jsonl` know of the figures that are measured between steps.

Those of validation and HellaSwag are built in. Every other evaluation's are described by the records of starts, under
`curves`: no reader has to be changed for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field as Limits

from common.json_file import BadJson, as_shape
from common.metric_fields import FIELDS, NUMBER, VALIDATED, by_source
from common.progress import format_count

Name = Annotated[str, Limits(pattern="^[a-z][a-z0-9_]{0,63}$")]  # of a record's key or kind; also part of files' names
Names = Annotated[tuple[Name, ...], Limits(max_length=16)]
Figure = Annotated[str, Limits(pattern=r"^[a-z][a-z0-9_]{0,63}(\.[A-Za-z0-9][A-Za-z0-9_.-]{0,31})?$")]
MOST_CURVES = 32  # of a run, beside those that are built in
SECONDS = "_seconds"  # how the key ends that holds how long a piece of work took, by which `liveness` knows it
# What else records hold or are, and what is reported beside evaluations, of which none may have these names.
_TAKEN = ("kind", "sequences", "curves")
RESERVED_KINDS = ("train", "start", "save", "save_failed", "hang", "samples", "id", "compute", "data", "starting",
                  "done_again", "hung", "other", "stopped", "total")  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """One figure, and what it takes to show it.

    Attributes:
        kind: of the records that hold it: the name of its evaluation.
        figure: the key that it stands under; of a mix's source the key, a dot, and the source's name.
        label: what people read.
        error: the key of its standard error.
        seconds: the key of how long the evaluation took, which ends in `_seconds`.
        measured_on: the keys of what figures have to share to compare. Of several in one entry the first that both
            records have decides.
    """

    kind: Name
    figure: Figure
    label: Annotated[str, Limits(min_length=1, max_length=60)]
    error: Name | None = None
    seconds: Name | None = None
    measured_on: Annotated[tuple[Names, ...], Limits(max_length=16)] = ()
    higher_is_better: bool = False

    def as_json(self) -> dict[str, Any]:
        """As the record of a start holds it."""
        return asdict(self) | {"measured_on": [list(names) for names in self.measured_on]}

    @property
    def keys(self) -> tuple[str, ...]:
        """Those that records have for this curve only."""
        return tuple(key for key in (self.figure, self.error, self.seconds) if key is not None)

    def value(self, record: Mapping[str, Any]) -> float | int | None:
        """The figure of a record; None where it has none, or one that is not a number."""
        return _number(record, self.figure)

    def error_of(self, record: Mapping[str, Any]) -> float | int | None:
        """The figure's standard error."""
        return _number(record, self.error)

    def describe(self, record: Mapping[str, Any]) -> str:
        """On what a record's figure was measured, as people read it."""
        found = [(name, record.get(name)) for names in self.measured_on for name in names]
        return ", ".join(f"{name} {str(value)[:40]}" for name, value in found if isinstance(value, int | float | str))


VALIDATION = Curve(
    kind="validation",
    figure="val_loss",
    label="validation",
    seconds="val_seconds",
    measured_on=(
        ("val_sha256", "data_identity"),  # of the validation split's bytes, of the whole token set
        ("val_tokens", "val_tokens_wanted"),
        ("val_block_size",),
        ("val_document_mask",),
    ),
)


def of_source(figure: str) -> Curve:
    """The validation loss of one source of a mix (`metric_fields.by_source`)."""
    label = f"validation, {figure.removeprefix(VALIDATED + '.')}"
    return Curve(VALIDATION.kind, figure, label, measured_on=VALIDATION.measured_on)


HELLASWAG = Curve(
    kind="hellaswag",
    figure="hellaswag_acc_norm",
    label="HellaSwag",
    error="hellaswag_acc_norm_stderr",
    seconds="hellaswag_seconds",
    measured_on=(("hellaswag_sha256",), ("hellaswag_examples",), ("hellaswag_official",)),
    higher_is_better=True,
)
MASKED = Curve(  # beside a validation's own loss, where eval.masked_loss asks for it
    kind=VALIDATION.kind,
    figure="val_loss_masked",
    label="validation, attention inside documents",
    measured_on=VALIDATION.measured_on,
)
BUILT_IN = (VALIDATION, HELLASWAG, MASKED)


def read_curve(value: Any) -> Curve:
    """A curve as a start describes it. Raises BadJson for what is none, and for one that can't be shown."""
    curve = as_shape(value, Curve)
    if not curve.label.isprintable():
        raise BadJson("label: it holds control characters")
    if curve.kind in RESERVED_KINDS:
        raise BadJson(f"kind: {curve.kind} is the name of something else")
    built_in = {key for known in BUILT_IN for key in known.keys}
    for role, key in (("figure", curve.figure), ("error", curve.error), ("seconds", curve.seconds)):
        if key in FIELDS or key in built_in or key in _TAKEN:
            raise BadJson(f"{role}: {key} is the name of something else")
    if curve.seconds is not None and not curve.seconds.endswith(SECONDS):
        raise BadJson(f"seconds: {curve.seconds} does not end in {SECONDS}")
    return curve


class KnownCurves:
    """The curves of one run: those that are built in, and what its starts describe.

    If several starts describe the same figure, the last one holds for the whole run.

    Attributes:
        complaint: the first description that was not taken, and why; empty where all were.
    """

    def __init__(self) -> None:
        self._by_figure = {curve.figure: curve for curve in BUILT_IN}
        self.complaint = ""

    @classmethod
    def of(cls, records: Iterable[Mapping[str, Any]]) -> KnownCurves:
        """What the starts among a run's records describe."""
        known = cls()
        for record in records:
            known.learn(record)
        return known

    def __iter__(self) -> Iterator[Curve]:
        return iter(self._by_figure.values())

    def get(self, figure: str) -> Curve | None:
        """The curve of a figure; None for one that nothing describes."""
        return self._by_figure.get(figure)

    @property
    def kinds(self) -> set[str]:
        """The kinds of the records that hold the figures."""
        return {curve.kind for curve in self}

    @property
    def seconds(self) -> dict[str, str]:
        """By the keys of how long evaluations took: the kinds of their records."""
        return {curve.seconds: curve.kind for curve in self if curve.seconds is not None}

    def complaint_about(self, path: Path) -> str:
        """The same with the file's name, as people read it."""
        return f"{path} describes a figure that can't be shown ({self.complaint})" if self.complaint else ""

    def learn(self, record: Mapping[str, Any]) -> None:
        """Take in what a record describes, if it is that of a start, and of which sources a validation has losses."""
        for figure in by_source(record, VALIDATED) if VALIDATED in record else ():
            self._by_figure.setdefault(figure, of_source(figure))
        if record.get("kind") != "start" or "curves" not in record:
            return
        described = record["curves"]
        if not isinstance(described, list):
            self._complain("curves: it is not a list")
            return
        for number, value in enumerate(described[:MOST_CURVES]):
            try:
                curve = read_curve(value)
            except BadJson as error:
                self._complain(f"curves.{number}: {error}")
                continue
            others = [figure for figure in self._by_figure if not figure.startswith(f"{VALIDATED}.")]
            if curve.figure in self._by_figure or len(others) < MOST_CURVES + len(BUILT_IN):
                self._by_figure[curve.figure] = curve
            else:
                self._complain(f"curves.{number}: there are more than {MOST_CURVES}")
        if len(described) > MOST_CURVES:
            self._complain(f"curves: there are more than {MOST_CURVES}")

    def _complain(self, why: str) -> None:
        self.complaint = self.complaint or why


def _number(record: Mapping[str, Any], key: str | None) -> float | int | None:
    value: Any = None if key is None else record.get(key)
    return value if NUMBER.has(value) else None


def format_figure(value: float) -> str:
    """A figure as people read it: a count as it is, thousands as whole ones, others with four decimals or digits."""
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < 10**9 else format_count(value)
    if 1e3 <= abs(value) < 1e6:
        return f"{value:,.0f}"
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e6 else f"{value:.4g}"
