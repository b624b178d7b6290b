"""Learning-rate schedules: a pure function of the step and of a few resolved steps."""

import math
from dataclasses import dataclass
from typing import Literal

Kind = Literal["cosine", "wsd", "constant"]


@dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rate moves over the run.

    Args:
        kind: cosine (Loshchilov & Hutter 2016, one half period after the warm-up), wsd (warm-up, stable, decay; Hu et
            al. 2024, MiniCPM), or constant (after the warm-up).
        warmup: linear warm-up, in steps, or as a fraction of the run below 1. It is fixed in steps at the run's first
            start: an extension or a branch does not move it.
        decay: wsd's linear decay at the end, in steps, or as a fraction of the run below 1.
        final_lr_fraction: the last learning rate as a fraction of the peak.
        rewarm: begin the schedule again at the step that is resumed from, in a branch or at the first start of the run
            that asks for it: a warm-up of schedule.warmup, then what follows up to run.max_steps. It is recorded:
            later starts don't warm up once more.
    """

    kind: Kind = "cosine"
    warmup: int | float = 0.01
    decay: int | float = 0.2
    final_lr_fraction: float = 0.1
    rewarm: bool = False

    def __post_init__(self) -> None:
        for name in ("warmup", "decay"):
            value = getattr(self, name)
            if value < 0 or (value >= 1 and value != int(value)):
                raise ValueError(f"schedule.{name} is {value}: give whole steps, or a fraction of the run below 1")
        if not 0 <= self.final_lr_fraction <= 1:
            raise ValueError(f"schedule.final_lr_fraction is {self.final_lr_fraction}: give a number from 0 to 1")


@dataclass(frozen=True)
class WarmUp:
    """The warm-up as a run's checkpoints record it: it does not follow run.max_steps.

    Attributes:
        start: steps done when it begins: 0, or the step that was resumed from with schedule.rewarm.
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
        decay_start: steps done when the rate begins to fall.
        end: the step that has the last rate, `final_lr_fraction` of the peak.
    """

    kind: Kind
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
    """The warm-up of a schedule that begins after `step` steps: 0 for a new run."""
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
