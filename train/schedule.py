"""Learning-rate schedules: a pure function of the step, so that nothing about it needs saving."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rate moves over the run.

    Args:
        kind: cosine (Loshchilov & Hutter 2016, one half period after the warm-up), wsd (warm-up, stable, decay; Hu et
            al. 2024, MiniCPM), or constant (after the warm-up).
        warmup: linear warm-up, in steps, or as a fraction of the run below 1.
        decay: wsd's linear decay at the end, in steps, or as a fraction of the run below 1.
        final_lr_fraction: the last learning rate as a fraction of the peak.
    """

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup: int | float = 0.01
    decay: int | float = 0.2
    final_lr_fraction: float = 0.1

    def __post_init__(self) -> None:
        for name in ("warmup", "decay"):
            value = getattr(self, name)
            if value < 0 or (value >= 1 and value != int(value)):
                raise ValueError(f"schedule.{name} is {value}: give whole steps, or a fraction of the run below 1")
        if not 0 <= self.final_lr_fraction <= 1:
            raise ValueError(f"schedule.final_lr_fraction is {self.final_lr_fraction}: give a number from 0 to 1")


def in_steps(length: int | float, max_steps: int) -> int:
    """A length in steps; below 1 it is a fraction of the run."""
    return round(length * max_steps) if 0 < length < 1 else int(length)


def learning_rate(config: ScheduleConfig, peak: float, step: int, max_steps: int) -> float:
    """The learning rate of optimizer step `step`, counted from 1 to `max_steps`.

    The warm-up reaches the peak at its last step; the decay reaches `final_lr_fraction` of it at `max_steps`.
    """
    assert 1 <= step, step
    warmup = in_steps(config.warmup, max_steps)
    if step <= warmup:
        return peak * step / warmup
    if config.kind == "constant":
        return peak
    start = warmup if config.kind == "cosine" else max(warmup, max_steps - in_steps(config.decay, max_steps))
    if step <= start:
        return peak
    progress = min(1.0, (step - start) / max(1, max_steps - start))
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if config.kind == "cosine" else 1 - progress
    return peak * (config.final_lr_fraction + (1 - config.final_lr_fraction) * remaining)
