"""Spikes in the runs of a campaign: steps that read the data at some positions get a loss that is NaN, on all ranks.

Each pair of such steps is one more than `run.max_skips` permits: the run is rolled back past it. The undisturbed run is
rolled back alike, and a disturbed one must come to the same end.
"""

import math
import os
from collections.abc import Callable
from typing import Any

VARIABLE = "CHAOS_SPIKES"  # sequences of a step
STEPS = (20, 21, 32, 33)  # steps' worth of sequences that have been consumed before
ROLL_BACKS = 2
OPTIONS = ("--run.on_nonfinite=skip", "--run.on_spike=rollback", "--run.max_skips=1")


def plant(wrap: Callable[[str, str | None, str, Callable[[Callable[..., Any]], Any]], None]) -> None:
    """Make them happen in this process. Args: wrap: replaces a function of a module or class by its wrapped self."""
    wrap("train.batches.loader", "StepLoader", "step_at", _marking)
    wrap("train.optimization.step", "Stepper", "__call__", _spoiling)


def _marking(step_at: Callable[..., Any]) -> Callable[..., Any]:
    positions = {step * int(os.environ[VARIABLE]) for step in STEPS}

    def marked(loader: Any, position: int, *plan: Any) -> Any:
        batch = step_at(loader, position, *plan)
        object.__setattr__(batch, "is_spike", position in positions)
        return batch

    return marked


def _spoiling(call: Callable[..., Any]) -> Callable[..., Any]:
    def spoilt(stepper: Any, batch: Any, step: int) -> Any:
        if not batch.is_spike:
            return call(stepper, batch, step)
        hook = stepper._parallel.model.ln_f.register_forward_hook(lambda *call: call[2] * math.nan)
        try:
            return call(stepper, batch, step)
        finally:
            hook.remove()

    return spoilt
