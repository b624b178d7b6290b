"""What a model is trained for: the loss of a batch, and what a step records. The rest of a step is the same for all."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from train.batches.loader import MicroBatch, StepBatch


class Sample(NamedTuple):
    """An answer of a step's, and the reward that it got."""

    prompt: str
    text: str
    reward: float


class StepReport(NamedTuple):
    """What a step of an objective records beside its training record.

    note: a record of its own kind, without step, tokens and time. line: of the log. samples: a few of the answers.
    """

    note: dict[str, Any]
    line: str
    samples: tuple[Sample, ...] = ()


class Objective(Protocol):
    """One way to learn from batches of tokens.

    Attributes:
        unit: what a step's loss is the mean over, all ranks together, as metrics.jsonl names their number.
        terms: keys of metrics.jsonl for what is learned from beside the loss.
        sources: names of the sources whose losses are reported apart.
    """

    unit: str
    terms: tuple[str, ...]
    sources: tuple[str, ...]

    def updates(self, batch: StepBatch, step: int) -> Iterable[StepBatch]:
        """What each update of the optimizer in a step learns from: the batch itself, or what is made of it.

        All ranks take them together, each after the update before.
        """

    def target_count(self, batch: StepBatch) -> int:
        """How many of its units this rank's share of a step has: the loss of a step is the mean over all ranks'."""

    def total_target_count(self, batch: StepBatch) -> int | None:
        """That of all ranks, where it is known ahead; None: each step sums it over ranks, which wait for each other."""

    def loss(self, model: Callable[..., Any], batch: MicroBatch, scale: Tensor) -> tuple[Tensor, Tensor]:
        """What is learned from in a micro-batch, and what is reported of it, both summed over its targets.

        The first is () float32, the second (1 + len(terms) + len(sources)) float32, detached: the loss, its further
        terms, and the loss by source.

        Args:
            model: the model, perhaps as one of several replicas; called exactly once.
            batch: on the model's device.
            scale: () the gradient that the loss is going to get, for a model that works its gradients out at once.
        """

    def record(self, loss: float) -> dict[str, float]:
        """The entries of metrics.jsonl for a step, by key. Args: loss: the mean over the targets of all ranks."""

    def report(self, terms: Mapping[str, float]) -> StepReport | None:
        """What the step that is done records beside that, if anything. Args: terms: their means over its updates."""
