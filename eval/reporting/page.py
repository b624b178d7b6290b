"""The report's page: one HTML file that needs nothing else, neither a network nor JavaScript."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from common.progress import format_count, format_duration
from eval.reporting import page_sections as sections
from eval.reporting.html_parts import table, text
from eval.reporting.key_figures import KeyFigures, differences, key_figures
from eval.reporting.published_score import HEADING, PICTURE, PUBLISHED, TILE
from eval.reporting.run_data import RunData, format_time
from eval.reporting.step_profiles import profile_tables
from eval.reporting.svg_chart import loss_chart


def page(runs: Sequence[RunData], pictures: dict[str, bytes], made: float) -> str:
    """The whole page.

    Args:
        pictures: PNGs by file name, in their order. made: when, in seconds since the epoch.
    """
    figures = [key_figures(run) for run in runs]
    title = ", ".join(run.name for run in runs)
    parts = [
        ("Key figures", "figures", _overview(runs, figures)),
        ("Loss", "loss", loss_chart(runs) + sections.loss_note(runs)),
        ("Learning rate, gradients, speed, memory", "steps", _show(pictures, "step-") + sections.steps_note(runs)),
        (HEADING, PUBLISHED.kind, _show(pictures, PICTURE) + sections.comparison(runs)),
        ("Other evaluations", "evaluations", _show(pictures, "evaluation-") + sections.evaluations(runs, figures)),
        ("What the layers do", "layers", _show(pictures, "layers-")),
        ("Batches that were not learned from", "bad-batches", sections.bad_batches(runs)),
        ("How long each rank computes", "ranks", _show(pictures, "ranks")),
        ("Where the time went", "time", _show(pictures, "time") + sections.time_table(figures)),
        ("Where the profiled steps went", "profile", _show(pictures, "profile") + profile_tables(runs)),
        ("Starts and restarts", "starts", sections.starts(runs)),
        ("Samples by step", "samples", sections.samples(runs)),
        ("Configuration", "configuration", _differences(runs) + sections.configurations(runs)),
        ("Where it came from, and how to make it again", "provenance", sections.provenance(runs)),
    ]
    links = "".join(f'<a href="#{key}">{text(heading)}</a> ' for heading, key, body in parts if body)
    body = "".join(f'<h2 id="{key}">{text(heading)}</h2>\n{body}\n' for heading, key, body in parts if body)
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{text(title)}: training report</title>\n'
        f"<style>\n{style}</style></head>\n"
        f'<body>\n<h1>{text(title)}</h1>\n<p class="soft">Training report, made {format_time(made)}</p>\n'
        f"<nav>{links}</nav>\n{body}</body></html>\n"
    )


def _show(pictures: dict[str, bytes], prefix: str) -> str:
    """Pictures whose file names start with this, inside the page."""
    chosen = {name: data for name, data in pictures.items() if name.startswith(prefix)}
    encoded = {name.removesuffix(".png"): base64.b64encode(data).decode() for name, data in chosen.items()}
    images = [f'<img alt="{text(name)}" src="data:image/png;base64,{data}">' for name, data in encoded.items()]
    return f'<div class="pictures">{"".join(images)}</div>\n' if images else ""


def _overview(runs: Sequence[RunData], figures: Sequence[KeyFigures]) -> str:
    left_out = "".join(f"<p><b>Left out:</b> {text(complaint)}</p>" for run in runs for complaint in run.complaints)
    if len(runs) == 1:
        return _state_line(runs[0]) + left_out + _tiles(figures[0])
    labelled = [dict(_labelled(figure)) for figure in figures]
    headings = ["", *(run.name for run in runs)]
    labels = list(dict.fromkeys(label for entry in labelled for label in entry))
    rows = [["status", *(run.liveness.word for run in runs)]]
    rows += [[label, *(entry.get(label, "–") for entry in labelled)] for label in labels]
    return left_out + table(headings, rows)


def _state_line(run: RunData) -> str:
    state, alive = run.state, run.liveness
    if not state:
        return '<p class="soft">The run\'s folder holds no state: it is a copy, or the run has just started.</p>'
    said = [f'<b class="{html.escape(alive.word)}">{text(alive.word)}</b>: {text(alive.why)}']
    said += [f"at step {state['step']:,}"] if isinstance(state.get("step"), int) else []
    said += [f"on {text(state['host'])}"] if state.get("host") else []
    said += [f"as Slurm job {text(state['job_id'])}"] if state.get("job_id") else []
    return f"<p>{', '.join(said)} ({text(state.get('time', 'time unknown'))})</p>"


def _tiles(figures: KeyFigures) -> str:
    tiles = [
        f'<div class="tile"><b>{text(value)}</b><span>{text(label)}</span></div>' for label, value in _labelled(figures)
    ]
    return f'<div class="tiles">{"".join(tiles)}</div>'


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


def _differences(runs: Sequence[RunData]) -> str:
    if len(runs) == 1:
        return ""
    rows = [[name, *map(str, values)] for name, values in differences(runs)]
    if not rows:
        return "<p>The configurations are the same.</p>"
    return "<h3>What differs</h3>" + table(["option", *(run.name for run in runs)], rows)
