"""What becomes of a step whose loss or gradient norm is a spike, or not finite: recorded, skipped, a reason to stop or
to roll back.

Everything here follows from the losses, norms and verdicts of the steps so far, which are the same on all ranks, and
all of it is in every checkpoint: a resumed run judges as the undisturbed one does. docs/spikes.md explains the numbers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from train.errors import TooManySpikes
from train.optimization.step import Limits, StepResult, Verdict
from train.optimization.trend import Trend

RECORDED = "spikes"  # in a checkpoint's manifest
WINDOW = 128  # steps among which those that were left out are counted
SUSTAINED = 16  # steps in a row with a loss above its trend
OnSpike = Literal["record", "skip", "rollback"]


@dataclass(frozen=True)
class Sustained:
    """A spike that the run does not get over: a reason to roll back.

    first_step: of the spike. why: for people.
    """

    first_step: int
    why: str


@dataclass
class Spikes:
    """The judgement on a run's steps. Each rank has one; all are given the same.

    Attributes:
        on_spike, max_skips, max_rollbacks: options of section run.
        measured_in: what the level of losses and norms depends on; in another setting a trend means nothing.
        skips: steps skipped since the run's start, those that were rolled back included.
        skipped: those among the last `WINDOW` steps.
        raised: steps in a row, the last one included, with a loss above its trend; raised_from: the first of them.
        rollbacks: the facts of each, oldest first.
    """

    on_spike: OnSpike = "record"
    max_skips: int = 8
    max_rollbacks: int = 3
    measured_in: dict[str, Any] = field(default_factory=dict)
    trend: Trend = field(default_factory=Trend)
    skips: int = 0
    skipped: list[int] = field(default_factory=list)
    raised: int = 0
    raised_from: int = 0
    rollbacks: list[dict[str, Any]] = field(default_factory=list)

    @property
    def limits(self) -> Limits:
        """Beyond which the next step is skipped."""
        return Limits() if self.on_spike == "record" else self.trend.limits

    def take(self, step: int, result: StepResult) -> dict[str, Any] | None:
        """Judge a step that is done; return what is to be recorded of it, None of a normal one."""
        if result.verdict is Verdict.OVERFLOW:  # fp16 looks for its scale: no fault of the step
            return None
        limits, loss, norm = self.trend.limits, result.loss, result.grad_norm
        finite = math.isfinite(loss) and math.isfinite(norm)
        above = [
            name
            for name, value, limit in (("loss", loss, limits.loss), ("grad_norm", norm, limits.grad_norm))
            if value > limit
        ]
        if not math.isfinite(loss) or loss > self.trend.raised_above:
            self.raised_from = self.raised_from if self.raised else step
            self.raised += 1
        else:
            self.raised = self.raised_from = 0
        self.skipped = [earlier for earlier in self.skipped if earlier > step - WINDOW]
        if result.verdict.skips:
            self.skipped.append(step)
            self.skips += 1
        else:
            self.trend.accept(loss, norm)
        if finite and not above:
            return None
        return {
            "kind": "spike",
            "step": step,
            "spike": " and ".join(above) if finite else "nonfinite",
            "spike_loss": loss,
            "spike_grad_norm": norm,
            "loss_limit": limits.loss,
            "grad_norm_limit": limits.grad_norm,
            "skipped": result.verdict.skips,
            "skips": self.skips,
        }

    def sustained(self, step: int) -> Sustained | None:
        """Whether the run has to be rolled back after this step.

        Raises TooManySpikes where it has to stop instead.
        """
        found = None
        if len(self.skipped) > self.max_skips:
            count = f"{len(self.skipped)} of the last {WINDOW} steps were skipped"
            found = Sustained(self.skipped[0], f"{count}, more than run.max_skips {self.max_skips}")
        if self.on_spike != "rollback":
            if found is None:
                return None
            raise TooManySpikes(
                f"step {step}: {found.why}: lower optim.lr (--allow-change optim.lr), look at the sequences that "
                "metrics.jsonl names in records of kind spike, or resume with --run.on_spike rollback"
            )
        if self.raised >= SUSTAINED:
            found = Sustained(self.raised_from, f"the loss was above its trend for {self.raised} steps in a row")
        if found is not None and len(self.rollbacks) >= self.max_rollbacks:
            raise TooManySpikes(
                f"step {step}: {found.why}, after {len(self.rollbacks)} roll-backs, as many as run.max_rollbacks "
                "permits: lower optim.lr (--allow-change optim.lr), or branch from an earlier checkpoint"
            )
        return found

    def suspected(self) -> list[int]:
        """First steps of what may become a reason to roll back: the newest checkpoint before each is needed then."""
        if self.on_spike != "rollback":
            return []
        return [*([self.raised_from] if self.raised else []), *self.skipped[:1]]

    def facts(self) -> dict[str, Any]:
        """What a checkpoint records."""
        return {
            RECORDED: {
                "trend": [list(step) for step in self.trend.steps],
                "measured_in": self.measured_in,
                "skips": self.skips,
                "skipped": list(self.skipped),
                "raised": self.raised,
                "raised_from": self.raised_from,
                "rollbacks": list(self.rollbacks),
            }
        }

    def resume(self, manifest: Mapping[str, Any], *, own: bool) -> str:
        """Continue as a checkpoint records it; return a line for the log, "" for nothing to report.

        Older checkpoints record nothing, and imported ones neither: the trend starts empty.

        Args:
            own: the checkpoint is this run's; False for a branch from another's, which counts anew.
        """
        recorded = manifest.get(RECORDED)
        if recorded is None:
            return ""
        if own:
            self.skips, self.rollbacks = recorded["skips"], list(recorded["rollbacks"])
        if recorded["measured_in"] != self.measured_in:
            return "other data, another batch or warm-up than the checkpoint's: the trend of losses starts anew"
        self.look_back(recorded)
        return ""

    def look_back(self, recorded: Mapping[str, Any] | None) -> None:
        """Have the trend of a checkpoint, and what was suspected by then; None: of one that records none."""
        recorded = recorded if recorded and recorded["measured_in"] == self.measured_in else {}
        self.trend = Trend.of((loss, norm) for loss, norm in recorded.get("trend", []))
        self.skipped = list(recorded.get("skipped", []))
        self.raised, self.raised_from = recorded.get("raised", 0), recorded.get("raised_from", 0)


def describe(record: Mapping[str, Any]) -> str:
    """A record of kind spike in a line for people."""
    loss, norm = record["spike_loss"], record["spike_grad_norm"]
    figures = f"loss {loss:.4f} (limit {record['loss_limit']:.4f}), gradient norm {norm:.3g} "
    figures += f"(limit {record['grad_norm_limit']:.3g})"
    what = f"skipped ({record['skips']} so far)" if record["skipped"] else "recorded, and learned from"
    return f"WARNING: spike at step {record['step']}: {figures}: {what}"
