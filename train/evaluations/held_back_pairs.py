"""How well held-back pairs of answers are told apart, and what the record of each step's pairs is shown as."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from common.curves import Curve
from train.evaluations.evaluation import WHOLE, Evaluation, Parts, Tools, is_due
from train.progress import Progress

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

KIND, STEPS = "held_back_pairs", "preferences"
SHOWN = {  # figures of steps and their labels
    "margin": ("margin of pairs", True),
    "preference_accuracy": ("share of pairs told apart", True),
    "chosen_log_prob": ("log-probability of chosen answers", True),
    "rejected_log_prob": ("log-probability of rejected answers", False),
    "chosen_score": ("score of chosen answers", True),
    "rejected_score": ("score of rejected answers", False),
    "chosen_log_prob_change": ("change of chosen log-probability", True),
    "chosen_tokens": ("tokens of a chosen answer", True),
    "rejected_tokens": ("tokens of a rejected answer", False),
    "length_accuracy": ("share of pairs told apart by length", True),
}
MEASURED_ON = (("held_back_sha256",), ("held_back_pairs",), ("held_back_block_size",))
SURE = 2.0  # standard errors


class HeldBackPairs(Evaluation):
    """Loss, accuracy and log-probabilities of the first pairs of the validation split, as the objective has them."""

    name, phase = KIND, "comparing held-back pairs"
    at_start = True
    curves = (
        Curve(KIND, "held_back_loss", "loss of held-back pairs", seconds="held_back_seconds", measured_on=MEASURED_ON),
        Curve(
            KIND,
            "held_back_preference_accuracy",
            "held-back pairs told apart",
            error="held_back_accuracy_stderr",
            measured_on=MEASURED_ON,
            higher_is_better=True,
        ),
        Curve(KIND, "held_back_margin", "margin of held-back pairs", measured_on=MEASURED_ON, higher_is_better=True),
        *(Curve(STEPS, key, label, higher_is_better=better) for key, (label, better) in SHOWN.items()),
    )
    _has_warned = False

    def due(self, step: int, *, last: bool) -> Parts:
        return WHOLE if last or is_due(step, self.config.eval.every_steps) else ()

    def build(self, tools: Tools) -> None:
        assert tools.pairs is not None
        self._tools, self._pairs = tools, tools.pairs

    def measure(self, progress: Progress, parts: Parts) -> None:
        started, recorder = time.monotonic(), self._tools.recorder
        figures = self._figures()  # (P, 1 + figures)
        count = len(figures)
        means = dict(zip(self._pairs.names, figures.mean(axis=0).tolist(), strict=True))
        errors = figures.std(axis=0, ddof=1) / count**0.5 if count > 1 else figures[0] * 0.0
        error = dict(zip(self._pairs.names, errors.tolist(), strict=True))
        seconds = time.monotonic() - started
        record: dict[str, Any] = {
            "kind": KIND,
            "step": progress.step,
            "tokens": progress.tokens,
            **{f"held_back_{name}": value for name, value in means.items()},
            "held_back_accuracy_stderr": error["preference_accuracy"] if count > 1 else None,
            "held_back_pairs": count,
            "held_back_sha256": self._tools.tokens.manifest.val_sha256,
            "held_back_block_size": self.config.model.block_size,
            **self.of_weights(),
            "held_back_seconds": seconds,
            "time": time.time(),
        }
        recorder.note(record)
        recorder.log(
            f"{count:,} held-back pairs at step {progress.step}: loss {means['loss']:.4f}, "
            f"{means['preference_accuracy']:.1%} told apart ({means['length_accuracy']:.1%} by length only), margin "
            f"{means['margin']:.4f} ({seconds:.1f} s)"
        )
        change = means.get("chosen_log_prob_change", 0.0)  # a reward model has none
        if not self._has_warned and change < -SURE * error.get("chosen_log_prob_change", 0.0) < 0:
            self._has_warned = True
            recorder.log(
                f"WARNING: chosen answers have become less likely, by {-change:.2f} nats each, not only rejected ones: "
                "preference.likelihood, a larger preference.beta or a lower optim.lr work against it"
            )

    def _figures(self) -> npt.NDArray[np.float64]:
        return self._pairs.figures(self._tools.model, self._tools.ranks, self._tools.dtype)
