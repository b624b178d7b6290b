"""From seconds of a step to the run's hours: validations, saves and starts beside the steps; without torch."""

import math
from dataclasses import dataclass

from train.settings.sections import Config

# Of every start, set, not measured on this machine: processes, data and NCCL; torch.compile with a cold cache.
START_SECONDS, COMPILE_SECONDS = 30.0, 60.0
SLURM_MARGIN_SECONDS = 300.0  # before its time limit a job is asked to save and stop (slurm/*.sh: --signal)


@dataclass(frozen=True)
class Pace:
    """Seconds of everything that a run does again and again.

    measured: by real steps; else modelled. start: until the first step. save: for which training stands still.
    sampling: of a step's answers, part of `step`; None where none are sampled.
    """

    step: float
    validation: float
    save: float
    start: float
    measured: bool = False
    sampling: float | None = None


@dataclass(frozen=True)
class Durations:
    """Seconds of a whole run by what they go to."""

    steps: float
    validations: float
    saves: float
    starts: float
    restarts: int  # because of the time limit

    @property
    def total(self) -> float:
        return self.steps + self.validations + self.saves + self.starts


def times_due(every: int, steps: int) -> int:
    """How often something that is due at every so many steps, and at the last, happens; 0: only at the last."""
    return -(-steps // every) if every else 1


def durations(config: Config, pace: Pace, limit_seconds: float | None) -> Durations:
    """Of all `run.max_steps`. Args: limit_seconds: of one start on the cluster; None: there is none."""
    steps = config.run.max_steps
    worked = config.batch.stages.tokens_after(steps) / config.batch.tokens_per_step * pace.step  # in full steps
    validations = (times_due(config.eval.every_steps, steps) + 1) * pace.validation  # and before the first step
    saves = times_due(config.checkpoint.every_steps, steps) * pace.save
    restarts = 0
    if limit_seconds is not None:
        usable = limit_seconds - SLURM_MARGIN_SECONDS - pace.start - pace.save
        once = worked + validations + saves
        restarts = math.ceil(once / usable) - 1 if usable > 0 else -1
    return Durations(worked, validations, saves, (max(0, restarts) + 1) * pace.start, restarts)
