"""A batch that grows over a run by stages (`batch.warmup`): tokens, batch and step as closed forms of each other.

A stage is a pair of tokens: from so many on, a step has so many. Whoever knows the tokens so far knows the next step.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import gcd
from typing import Any


@dataclass(frozen=True)
class BatchStages:
    """Stages from the first step on; a single one for a batch that stays the same.

    Attributes:
        starts: tokens of the run when each stage starts; the first is 0. sizes: tokens of a step in each.
    """

    starts: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, warmup: Sequence[Sequence[int]], tokens_per_step: int) -> "BatchStages":
        """Of the configuration's values. Raises ValueError, with what would fit, where they make no stages."""
        if not warmup:
            return cls((0,), (tokens_per_step,))
        for stage in warmup:
            if len(stage) != 2:
                raise ValueError(f"batch.warmup has {list(stage)}: give pairs, [from so many tokens on, tokens a step]")
        stages = cls(tuple(stage[0] for stage in warmup), tuple(stage[1] for stage in warmup))
        stages._check(tokens_per_step)
        return stages

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> "BatchStages | None":
        """Of a run's recorded configuration, as readers find it; None where it tells nothing."""
        batch = config.get("batch")
        if not isinstance(batch, Mapping):
            return None
        try:
            stages = cls.of(batch.get("warmup") or [], batch["tokens_per_step"])
            return stages if min(stages.sizes) > 0 else None
        except (KeyError, TypeError, ValueError):
            return None

    def _check(self, tokens_per_step: int) -> None:
        if self.starts[0] != 0:
            raise ValueError(f"batch.warmup starts at {self.starts[0]} tokens: let its first stage start at 0")
        if self.sizes[-1] != tokens_per_step:
            raise ValueError(
                f"batch.warmup ends with {self.sizes[-1]} tokens a step, batch.tokens_per_step is {tokens_per_step}: "
                f"add the stage at which these start, [TOKENS, {tokens_per_step}]"
            )
        if self.sizes[0] < 1:
            raise ValueError(f"batch.warmup has {self.sizes[0]} tokens a step: use a positive number")
        for (start, size), (end, following) in pairwise(zip(self.starts, self.sizes, strict=True)):
            if end <= start or following <= size:
                raise ValueError(
                    f"batch.warmup has [{end}, {following}] after [{start}, {size}]: let both numbers grow with each "
                    "stage"
                )
            if rest := (end - start) % size:
                below, above = end - rest, end - rest + size
                nearest = f"{below} or {above}" if below > start else str(above)
                raise ValueError(
                    f"batch.warmup: from {start} to {end} tokens are no whole steps of {size}: let the next stage "
                    f"start at {nearest}"
                )

    @property
    def common_size(self) -> int:
        """The largest number of tokens that divides every stage's step."""
        return gcd(*self.sizes)

    def index_at(self, tokens: int) -> int:
        """The number of the stage of a step that starts after so many tokens of the run."""
        return bisect_right(self.starts, tokens) - 1

    def size_at(self, tokens: int) -> int:
        """Tokens of that step."""
        return self.sizes[self.index_at(tokens)]

    def tokens_after(self, steps: int, tokens: int = 0) -> int:
        """Tokens of the run so many steps after it has had `tokens`."""
        for index in range(self.index_at(tokens), len(self.starts) - 1):
            size = self.sizes[index]
            here = -(-(self.starts[index + 1] - tokens) // size)  # steps that start in this stage
            if steps <= here:
                return tokens + steps * size
            tokens, steps = tokens + here * size, steps - here
        return tokens + steps * self.sizes[-1]

    def steps_to(self, tokens: float) -> int:
        """The number of steps of a run whose tokens come nearest to these."""
        index = self.index_at(int(tokens))
        ended = zip(pairwise(self.starts[: index + 1]), self.sizes[:index], strict=True)
        before = sum((end - start) // size for (start, end), size in ended)
        return before + round((tokens - self.starts[index]) / self.sizes[index])

    def steps_left(self, steps: int, tokens: int) -> float:
        """The work of so many steps after `tokens`, in steps as large as the next one: what an ETA is made from."""
        return (self.tokens_after(steps, tokens) - tokens) / self.size_at(tokens)
