"""From token shards to whole optimizer steps, sliced by rank and read ahead by a thread.

A batch is a pure function of (data, seed, sequences consumed); that one integer is the loader's whole state.
"""

import queue
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_prep.token_sets.manifest import document_start
from data_prep.token_sets.sequences import Windows, document_ids
from data_prep.token_sets.token_set import TokenSet
from model.ranks import Ranks
from train.batches.plan import BatchPlan
from train.batches.shuffle import windows_at


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward sees. Shapes: M sequences, T tokens."""

    tokens: Tensor  # (M, T) int64
    targets: Tensor  # (M, T) int64, the tokens that follow
    document_ids: Tensor | None  # (M, T) int64, where attention is to stay inside documents


@dataclass(frozen=True)
class StepBatch:
    """This rank's share of one optimizer step. Shapes: A micro-batches, M sequences, T tokens."""

    tokens: Tensor  # (A, M, T) int64
    targets: Tensor  # (A, M, T) int64, the tokens that follow
    document_ids: Tensor | None  # (A, M, T) int64, where attention is to stay inside documents
    windows: npt.NDArray[np.int64]  # (A, M): the number of each sequence in the split
    target_count: int  # of this rank
    total_target_count: int | None = None  # of all ranks, where it is known without asking them

    def micro_batches(self, device: torch.device) -> Iterator[MicroBatch]:
        """Each micro-batch on a device, copied there while it computes the one before."""
        for index in range(len(self.tokens)):
            documents = None if self.document_ids is None else self.document_ids[index]
            yield MicroBatch(
                self.tokens[index].to(device, non_blocking=True),  # (M, T)
                self.targets[index].to(device, non_blocking=True),  # (M, T)
                None if documents is None else documents.to(device, non_blocking=True),  # (M, T)
            )


class StepLoader:
    """Whole optimizer steps of one rank."""

    def __init__(
        self,
        windows: Windows,
        plan: BatchPlan,
        *,
        rank: int,
        seed: int,
        split_documents_at: int | None = None,
        pin_memory: bool = False,
    ) -> None:
        """Args: split_documents_at: the end-of-text id, where steps shall carry document ids."""
        assert windows.count > 0
        self._split_documents_at = split_documents_at
        self.windows = windows
        self.plan = plan
        self._seed = seed
        self._pin_memory = pin_memory
        numbers = [plan.micro_batch_number(rank, index) for index in range(plan.accumulation)]
        # which of the step's sequences are this rank's: micro-batch number m holds sequences m·M … m·M + M-1
        self._mine = np.concatenate([np.arange(n * plan.micro_batch, (n + 1) * plan.micro_batch) for n in numbers])

    def step_at(self, sequences_consumed: int) -> StepBatch:
        """This rank's share of the step that follows `sequences_consumed` sequences."""
        plan = self.plan
        windows = windows_at(sequences_consumed, plan.sequences, self.windows.count, self._seed)[self._mine]
        tokens = self.windows.read(windows).reshape(plan.accumulation, plan.micro_batch, -1)  # (A, M, T+1)
        inputs, targets = self._tensor(tokens[..., :-1]), self._tensor(tokens[..., 1:])
        documents = None
        if self._split_documents_at is not None:
            documents = self._tensor(document_ids(tokens[..., :-1], self._split_documents_at))
        of_window = windows.reshape(plan.accumulation, plan.micro_batch)
        total = plan.sequences * self.windows.block_size
        return StepBatch(inputs, targets, documents, of_window, targets.numel(), total)

    def numbers_at(self, sequences_consumed: int) -> list[int]:
        """The numbers of all ranks' sequences in that step, sorted."""
        return sorted(windows_at(sequences_consumed, self.plan.sequences, self.windows.count, self._seed).tolist())

    def _tensor(self, values: npt.NDArray[np.int64]) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        return tensor.pin_memory() if self._pin_memory else tensor

    def steps(self, sequences_consumed: int, *, read_ahead: int = 2) -> Generator[StepBatch]:
        """Steps from there on, endlessly, read ahead by a thread that ends with the iterator."""
        ready: queue.Queue[StepBatch | BaseException] = queue.Queue(maxsize=read_ahead)
        stopped = threading.Event()

        def read() -> None:
            position = sequences_consumed
            while not stopped.is_set():
                item: StepBatch | BaseException
                try:
                    item = self.step_at(position)
                except BaseException as error:  # surfaces in the training thread
                    item = error
                position += self.plan.sequences
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


def open_loader(
    tokens: TokenSet, plan: BatchPlan, ranks: Ranks, *, length: int, stride: int | None, seed: int, mask_documents: bool
) -> StepLoader:
    """A loader of this rank's share of what a run trains on.

    Args:
        length: tokens of a sequence. stride: tokens from one's start to the next's; None: the length.
    """
    return StepLoader(
        Windows(tokens.split("train"), length, stride),
        plan,
        rank=ranks.rank,
        seed=seed,
        split_documents_at=document_start(tokens.tokenizer_spec) if mask_documents else None,
        pin_memory=ranks.device.type == "cuda",
    )
