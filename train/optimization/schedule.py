"""Schedules of learning rate and weight decay: pure functions of the step and of a few resolved steps."""

import math
from dataclasses import dataclass

from train.settings.sections import DecayKind, ScheduleConfig, ScheduleKind


@dataclass(frozen=True)
class WarmUp:
    """The warm-up as a run's checkpoints record it: it does not follow run.max_steps.

    Attributes:
        start: steps done when it starts: 0, or the step that was resumed from with schedule.rewarm.
        steps: how long it takes.
    """

    start: int
    steps: int

    @property
    def end(self) -> int:
        """Steps done when it is over."""
        return self.start + self.steps


@dataclass(frozen=True)
class Course:
    """A schedule with every length resolved in steps.

    Attributes:
        peak: the rate at the end of the warm-up.
        decay_start: steps done when the rate starts to fall.
        end: the step that has the last rate, `final_lr_fraction` of the peak.
        weight_decay, final_weight_decay_fraction, independent_weight_decay: as in the configuration.
    """

    kind: ScheduleKind
    peak: float
    final_lr_fraction: float
    warm_up: WarmUp
    decay_start: int
    end: int
    weight_decay: DecayKind = "constant"
    final_weight_decay_fraction: float = 0.0
    independent_weight_decay: bool = False

    def rate(self, step: int) -> float:
        """The learning rate of optimizer step `step`, counted from 1.

        The warm-up reaches the peak at its last step; the decay reaches `final_lr_fraction` of it at step `end`.
        """
        done = step - self.warm_up.start
        assert 1 <= done, (step, self.warm_up)
        if done <= self.warm_up.steps:
            return self.peak * done / self.warm_up.steps
        if self.kind == "constant" or step <= self.decay_start:
            return self.peak
        progress = min(1.0, (step - self.decay_start) / max(1, self.end - self.decay_start))
        return self.peak * _fallen(self.kind, progress, self.final_lr_fraction)

    def decay_factor(self, step: int) -> float:
        """What the weight decay of optimizer step `step` is multiplied by, beside that step's learning rate.

        A step whose rate is 0 decays nothing, whatever is asked.
        """
        factor = 1.0
        if self.weight_decay != "constant":
            factor = _fallen(self.weight_decay, min(1.0, step / self.end), self.final_weight_decay_fraction)
        if self.independent_weight_decay:
            rate = self.rate(step)
            factor = factor * self.peak / rate if rate > 0 else 0.0
        return factor


def _fallen(kind: str, progress: float, final: float) -> float:
    """What is left of 1 that falls to `final`, by a half cosine or linearly, after a share of the way."""
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if kind == "cosine" else 1 - progress
    return final + (1 - final) * remaining


def in_steps(length: int | float, max_steps: int) -> int:
    """A length in steps; below 1 it is a fraction of the run."""
    return round(length * max_steps) if 0 < length < 1 else int(length)


def warm_up_from(step: int, config: ScheduleConfig, max_steps: int) -> WarmUp:
    """The warm-up of a schedule that starts after `step` steps: 0 for a new run."""
    return WarmUp(step, in_steps(config.warmup, max_steps))


def plan_course(config: ScheduleConfig, peak: float, max_steps: int, warm_up: WarmUp | None = None) -> Course:
    """Resolve a schedule that ends at `max_steps`.

    Args:
        warm_up: what the run's checkpoints record; None for a new run.
    """
    warm_up = warm_up or warm_up_from(0, config, max_steps)
    decay_start = {
        "cosine": warm_up.end,
        "wsd": max(warm_up.end, max_steps - in_steps(config.decay, max_steps)),
        "constant": max_steps,
    }[config.kind]
    own = (config.weight_decay, config.final_weight_decay_fraction, config.independent_weight_decay)
    return Course(config.kind, peak, config.final_lr_fraction, warm_up, decay_start, max_steps, *own)
