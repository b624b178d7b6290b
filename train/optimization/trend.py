"""What a normal step is: median and spread of the last accepted losses and gradient norms. docs/spikes.md derives the
numbers.
"""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from train.optimization.step import Limits

LENGTH = 128  # accepted steps that make a trend; with fewer there is none
OUTLIER = 15.0  # spreads of the loss above its median: a spike
NORM_OUTLIER = 20.0  # spreads of the gradient norm's logarithm, whose tail is heavier
RAISED = 3.0  # spreads above the median: a loss above its trend
OF_NORMAL = 1.4826  # a normal distribution's standard deviation over its median absolute deviation
LEAST_LOSS_SPREAD = 0.005  # of the median loss
LEAST_NORM_SPREAD = 0.1  # of the logarithm of the gradient norm
SMALLEST_NORM = 1e-30  # has a logarithm


@dataclass(frozen=True)
class Level:
    """Where values have been: (median, spread), the spread in terms of a normal distribution's standard deviation."""

    median: float
    spread: float

    @classmethod
    def of(cls, values: Iterable[float], least_spread: float) -> "Level":
        ordered = sorted(values)
        median = _middle(ordered)
        return cls(median, max(OF_NORMAL * _middle(sorted(abs(value - median) for value in ordered)), least_spread))

    def above(self, spreads: float) -> float:
        return self.median + spreads * self.spread


@dataclass
class Trend:
    """The last accepted steps, and what follows from them for the next one.

    Attributes:
        steps: (loss in nats, gradient norm) of each, oldest first; all finite.
    """

    steps: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=LENGTH))
    _limits: Limits | None = None  # of the next step, once they are asked for
    _raised_above: float = math.inf

    @classmethod
    def of(cls, steps: Iterable[tuple[float, float]]) -> "Trend":
        return cls(deque(steps, maxlen=LENGTH))

    def accept(self, loss: float, grad_norm: float) -> None:
        """Take in a step that was learned from. What is not finite is no part of a trend."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.steps.append((loss, grad_norm))
            self._limits = None

    @property
    def limits(self) -> Limits:
        """The largest loss and gradient norm that are no spike; infinite before there is a trend."""
        if self._limits is None:
            self._limits, self._raised_above = Limits(), math.inf
            if len(self.steps) == LENGTH:
                loss = Level.of((loss for loss, _ in self.steps), 0.0)
                loss = Level(loss.median, max(loss.spread, LEAST_LOSS_SPREAD * abs(loss.median)))
                norm = Level.of((math.log(max(norm, SMALLEST_NORM)) for _, norm in self.steps), LEAST_NORM_SPREAD)
                self._limits = Limits(loss.above(OUTLIER), math.exp(min(norm.above(NORM_OUTLIER), 700.0)))
                self._raised_above = loss.above(RAISED)
        return self._limits

    @property
    def raised_above(self) -> float:
        """The largest loss that is not above the trend."""
        _ = self.limits
        return self._raised_above


def _middle(ordered: list[float]) -> float:
    """The median of an ordered list."""
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
