"""Which ranks compute more slowly than the others: all wait for them in every step."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from model.ranks import Ranks
from train.run.recorder import Recorder

WINDOW_STEPS = 10
SLOWER = 1.15  # times the lower median of all ranks, by the median of a window
SLOWER_SHARE = 0.8  # of a window's steps in which it must take longer: busy cores delay now one rank, now another
WINDOWS = 4  # in a row before a rank is named
RECORD_STEPS = 100  # from one record of all ranks to the next


class SlowRanks:
    """Compares the ranks' own times, and names the slow ones with their hosts. All ranks call `step` together."""

    def __init__(self, ranks: Ranks, hosts: Sequence[str], recorder: Recorder) -> None:
        """Args: hosts: by rank."""
        self._ranks = ranks
        self._hosts = hosts
        self._recorder = recorder
        self._seconds: list[float] = []  # of this window's steps
        self._slow_for = np.zeros(ranks.world_size, dtype=np.int64)  # windows in a row, by rank
        self._named: set[int] = set()

    def step(self, step: int, seconds: float) -> None:
        """A step is done. Args: seconds: that this rank has computed before it waited for others."""
        if self._ranks.world_size == 1:
            return
        self._seconds.append(seconds)
        if step % WINDOW_STEPS:
            return
        mine = np.array(self._seconds)
        self._seconds.clear()
        self._compare(step, np.stack(self._ranks.gather_array(mine)))

    def _compare(self, step: int, window: npt.NDArray[np.float64]) -> None:
        """Args: window: (ranks, steps), seconds of each step."""
        seconds = np.median(window, axis=1)  # (ranks,)
        times = times_the_median(seconds)
        self._slow_for = np.where(is_slow(window), self._slow_for + 1, 0)
        slow = {int(rank) for rank in np.flatnonzero(self._slow_for >= WINDOWS)}
        for rank in sorted(slow - self._named):
            self._recorder.log(
                f"WARNING: rank {rank} on {self._hosts[rank]} computes {times[rank]:.2f} times as long as the others "
                f"({seconds[rank]:.3f} s a step before step {step}): all ranks wait for it"
            )
        for rank in sorted(self._named - slow):
            self._recorder.log(f"rank {rank} on {self._hosts[rank]} is no longer slower than the others")
        if slow != self._named or step == WINDOW_STEPS or step % RECORD_STEPS == 0:
            self._recorder.note(record(step, seconds, slow))
        self._named = slow


def is_slow(window: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Which ranks were slow in a window (ranks, steps), as a whole and in most of its steps: (ranks,)."""
    slower_steps = np.mean(window > _lower_median(window), axis=1)  # (ranks,)
    return (times_the_median(np.median(window, axis=1)) > SLOWER) & (slower_steps >= SLOWER_SHARE)


def times_the_median(seconds: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Each rank's time over the lower median of all, which with two ranks is the faster one's: (ranks,)."""
    return seconds / np.maximum(_lower_median(seconds), 1e-9)


def _lower_median(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Over the first dimension, which is that of ranks."""
    return np.asarray(np.sort(values, axis=0)[(len(values) - 1) // 2])


def record(step: int, seconds: npt.NDArray[np.float64], slow: set[int]) -> dict[str, Any]:
    """A line of metrics.jsonl."""
    return {
        "kind": "ranks",
        "step": step,
        "compute_seconds": [round(float(value), 6) for value in seconds],
        "slow": sorted(slow),
    }
