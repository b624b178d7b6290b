"""The figures of a run that its curves end in."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from common.planned import Beside, planned_beside
from common.time_spent import TimeSpent, time_spent
from eval.reporting.outcomes import Outcome, outcomes
from eval.reporting.published_score import PUBLISHED, PublishedScore, published_score
from eval.reporting.run_data import RunData

LAST_FRACTION = 0.02  # of the steps, over which the final training loss is the mean


@dataclass(frozen=True)
class KeyFigures:
    """Losses in nats per token, times in seconds; None where the run does not record them."""

    run: str
    status: str  # the status that the run recorded
    step: int
    max_steps: int | None
    tokens: int
    parameters: int | None
    flops: float | None
    objective: str | None  # that a run records
    optimizer: str | None  # and whether each rank kept a part of its state
    train_loss: float | None  # mean over the last steps
    train_loss_steps: int  # how many
    val_loss: float | None  # the last one
    val_step: int | None
    val_bits_per_byte: float | None  # of the last validation, over the targets' text; older runs record none
    causal: bool | None  # whether no prediction depends on later tokens: else its losses mean nothing
    best_val_loss: float | None
    best_val_step: int | None
    val_sha256: str | None  # what both were measured on
    val_tokens: int | None
    validations_left_out: int  # earlier ones, measured on something else
    score: PublishedScore
    evaluations: dict[str, Outcome]  # by figure, of curves that no published model has
    tokens_per_second: float | None  # median over steps
    mfu: float | None  # median over steps
    memory_gib: float | None  # largest
    starts: int
    steps_done_again: int
    steps_skipped: int  # as spikes, those that were rolled back included
    rollbacks: int
    goodput: float | None  # steps that count over the time between its starts and ends
    seconds: TimeSpent
    planned: list[Beside]  # what the newest start planned, beside what came of it

    @property
    def earlier_score_step(self) -> int | None:
        """The step of the score where the run has continued since."""
        return None if self.score.step == self.step else self.score.step

    @property
    def perplexity(self) -> float | None:
        return None if self.val_loss is None else math.exp(min(self.val_loss, 700.0))

    def as_json(self) -> dict[str, Any]:
        """The run's figures by name; of other evaluations only where it has some."""
        found: dict[str, Any] = {}
        for name, value in (asdict(self) | {"seconds": self.seconds.as_json()}).items():
            found |= self.score.as_json() if name == "score" else {name: value}
        if not self.evaluations:
            del found["evaluations"]
        return found | {"perplexity": self.perplexity}


def key_figures(run: RunData) -> KeyFigures:
    """The key figures of a run so far."""
    table = run.table
    step, tokens = run.newest("step"), run.newest("tokens")
    last_steps = max(1, round(len(table) * LAST_FRACTION))
    comparable = table.comparable("val_loss")
    validations = [event for event in comparable if event["val_loss"] is not None]
    best = min(validations, key=lambda event: float(event["val_loss"]), default={})
    last = validations[-1] if validations else {}
    spent = time_spent(table)
    return KeyFigures(
        run=run.name,
        status=run.status,
        step=step,
        max_steps=run.max_steps,
        tokens=tokens,
        parameters=run.parameters,
        objective=run.section("objective").get("kind"),
        optimizer=describe_optimizer(run.section("optim")),
        flops=float(tokens) * run.flops_per_token if run.flops_per_token else None,
        train_loss=_over(np.mean, run, "loss", last_steps),
        train_loss_steps=last_steps,
        val_loss=last.get("val_loss"),
        val_step=last.get("step"),
        val_bits_per_byte=last.get("val_bits_per_byte"),
        causal=run.causal,
        best_val_loss=best.get("val_loss"),
        best_val_step=best.get("step"),
        val_sha256=last.get("val_sha256"),
        val_tokens=last.get("val_tokens"),
        validations_left_out=len(table.of_kind("val_loss")) - len(comparable),
        score=published_score(run),
        evaluations=outcomes((curve for curve in table.curves if curve is not PUBLISHED), table.events),
        tokens_per_second=_over(np.median, run, "tokens_per_second"),
        mfu=_over(np.median, run, "mfu"),
        memory_gib=_over(np.max, run, "memory_gib"),
        starts=len(table.lives),
        steps_done_again=table.lost.steps,
        steps_skipped=table.skips,
        rollbacks=len(table.rollbacks),
        goodput=spent.goodput,
        seconds=spent,
        planned=planned_beside(
            table.planned,
            {
                "planned_memory_gib": _over(np.max, run, "memory_gib"),
                "planned_tokens_per_second": _over(np.median, run, "tokens_per_second"),
                "planned_hours": (spent.total - spent.stopped) / 3600 if step == run.max_steps else None,
            },
        ),
    )


def describe_optimizer(section: Mapping[str, Any]) -> str | None:
    """Of a resolved configuration; versions before 0.2.0 had AdamW only."""
    if not section:
        return None
    sharded = ", sharded" if section.get("shard") is True else ""
    return f"{section.get('kind', 'adamw')}{sharded}"


def _over(reduce: Any, run: RunData, key: str, last: int | None = None) -> float | None:
    """A reduction over a column's finite values, or None where there are none."""
    values = run.table.column(key) if last is None else run.table.tail(key, last)
    values = values[np.isfinite(values)]
    return float(reduce(values)) if len(values) else None


def differences(runs: Sequence[RunData]) -> list[tuple[str, list[Any]]]:
    """(option, its value in each run) of every configuration option that is not the same in all runs."""
    flat = [flatten(run.config) for run in runs]
    names = sorted(set().union(*flat))
    rows = [(name, [values.get(name, "–") for values in flat]) for name in names]
    return [(name, values) for name, values in rows if any(value != values[0] for value in values)]


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
