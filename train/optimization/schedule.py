"""Learning-rate schedules: a pure function of the step and of a few resolved steps."""

import math
from dataclasses import dataclass

from train.settings.sections import ScheduleConfig, ScheduleKind


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
    """

    kind: ScheduleKind
    peak: float
    final_lr_fraction: float
    warm_up: WarmUp
    decay_start: int
    end: int

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
        remaining = 0.5 * (1 + math.cos(math.pi * progress)) if self.kind == "cosine" else 1 - progress
        return self.peak * (self.final_lr_fraction + (1 - self.final_lr_fraction) * remaining)


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
    return Course(config.kind, peak, config.final_lr_fraction, warm_up, decay_start, max_steps)
