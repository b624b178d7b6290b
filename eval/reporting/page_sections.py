"""The sections of a report's page that are more than pictures, as HTML; empty where the runs have nothing for them."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from common.bad_batch import layer_at_fault
from common.curves import VALIDATION, Curve, format_figure
from common.measured import describe_validation, measured_alike
from common.progress import format_duration
from common.run_files import reward_of
from common.time_spent import labels_of
from eval.reporting.comparison import Table, rows_with
from eval.reporting.html_parts import code, fill, folded, note, table, warning
from eval.reporting.key_figures import KeyFigures
from eval.reporting.published_score import NOT_MEASURED, PUBLISHED, describe_examples, published_score
from eval.reporting.references import NOTES
from eval.reporting.run_data import RunData, format_time, training_script

PRE_TRAINING = "language_modelling"  # what an older run, which names no objective, learned by
SHOWN_STEPS = 12  # of samples, spread over the run
SHOWN_STARTS = 60
SHOWN_CHARACTERS = 1_000


def loss_note(runs: Sequence[RunData]) -> Markup:
    """What the curves are, and on which data the validation losses were measured."""
    return note(
        "The dots are validation losses." if len(runs) > 1 else "",
        "Hours leave out the time between a stop and the next start.",
        "FLOPs are 6N + 12·layers·width·context a token (PaLM's convention), 4N where adapters leave N frozen.",
        *(warning(f"{run.name} is not causal: it sees what it predicts.") for run in runs if run.leaks),
        *_measured_on(runs),
        *(_left_out(run, VALIDATION, describe_validation) for run in runs),
    )


def _measured_on(runs: Sequence[RunData]) -> list[str]:
    """Sentences on what the validation losses were measured on that the curves show."""
    newest = [(run.name, validated[-1]) for run in runs if (validated := run.table.comparable("val_loss"))]
    told = [(name, event, describe_validation(event)) for name, event in newest]
    if not any(described for _, _, described in told):
        return []
    first = max((event for _, event, _ in told), key=lambda event: len(describe_validation(event)))
    if all(measured_alike(VALIDATION, event, first) for _, event, _ in told):
        return [f"Validation set: {describe_validation(first)}."]
    each = "; ".join(f"{name}: {described or 'not recorded'}" for name, _, described in told)
    return [warning("The validation sets are not the same: these validation losses can't be compared."), f"{each}."]


def _left_out(run: RunData, curve: Curve, describe: Callable[[dict[str, Any]], str]) -> str:
    """Which of a run's figures the curve (and the best one) leave out."""
    measured = run.table.of_kind(curve.figure)
    others = [event for event in measured if not measured_alike(curve, event, measured[-1])]
    if not others:
        return ""
    kinds = "; ".join(dict.fromkeys(describe(event) for event in others))
    steps = f"step {others[0]['step']:,}" + (f" to {others[-1]['step']:,}" if len(others) > 1 else "")
    return warning(f"{run.name}: left out what was measured on something else ({kinds}), {steps}.")


def steps_note(runs: Sequence[RunData]) -> Markup:
    known = any(event == event for run in runs for event in run.table.tail("mfu", 1))
    return note("" if known else "No MFU: the peak speed of this device is not known.")


def comparison(runs: Sequence[RunData]) -> Markup:
    """The ancestors' table with these runs above; their other evaluations have a section of their own.

    None of runs that learned after pre-training and have no score: nothing published is like them.
    """
    after = all(run.section("objective").get("kind", PRE_TRAINING) != PRE_TRAINING for run in runs)
    if after and all(published_score(run).acc_norm is None for run in runs):
        return Markup()
    rows = [replace(row, evaluations={}) for row in sorted(rows_with(runs), key=lambda row: not row.ours)]
    beside = Table.of(rows)
    ours = [index for index, row in enumerate(rows) if row.ours]
    measured = any(run.table.of_kind(PUBLISHED.figure) for run in runs)
    above = note("" if measured else NOT_MEASURED) + note(
        *(_left_out(run, PUBLISHED, describe_examples) for run in runs)
    )
    below = Markup().join(map(note, NOTES))
    return above + table(beside.headings, beside.cells, numbers=beside.numbers, marked=ours) + below


def sources_note(runs: Sequence[RunData]) -> Markup:
    """What the picture of a mix's sources shows."""
    if not any(run.table.losses_by_source() for run in runs):
        return Markup()
    return note("Lines: training, the mean of some steps; dotted: validation. Of each source of data.mix by itself.")


def evaluations(runs: Sequence[RunData], figures: Sequence[KeyFigures]) -> Markup:
    """Where the curves end that no published model has, and which is the best figure of each."""
    known = {curve.figure: curve for run in runs for curve in run.table.curves}
    names = dict.fromkeys(name for figure in figures for name in figure.evaluations)
    rows = []
    for curve in map(known.__getitem__, names):
        ends = [figure.evaluations.get(curve.figure) for figure in figures]
        better = "highest" if curve.higher_is_better else "lowest"
        last = ["–" if end is None else f"{end} (step {end.step:,})" for end in ends]
        best = ["–" if end is None else f"{format_figure(end.best)} (step {end.best_step:,})" for end in ends]
        rows += [[f"{curve.label}, last", *last], [f"{curve.label}, {better}", *best]]
    left_out = note(*(_left_out(run, known[name], known[name].describe) for name in names for run in runs))
    shown = table(["", *(run.name for run in runs)], rows, numbers=range(1, len(runs) + 1))
    return shown + left_out if rows else Markup()


def bad_batches(runs: Sequence[RunData]) -> Markup:
    """The worst sequence of each batch that was examined, and the layer where it shows."""
    rows = [
        [
            *([run.name] if len(runs) > 1 else []),
            f"{found['step']:,}",
            found["why"],
            f"{found['sequence']:,}",
            "NaN or inf" if found["loss"] is None else f"{found['loss']:.4g}",
            layer_at_fault(found["first"], found["activation_max"]),
        ]
        for run in runs
        for found in run.bad_batches
    ]
    headings = [*(["run"] if len(runs) > 1 else []), "step", "why", "worst sequence", "its loss", "layers"]
    return table(headings, rows) if rows else Markup()


def time_table(figures: Sequence[KeyFigures]) -> Markup:
    labels = labels_of(figure.seconds for figure in figures)
    spent = {part: [figure.seconds.parts.get(part, 0.0) for figure in figures] for part in labels}
    rows = [
        [
            labels[part],
            *(
                f"{format_duration(seconds)} ({seconds / max(figure.seconds.total, 1e-9):.1%})"
                for seconds, figure in zip(each, figures, strict=True)
            ),
        ]
        for part, each in spent.items()
        if max(each) >= 0.05
    ]
    rows.append(["from the first start to the last record", *(format_duration(f.seconds.total) for f in figures)])
    return table(["", *(figure.run for figure in figures)], rows, numbers=range(1, len(figures) + 1))


def starts(runs: Sequence[RunData]) -> Markup:
    """Every start: when, from which step, on how many ranks and where."""
    told = []
    for run in runs:
        lives = run.table.lives
        hosts = [_hosts(start) for start in run.starts]
        hosts = hosts if len(hosts) == len(lives) else [""] * len(lives)  # a start that never reached a step
        rows = []
        for index, life in enumerate(lives):
            before = lives[index - 1] if index else None
            down = format_duration(max(0.0, life.start - before.end)) if before else ""
            cells = [
                str(index + 1),
                format_time(life.start),
                f"{life.step:,}",
                str(life.world_size or ""),
                hosts[index],
            ]
            rows.append([*cells, format_duration(max(0.0, life.end - life.start)), down])
        shown = SHOWN_STARTS if len(rows) > SHOWN_STARTS else 0
        told.append((run.name, len(lives), run.table.lost, shown, rows[-SHOWN_STARTS:]))
    return fill("starts.html", runs=told)


def _hosts(start: dict[str, Any]) -> str:
    devices = list(dict.fromkeys(str(rank.get("gpu") or rank.get("cpu")) for rank in _ranks(start)))
    hosts = _host_names(start)
    return f"{', '.join(hosts)} ({', '.join(devices)})" if hosts else ""


def _host_names(start: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(str(rank.get("host")) for rank in _ranks(start)))


def _ranks(start: dict[str, Any]) -> list[dict[str, Any]]:
    ranks = start.get("ranks")
    return [rank for rank in ranks if isinstance(rank, dict)] if isinstance(ranks, list) else []


def samples(runs: Sequence[RunData]) -> Markup:
    """What the models generated, at steps spread over the run, the newest first; answers with their rewards."""
    told = []
    for run in runs:
        latest = {
            (sample["step"], str(sample.get("prompt"))): sample for sample in run.samples
        }  # a resume repeats some
        steps = sorted({step for step, _ in latest})
        if len(steps) > SHOWN_STEPS:
            last = len(steps) - 1
            steps = sorted({steps[round(index * last / (SHOWN_STEPS - 1))] for index in range(SHOWN_STEPS)})
        for position, step in enumerate(reversed(steps)):
            own = [sample for (at, _), sample in latest.items() if at == step]
            written = [(sample.get("prompt", ""), _shown(sample), reward_of(sample)) for sample in own]
            heading = f"{run.name}, step {step:,}" if len(runs) > 1 else f"step {step:,}"
            told.append((heading, position == 0, written))
    return fill("samples.html", steps=told) if told else Markup()


def _shown(sample: dict[str, Any]) -> str:
    content = str(sample.get("text", ""))
    return content if len(content) <= SHOWN_CHARACTERS else content[:SHOWN_CHARACTERS] + "…"


def configurations(runs: Sequence[RunData]) -> Markup:
    """Each run's whole configuration, to unfold."""
    dumped = [
        (run, yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True, width=110)) for run in runs if run.config
    ]
    return Markup().join(
        folded(f"{run.name}: config.yaml" if len(runs) > 1 else "the whole config.yaml", code(content))
        for run, content in dumped
    )


def provenance(runs: Sequence[RunData]) -> Markup:
    """Command, revision, versions and machines of each run's first start, and the commands that repeat it."""
    told = [(run.name, _origin(run), run.starts[0].get("diff") if run.starts else None, _again(run)) for run in runs]
    return fill("provenance.html", runs=told)


def _origin(run: RunData) -> list[list[str]]:
    """Rows of what is known of a run's starts; none where nothing is."""
    if not run.starts:
        return []
    first, last = run.starts[0], run.starts[-1]
    revisions = list(dict.fromkeys(str(start.get("revision")) for start in run.starts))
    longhauls = list(dict.fromkeys(str(start["version"]) for start in run.starts if start.get("version")))
    changed = any(start.get("diff") for start in run.starts)
    packages = last.get("packages")
    versions = (
        ", ".join(f"{name} {version}" for name, version in packages.items()) if isinstance(packages, dict) else ""
    )
    return [
        ["command", str(first.get("command", ""))],
        *([["Longhaul", ", then ".join(longhauls)]] if longhauls else []),
        ["git revision", ", then ".join(revisions) + (" with uncommitted changes, below" if changed else "")],
        ["first start", f"{first.get('time', '')} on {_hosts(first)}"],
        ["platform", f"Python {last.get('python', '')}, {last.get('platform', '')}, CUDA {last.get('cuda') or 'none'}"],
        ["packages", versions],
        ["folder", str(run.folder.path)],
    ]


def _again(run: RunData) -> str:
    """Commands that train the same run under another name, from the resolved configuration."""
    first = run.starts[0] if run.starts else {}
    lines = [f"git checkout {first['revision']}"] if first.get("revision") else []
    if first.get("diff"):
        lacks = first.get("diff_lacks")
        but = f", without {', '.join(map(str, lacks))}" if isinstance(lacks, list) and lacks else ""
        lines.append(f"git apply changes.patch   # the uncommitted changes, saved from above{but}")
    section = run.section("data")
    mix = section.get("mix")
    sets = [source.get("path") for source in mix if isinstance(source, dict)] if isinstance(mix, list) else []
    lines += [
        f"# the token set {data} must be there: python data_prep/verify.py {shlex.quote(str(data))}"
        for data in filter(None, sets or [section.get("path")])
    ]
    ranks, nodes = run.table.lives[0].world_size or 1, len(_host_names(first)) or 1
    launch = "python" if ranks == 1 else f"torchrun --standalone --nproc_per_node={ranks}"
    if nodes > 1 and ranks % nodes == 0:
        lines.append(f"# on each of {nodes} nodes, HOST being the first of them and K counting them from 0")
        launch = f"torchrun --nnodes={nodes} --nproc_per_node={ranks // nodes} --node_rank=K --master_addr=HOST"
    config = Path(run.folder.path) / run.folder.config.name
    again = shlex.quote(f"{run.folder.path.resolve().name}-again")
    branch = f" --resume {shlex.quote(str(first['resumed_from']))}" if first.get("resumed_from") else ""
    script = training_script(run.config, run.starts)
    lines.append(f"{launch} {script} --config {shlex.quote(str(config))}{branch} --run.name {again}")
    return "\n".join(lines)
