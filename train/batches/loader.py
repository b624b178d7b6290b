"""From token shards to whole optimizer steps, sliced by rank and read ahead by a thread.

A batch is a pure function of (data, seed, sequences consumed); that one integer is the loader's whole state.
"""

import queue
import threading
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_prep.token_sets.sequences import JoinedSequences, Sequences
from train.batches.plan import BatchPlan, BatchPlans
from train.batches.shuffle import EpochOrder


class Order(Protocol):
    """Which sequence stands where, without end."""

    def numbers(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """The sequence numbers (count,) at positions first … first+count-1."""
        ...

    def named(self, number: int) -> int | tuple[str, int]:
        """A sequence as it is recorded: its number, of several sources with the source's name."""
        ...

    def read_by_source(self, position: int) -> dict[str, int]:
        """How many sequences of each of several sources stand before a position."""
        ...


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward sees. Shapes: M sequences, T tokens."""

    tokens: Tensor  # (M, T) int64
    targets: Tensor  # (M, T) int64, the tokens that follow; -100 counts for nothing
    document_ids: Tensor | None  # (M, T) int64, where attention is to stay inside documents
    sources: Tensor | None = None  # (M,) int64, the number of each sequence's source, of several
    more: Mapping[str, Tensor] = field(default_factory=dict)  # (M, …) each, what an objective has added


@dataclass(frozen=True)
class StepBatch:
    """This rank's share of one optimizer step. Shapes: A micro-batches, M sequences, T tokens."""

    tokens: Tensor  # (A, M, T) int64
    targets: Tensor  # (A, M, T) int64, the tokens that follow; -100 counts for nothing
    document_ids: Tensor | None  # (A, M, T) int64, where attention is to stay inside documents
    windows: npt.NDArray[np.int64]  # (A, M): the number of each sequence in the split
    target_count: int  # of this rank
    total_target_count: int | None = None  # of all ranks, where it is known without asking them
    sources: Tensor | None = None  # (A, M) int64, the number of each sequence's source, of several
    source_target_counts: tuple[int, ...] = ()  # of all ranks, by source
    numbers: npt.NDArray[np.int64] | None = None  # (sequences,) of all ranks, in the order of the step
    more: Mapping[str, Tensor] = field(default_factory=dict)  # (A, M, …) each, what an objective has added

    def micro_batches(self, device: torch.device) -> Iterator[MicroBatch]:
        """Each micro-batch on a device, copied there while it computes the one before."""
        for index in range(len(self.tokens)):
            documents = None if self.document_ids is None else self.document_ids[index]
            sources = None if self.sources is None else self.sources[index]
            yield MicroBatch(
                self.tokens[index].to(device, non_blocking=True),  # (M, T)
                self.targets[index].to(device, non_blocking=True),  # (M, T)
                None if documents is None else documents.to(device, non_blocking=True),  # (M, T)
                None if sources is None else sources.to(device, non_blocking=True),  # (M,)
                {name: values[index].to(device, non_blocking=True) for name, values in self.more.items()},
            )


class StepLoader:
    """Whole optimizer steps of one rank."""

    def __init__(
        self,
        sequences: Sequences,
        plan: BatchPlan,
        *,
        rank: int,
        seed: int,
        order: Order | None = None,
        pin_memory: bool = False,
        plans: BatchPlans | None = None,
    ) -> None:
        """Args:
        plan: of a step; of the largest one where the batch grows. plans: of all stages then.
        order: of the sequences; None: that of one source, by `seed`.
        """
        self.sequences = sequences
        self.order = EpochOrder(sequences.count, seed) if order is None else order
        self.plan, self._plans = plan, plans
        self._pin_memory = pin_memory
        numbers = [plan.micro_batch_number(rank, index) for index in range(plan.accumulation)]
        # which of the step's sequences are this rank's: micro-batch number m holds sequences m·M … m·M + M-1
        self._mine = np.concatenate([np.arange(n * plan.micro_batch, (n + 1) * plan.micro_batch) for n in numbers])

    def plan_at(self, tokens: int) -> BatchPlan:
        """Of a step that starts after so many tokens of the run."""
        return self.plan if self._plans is None else self._plans.at(tokens)

    def step_at(self, sequences_consumed: int, plan: BatchPlan | None = None) -> StepBatch:
        """This rank's share of the step that follows `sequences_consumed` sequences. Args: plan: the step's own."""
        plan = plan or self.plan
        everyone = self.order.numbers(sequences_consumed, plan.sequences)
        mine = everyone[self._mine[: plan.accumulation * plan.micro_batch]]
        rows = self.sequences.rows(mine)
        sources: Tensor | None = None
        counts: tuple[int, ...] = ()
        if isinstance(self.sequences, JoinedSequences):
            sources = self._pinned(torch.from_numpy(self.sequences.sources(mine)).reshape(-1, plan.micro_batch))
            counts = self.sequences.target_counts(everyone)
        return StepBatch(
            tokens=self._tensor(rows.inputs),
            targets=self._tensor(rows.targets),
            document_ids=None if rows.document_ids is None else self._tensor(rows.document_ids),
            windows=mine.reshape(plan.accumulation, plan.micro_batch),
            target_count=self.sequences.target_count(mine),
            total_target_count=sum(counts) if counts else self.sequences.target_count(everyone),
            sources=sources,
            source_target_counts=counts,
            numbers=everyone,
        )

    def numbers_at(self, sequences_consumed: int, count: int) -> list[int | tuple[str, int]]:
        """All ranks' sequences in that step, which has so many, sorted."""
        return list(map(self.order.named, sorted(self.order.numbers(sequences_consumed, count).tolist())))

    def _tensor(self, values: npt.NDArray[np.int64]) -> Tensor:
        """(A·M, T) to (A, M, T)."""
        shape = -1, self.plan.micro_batch, self.sequences.block_size
        tensor = torch.from_numpy(np.ascontiguousarray(values)).reshape(shape)
        return self._pinned(tensor)

    def _pinned(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self._pin_memory else tensor

    def steps(self, sequences_consumed: int, tokens: int = 0, *, read_ahead: int = 2) -> Generator[StepBatch]:
        """Steps from there on, endlessly, read ahead by a thread that ends with the iterator.

        Args: tokens: of the run so far, which decide the size of its next steps.
        """
        ready: queue.Queue[StepBatch | BaseException] = queue.Queue(maxsize=read_ahead)
        stopped = threading.Event()

        def read() -> None:
            position, seen = sequences_consumed, tokens
            while not stopped.is_set():
                item: StepBatch | BaseException
                try:
                    plan = self.plan_at(seen)
                    item = self.step_at(position, plan)
                    position, seen = position + plan.sequences, seen + plan.sequences * self.sequences.block_size
                except BaseException as error:  # surfaces in the training thread
                    item = error
                while not stopped.is_set():
                    try:
                        ready.put(item, timeout=0.2)
                        break
                    except queue.Full:
                        continue
                if isinstance(item, BaseException):
                    return

        thread = threading.Thread(target=read, name="loader", daemon=True)
        thread.start()
        try:
            while True:
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()
            thread.join()
