"""The report's page: one HTML file that needs nothing else, neither a network nor JavaScript."""

from collections.abc import Sequence

from markupsafe import Markup

from common.progress import format_count, format_duration
from eval.reporting import page_sections as sections
from eval.reporting.drawing import Picture, show
from eval.reporting.html_parts import fill
from eval.reporting.key_figures import KeyFigures, differences, key_figures
from eval.reporting.published_score import HEADING, PICTURE, PUBLISHED, TILE
from eval.reporting.run_data import RunData, format_time
from eval.reporting.step_profiles import profile_tables
from eval.reporting.svg_chart import loss_chart

OBJECTIVES = {
    "sft": "answers of conversations (sft)",
    "dpo": "preferences (dpo)",
    "reward": "a reward model (reward)",
    "grpo": "rewards of answers (grpo)",
    "ppo": "rewards of answers (ppo)",
}


def page(runs: Sequence[RunData], pictures: dict[str, Picture], made: float) -> str:
    """The whole page.

    Args:
        pictures: by file name, in their order. made: when, in seconds since the epoch.
    """
    figures = [key_figures(run) for run in runs]
    parts = [
        ("Key figures", "figures", _overview(runs, figures)),
        ("Loss", "loss", loss_chart(runs) + sections.loss_note(runs)),
        ("Loss by source", "sources", show(pictures, "sources") + sections.sources_note(runs)),
        (
            "Learning rate, gradients, speed, memory",
            "steps",
            show(pictures, "step-") + sections.steps_note(runs),
        ),
        (HEADING, PUBLISHED.kind, show(pictures, PICTURE) + sections.comparison(runs)),
        (
            "Other evaluations",
            "evaluations",
            show(pictures, "evaluation-") + sections.evaluations(runs, figures),
        ),
        ("What the layers do", "layers", show(pictures, "layers-")),
        ("Batches that were not learned from", "bad-batches", sections.bad_batches(runs)),
        ("How long each rank computes", "ranks", show(pictures, "ranks")),
        ("Where the time went", "time", show(pictures, "time") + sections.time_table(figures)),
        ("Where the profiled steps went", "profile", show(pictures, "profile") + profile_tables(runs)),
        ("Starts and restarts", "starts", sections.starts(runs)),
        ("Samples by step", "samples", sections.samples(runs)),
        ("Configuration", "configuration", _differences(runs) + sections.configurations(runs)),
        ("Where it came from, and how to make it again", "provenance", sections.provenance(runs)),
    ]
    name = ", ".join(run.name for run in runs)
    return fill("report.html", name=name, made=format_time(made), sections=[part for part in parts if part[2]])


def _overview(runs: Sequence[RunData], figures: Sequence[KeyFigures]) -> Markup:
    labelled = [dict(_labelled(figure)) for figure in figures]
    labels = list(dict.fromkeys(label for entry in labelled for label in entry))
    rows = [["status", *(run.liveness.word for run in runs)]]
    rows += [[label, *(entry.get(label, "–") for entry in labelled)] for label in labels]
    return fill(
        "overview.html",
        alone=len(runs) == 1,
        state=runs[0].state,
        alive=runs[0].liveness,
        complaints=[complaint for run in runs for complaint in run.complaints],
        tiles=_labelled(figures[0]),
        headings=["", *(run.name for run in runs)],
        rows=rows,
    )


def _labelled(figures: KeyFigures) -> list[tuple[str, str]]:
    """(what it is, the figure as people read it) of all that the run records."""
    of = f" of {figures.max_steps:,}" if figures.max_steps else ""
    seconds, scored = figures.seconds, figures.earlier_score_step
    at = f" (step {scored:,})" if scored is not None else ""
    entries: list[tuple[str, str | None]] = [
        ("steps", f"{figures.step:,}{of}"),
        ("training tokens", format_count(figures.tokens)),
        ("parameters", None if figures.parameters is None else format_count(figures.parameters)),
        ("training FLOPs", None if figures.flops is None else f"{figures.flops:.3g}"),
        ("objective", OBJECTIVES.get(figures.objective or "")),
        ("optimizer", figures.optimizer),
        ("training loss, last 2 % of the steps", _number(figures.train_loss, ".4f")),
        ("validation loss, last", _number(figures.val_loss, ".4f")),
        ("causal", "no: it sees what it predicts" if figures.causal is False else None),
        ("perplexity", _number(figures.perplexity, ",.2f")),
        ("bits per byte of text", _number(figures.val_bits_per_byte, ".4f")),
        ("validation loss, best", _number(figures.best_val_loss, ".4f")),
        ("tokens validated on", None if figures.val_tokens is None else f"{figures.val_tokens:,}"),
        (TILE, _number(figures.score.acc_norm, ".4f", at)),
        (
            "tokens per second, median",
            None if figures.tokens_per_second is None else format_count(figures.tokens_per_second),
        ),
        ("MFU, median", _number(figures.mfu, ".1%")),
        ("peak memory of a process", _number(figures.memory_gib, ".2f", " GiB")),
        ("running", format_duration(seconds.total - seconds.stopped)),
        ("goodput, steps that count", _number(figures.goodput, ".1%")),
        ("restarts", str(figures.starts - 1)),
        ("steps skipped as spikes", str(figures.steps_skipped) if figures.steps_skipped else None),
        ("roll-backs", str(figures.rollbacks) if figures.rollbacks else None),
        *((f"plan: {entry.what}", str(entry).removeprefix(f"{entry.what}: ")) for entry in figures.planned),
    ]
    others = _others(figures, [label for label, _ in entries])
    return [(label, value) for label, value in entries if value is not None] + others


def _others(figures: KeyFigures, taken: list[str]) -> list[tuple[str, str]]:
    """Those of other evaluations. Their labels are a run's own: one that is taken has its figure's name beside it."""
    ends = figures.evaluations.items()
    taken = taken + [end.label for _, end in ends]
    return [(end.label if taken.count(end.label) == 1 else f"{end.label} ({name})", str(end)) for name, end in ends]


def _number(value: float | None, form: str, unit: str = "") -> str | None:
    return None if value is None else f"{value:{form}}{unit}"


def _differences(runs: Sequence[RunData]) -> Markup:
    if len(runs) == 1:
        return Markup()
    rows = [[name, *map(str, values)] for name, values in differences(runs)]
    return fill("differences.html", headings=["option", *(run.name for run in runs)], rows=rows)
