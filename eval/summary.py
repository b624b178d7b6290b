"""Print a run's results: loss compared with that of only token frequencies, speed, samples, where everything is.

    python eval/summary.py runs/demo --require-margin 1.0

The unigram entropy is that of the validation split's own token frequencies: the lowest loss that any model without
context can reach there. With --require-margin the exit status is 1 unless the model is that much better.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.early_end import end_in_one_line

    sys.excepthook = end_in_one_line

from common.checkpoint_files import list_checkpoints
from common.command_line import CommandParser
from common.curves import KnownCurves
from common.errors import UserError, exit_on_user_error
from common.json_file import Count
from common.liveness import Liveness, Verdict, look_at
from common.measured import NOT_CAUSAL
from common.metrics_file import holding, read_records, record_kind
from common.metrics_table import MetricsTable
from common.plain_text import one_line
from common.planned import Beside, planned_beside
from common.progress import format_count, format_duration
from common.publish import write_json_output
from common.run_files import (
    leniently,
    read_configuration,
    read_configuration_as,
    read_samples,
    read_starts,
    reward_of,
    unreadable,
)
from common.run_folder import RunFolder
from common.time_spent import time_spent
from eval.reporting.outcomes import Outcome, outcomes
from eval.reporting.run_data import flops_per_token_of, training_script
from eval.reporting.validated import DataPart, Validated, last_validation
from eval.shared.arguments import add_json

SHOWN_CHARACTERS = 300  # of a sample


class ObjectivePart(TypedDict):
    kind: str


class RunPart(TypedDict):
    max_steps: Count


class ModelPart(TypedDict):
    n_embd: Count


class ConfigPart(TypedDict):
    """The parts of a run's configuration that a summary needs."""

    data: DataPart
    run: RunPart
    model: ModelPart
    objective: NotRequired[ObjectivePart]


@dataclass(frozen=True)
class Summary:
    """A run's results. Losses in nats per token."""

    run: str
    status: str  # the status that the run recorded
    alive: Verdict  # whether it makes progress, as far as can be seen from here
    why: str  # in a few words
    step: int
    max_steps: int
    n_embd: int
    tokens: int  # that the model has learned from
    run_tokens: int  # of these in this run: a branch starts with another run's
    flops: float | None  # in training so far
    tokens_per_second: float  # median over steps
    training_seconds: float  # in steps; without validation, saving and pauses
    evaluations: dict[str, Outcome]  # by figure, what else was measured between steps
    planned: list[Beside]  # what the newest start planned, beside what came of it
    left_out: str  # of the record, and why; empty where nothing was
    objective: str
    validated: Validated | None  # None where the objective has another measure, which is among the evaluations

    def as_json(self) -> dict[str, Any]:
        """The figures by name; of other evaluations only where there are some."""
        found = asdict(self)
        found |= found.pop("validated") or {}
        del found["left_out"]
        if not found.get("of_answers"):
            found.pop("of_answers", None)
        if not self.evaluations:
            del found["evaluations"]
        return found


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser("Print a run's results.")
    parser.add_argument("run", type=Path, help="folder of the run, such as runs/demo; running or done")
    parser.add_argument(
        "--require-margin",
        type=float,
        metavar="NATS",
        help="exit with 1 unless the last validation loss is this far below the unigram entropy; not asked of a run "
        "that was stopped before its last step",
    )
    add_json(parser)
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    folder = RunFolder(arguments.run)
    summary = summarise(folder)
    print_figures(summary)
    print_samples(folder)
    print_places(folder)
    print_next(folder, summary)
    if arguments.json:
        write_json_output(arguments.json, summary.as_json() | {"required_margin": arguments.require_margin})
    if arguments.require_margin is not None and summary.status == "preempted":
        print(f"\nThe margin is not asked for: the run was stopped before its last step, {summary.max_steps:,}.")
    elif arguments.require_margin is not None:
        if summary.validated is None:
            raise UserError(
                f"a run of --objective {summary.objective} has no validation loss: leave --require-margin out"
            )
        if (margin := summary.validated.margin) < arguments.require_margin:
            print(f"\nThe margin of {margin:.3f} nats is under the required {arguments.require_margin}.")
            return 1
    return 0


def summarise(folder: RunFolder) -> Summary:
    """Read a run's figures. Raises UserError where there is no run, or it has not reached a validation yet."""
    if not os.path.lexists(folder.metrics):
        raise UserError(f"{folder.path} is not a run's folder: it has no {folder.metrics.name}")
    try:
        written = read_records(folder.metrics)
    except OSError as error:
        raise UserError(unreadable(folder.metrics, error)) from None
    records, known = holding(written), KnownCurves.of(written)
    train = [record for record in records if record_kind(record) == "train"]
    config, others = read_configuration_as(folder, ConfigPart), outcomes(known, records)
    validated = last_validation(folder, records, config["data"])
    if not train or (validated is None and not others):
        raise UserError(
            f"{folder.metrics} holds no training step with a validation after it: try again when the run has reached "
            "one"
        )
    alive = look_at(folder, time.time())
    return Summary(
        run=str(folder.path),
        status=alive.status,
        alive=alive.verdict,
        why=alive.why,
        step=train[-1]["step"],
        max_steps=config["run"]["max_steps"],
        n_embd=config["model"]["n_embd"],
        tokens=max(_numbers(train, "tokens")[-1:], default=0),
        run_tokens=round(
            sum((record.get("tokens_per_second") or 0) * (record.get("step_seconds") or 0) for record in train)
        ),
        flops=_flops(folder, train),
        tokens_per_second=statistics.median(_numbers(train, "tokens_per_second") or [0.0]),
        training_seconds=sum(_numbers(train, "step_seconds")),
        evaluations=others,
        planned=_planned(folder, records, done=train[-1]["step"] == config["run"]["max_steps"]),
        left_out=known.complaint_about(folder.metrics),
        objective=config.get("objective", {}).get("kind", "language_modelling"),
        validated=validated,
    )


def _planned(folder: RunFolder, records: Sequence[dict[str, Any]], *, done: bool) -> list[Beside]:
    table = MetricsTable(folder.metrics)
    table.update()
    spent = time_spent(table)
    speeds, memory = (_numbers(records, key) for key in ("tokens_per_second", "memory_gib"))
    real = {
        "planned_memory_gib": max(memory, default=None),
        "planned_tokens_per_second": statistics.median(speeds) if speeds else None,
        "planned_hours": (spent.total - spent.stopped) / 3600 if done else None,
    }
    return planned_beside(table.planned, real)


def _numbers(records: Sequence[dict[str, Any]], key: str) -> list[Any]:
    """What the records hold under a key, in their order; the steps of older records, and damaged ones, may lack it."""
    return [record[key] for record in records if record.get(key) is not None]


def _flops(folder: RunFolder, train: Sequence[dict[str, Any]]) -> float | None:
    """By the closed form, as runs record it."""
    per_token, tokens = flops_per_token_of(read_configuration(folder)), _numbers(train, "tokens")
    return float(tokens[-1]) * per_token if per_token is not None and tokens else None


def print_figures(summary: Summary) -> None:
    alive = Liveness(summary.alive, summary.why, summary.status)
    standing = alive.word if alive.verdict == "ended" else str(alive)
    print(f"{one_line(summary.run)}: {one_line(standing)}, step {summary.step:,} of {summary.max_steps:,}")
    if summary.validated is not None:
        print_validation(summary.validated, summary.step)
    for end in summary.evaluations.values():
        print(one_line(f"  {end.label:16}  {end}{'' if end.step == summary.step else f' (at step {end.step:,})'}"))
    flops = "" if summary.flops is None else f", {summary.flops:.3g} FLOPs"
    print(
        f"  training          {format_count(summary.run_tokens)} tokens in {format_duration(summary.training_seconds)},"
        f" {format_count(summary.tokens_per_second)} tokens/s{flops}"
    )
    for entry in summary.planned:
        print(f"  plan              {entry}")
    if summary.left_out:
        print(one_line(f"  left out          {summary.left_out}"))


def print_validation(last: Validated, step: int) -> None:
    latest = "" if last.val_step == step else f" (at step {last.val_step:,})"
    bits = "" if last.val_bits_per_byte is None else f", {last.val_bits_per_byte:.3f} bits per byte of text"
    print(f"  validation loss   {last.val_loss:.3f} nats per token, perplexity {last.perplexity:,.1f}{bits}{latest}")
    if last.causal is False:
        print(f"  {NOT_CAUSAL}")
    what = "tokens of answers" if last.of_answers else "tokens"
    first = "" if last.val_tokens is None else f"the first {last.val_tokens:,} {what} of "
    print(f"  validation set    {first}sha256 {last.val_sha256}")
    print(f"  unigram entropy   {last.unigram_entropy:.3f} nats per token: what token frequencies alone can reach")
    print(f"  margin            {last.margin:.3f} nats")


def print_samples(folder: RunFolder) -> None:
    complaints: list[str] = []
    samples = leniently(lambda: read_samples(folder), complaints) or []
    for complaint in complaints:
        print(f"\nleft out: {complaint}")
    if not samples:
        return
    step = samples[-1]["step"]
    print(f"\nWhat it generated after step {step:,} (prompt│continuation):")
    for sample in samples:
        if sample["step"] == step:
            text = json.dumps(sample.get("text") or "", ensure_ascii=False)[1:-1]
            shown = f"{text[:SHOWN_CHARACTERS]}{'…' if len(text) > SHOWN_CHARACTERS else ''}"
            worth = f" (reward {reward})" if (reward := reward_of(sample)) else ""
            print(one_line(f"  {sample.get('prompt') or ''}│{shown}{worth}"))


def print_places(folder: RunFolder) -> None:
    places = [
        (folder.report / "report.html", "everything as a page for the browser"),
        (folder.report / "loss.png", "loss and learning rate as a picture"),
        (folder.metrics, "every step's figures"),
        (folder.samples, "what the model generated along the way"),
        (folder.config, "the whole configuration"),
        (folder.provenance, "command, versions, machine"),
        *((path, "newest checkpoint") for _, path in list_checkpoints(folder.checkpoints)[:1]),
    ]
    print("\nWhere everything is:")
    width = max(len(one_line(str(path))) for path, _ in places)
    for path, what in places:
        if os.path.exists(path):  # False for what one may not see, too
            print(f"  {one_line(str(path)):{width}}  {what}")


def print_next(folder: RunFolder, summary: Summary) -> None:
    config = read_configuration(folder)
    starts = leniently(lambda: read_starts(folder.provenance), []) or []
    path, file = one_line(shlex.quote(str(folder.path))), shlex.quote(str(folder.config))
    train = one_line(f".venv/bin/python {training_script(config, starts)} --config {file}")
    print("\nWhat to try next:")
    if summary.status == "preempted":
        print(f"  {train}   # resumes it")
    print(f"  {train} --run.name longer --run.max_steps {2 * summary.max_steps}")
    if "lora" not in config:  # a fine-tuning's model is its base's
        print(f"  {train} --run.name wider --model.n_embd {2 * summary.n_embd}")
    if summary.objective == "reward":
        print(f"  .venv/bin/python eval/reward.py {path} FILE   # score conversations")
    elif summary.objective != "language_modelling":
        print(f"  .venv/bin/python eval/chat.py {path}      # talk to it")
    print(f"  .venv/bin/python eval/report.py {path}   # a page for the browser, also while a run is going")
    print(f"  .venv/bin/python eval/watch.py {path}    # the same in the terminal, live")


if __name__ == "__main__":
    exit_on_user_error(main)
