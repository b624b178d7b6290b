"""How far a run has come."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Enough to resume: everything random is a function of these and the seed.

    Attributes:
        step, tokens: since the start, that of the run this one branched from included.
        sequences: the loader's position in the data at hand; with other data it starts at 0 (`train.startup.position`).
    """

    step: int = 0
    tokens: int = 0
    sequences: int = 0
