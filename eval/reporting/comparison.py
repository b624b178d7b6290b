"""The table of published models with runs of this project beside them."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from common.plain_text import one_line
from common.progress import format_count
from eval.reporting.key_figures import key_figures
from eval.reporting.outcomes import Outcome
from eval.reporting.references import GPT2_VOCABULARY, GPT3, HELLASWAG_EXAMPLES, REFERENCES
from eval.reporting.run_data import RunData

HEADINGS = (
    "model",
    "parameters",
    "training data",
    "tokens",
    "FLOPs",
    "RoPE",
    "train loss",
    "val. loss",
    "bits/byte",
    "val. data",
    "HellaSwag",
)
NUMBERS = {1, 3, 4, 6, 7, 8, 10}  # columns that are set at the right
WHERE_KNOWN = {4, 8}  # which no published model has: columns only where a run has them


@dataclass(frozen=True)
class Row:
    """One model. Losses in nats per token, HellaSwag as acc_norm; None where there is no figure."""

    model: str
    ours: bool
    parameters: int | None
    data: str
    tokens: float
    rope: bool | None
    train_loss: float | None
    val_loss: float | None
    val_data: str | None
    hellaswag_acc_norm: float | None
    hellaswag_examples: int | None
    source: str
    hellaswag_step: int | None = None  # at which it was measured, where the run has continued since
    flops: float | None = None  # in training so far
    val_bits_per_byte: float | None = None
    causal: bool | None = None
    evaluations: dict[str, Outcome] = field(default_factory=dict)  # by figure, what no published model has

    def as_json(self) -> dict[str, Any]:
        """The figures by name; of other evaluations only where there are some."""
        found = asdict(self)
        if not self.evaluations:
            del found["evaluations"]
        return found

    def cells(self, figures: Iterable[str] = ()) -> list[str]:
        """As people read it, in the order of `HEADINGS`, then those figures of other evaluations."""
        digits = 3 if self.source == GPT3 else 4  # as published
        swag = "" if self.hellaswag_acc_norm is None else f"{self.hellaswag_acc_norm:.{digits}f}"
        if swag and self.hellaswag_examples not in (None, HELLASWAG_EXAMPLES):
            swag += f" (of {self.hellaswag_examples:,})"
        if swag and self.hellaswag_step is not None:
            swag += f" (step {self.hellaswag_step:,})"
        cells = [
            self.model,
            "" if self.parameters is None else format_count(self.parameters),
            self.data,
            format_count(self.tokens).replace(".0", ""),
            "" if self.flops is None else f"{self.flops:.3g}",
            {True: "yes", False: "no", None: ""}[self.rope],
            "" if self.train_loss is None else f"{self.train_loss:.4f}".removesuffix("00"),
            "" if self.val_loss is None else f"{self.val_loss:.4f}".removesuffix("00"),
            "" if self.val_bits_per_byte is None else f"{self.val_bits_per_byte:.4f}",
            self.val_data or "",
            swag,
            *(str(self.evaluations.get(figure, "")) for figure in figures),
        ]
        return list(map(one_line, cells))


@dataclass(frozen=True)
class Table:
    """Rows as people read them, with a column for every figure that any of them has."""

    headings: list[str]
    cells: list[list[str]]
    numbers: set[int]  # columns that are set at the right

    @classmethod
    def of(cls, rows: Sequence[Row]) -> "Table":
        more = {figure: end.label for row in rows for figure, end in row.evaluations.items()}
        headings = [*HEADINGS, *map(one_line, more.values())]
        cells, numbers = [row.cells(more) for row in rows], NUMBERS | {*range(len(HEADINGS), len(headings))}
        kept = [at for at in range(len(headings)) if at not in WHERE_KNOWN or any(line[at] for line in cells)]
        shown = [[line[at] for at in kept] for line in (headings, *cells)]
        return cls(shown[0], shown[1:], {place for place, at in enumerate(kept) if at in numbers})


def reference_rows() -> list[Row]:
    """The published models."""
    return [
        Row(
            model=reference.model,
            ours=False,
            parameters=reference.parameters,
            data=reference.data,
            tokens=reference.tokens,
            rope=reference.rope,
            train_loss=reference.train_loss,
            val_loss=reference.val_loss,
            val_data=reference.val_data,
            hellaswag_acc_norm=reference.hellaswag,
            hellaswag_examples=None if reference.hellaswag is None else HELLASWAG_EXAMPLES,
            source=reference.source,
        )
        for reference in REFERENCES
    ]


def run_row(run: RunData) -> Row:
    """A run, with what was measured in it and nothing else."""
    figures = key_figures(run)
    section = run.section("data")
    mix = section.get("mix")
    names = [str(s.get("name")) for s in mix if isinstance(s, dict)] if isinstance(mix, list) else []
    data = " + ".join(names) or Path(str(section.get("path", "unknown"))).name
    shortened = f" {figures.val_sha256[:8]}" if figures.val_sha256 else ""
    counted = f", {figures.val_tokens:,} tokens" if figures.val_tokens else ""
    vocabulary = run.model.vocab_size if run.model else GPT2_VOCABULARY
    unit = "" if vocabulary == GPT2_VOCABULARY else f", {vocabulary:,} symbols"
    return Row(
        model=f"{run.name} (not causal)" if run.leaks else run.name,
        ours=True,
        parameters=figures.parameters,
        data=data,
        tokens=figures.tokens,
        rope=None if run.model is None else run.model.position == "rope",
        train_loss=figures.train_loss,
        val_loss=figures.val_loss,
        val_data=None if figures.val_loss is None else f"{data}{shortened}{counted}{unit}",
        hellaswag_acc_norm=figures.score.acc_norm,
        hellaswag_examples=figures.score.examples,
        source=str(run.folder.path),
        hellaswag_step=figures.earlier_score_step,
        flops=figures.flops,
        val_bits_per_byte=figures.val_bits_per_byte,
        causal=figures.causal,
        evaluations=figures.evaluations,
    )


def rows_with(runs: Sequence[RunData]) -> list[Row]:
    """The published models, then the runs."""
    return reference_rows() + [run_row(run) for run in runs]


def as_text(rows: Sequence[Row]) -> str:
    """A table for the terminal, a line between others' models and these runs."""
    table = Table.of(rows)
    cells = [table.headings, *table.cells]
    widths = [max(len(line[column]) for line in cells) for column in range(len(table.headings))]

    def line(texts: list[str]) -> str:
        padded = [
            text.rjust(width) if column in table.numbers else text.ljust(width)
            for column, (text, width) in enumerate(zip(texts, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    rule = "─" * (sum(widths) + 2 * (len(widths) - 1))
    texts = [(line(texts), row.ours) for texts, row in zip(table.cells, rows, strict=True)]
    lines = [line(table.headings), rule, *(text for text, is_ours in texts if not is_ours)]
    ours = [text for text, is_ours in texts if is_ours]
    return "\n".join([*lines, rule, *ours] if ours else lines)


def as_markdown(rows: Sequence[Row]) -> str:
    """The table in Markdown, these runs in bold."""
    table = Table.of(rows)
    marks = ["---:" if column in table.numbers else "---" for column in range(len(table.headings))]
    escaped = [[cell.replace("|", "\\|") for cell in cells] for cells in (table.headings, *table.cells)]
    lines = ["| " + " | ".join(escaped[0]) + " |", "|" + "|".join(marks) + "|"]
    for row, cells in zip(rows, escaped[1:], strict=True):
        if row.ours:
            cells[0] = f"**{cells[0]}**"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
