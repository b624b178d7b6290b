"""The processes of one run: their ranks and devices, and how they add up and agree.

Heavy traffic (gradients) goes over the default process group, NCCL on GPUs. Everything small goes over a second group,
gloo on the CPU: it neither waits for the GPU's queue nor dies of NCCL's short timeout while a rank writes a file.
"""

import os
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import UserError
from model.devices import DeviceChoice, choose_device
from model.meeting import STORE_FILE, describe_meeting, open_store
from model.messages import Kind, decode, encode
from model.rank_environment import TO_TRAIN_ALONE, Place, launcher_is_known, place_of_this_process

Decision = TypeVar("Decision")
QUIET_SECONDS = 2.0  # of waiting for other ranks


@dataclass
class Ranks:
    """One process among `world_size`. Without a launcher: rank 0 of 1, and no process group at all.

    on_meeting: called whenever this rank is about to wait for the others, which all ranks do equally often.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    _group: Any = field(default=None, repr=False)
    _connected_here: bool = True
    on_meeting: Callable[[], None] = field(default=lambda: None, repr=False)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Sum each number over all ranks, in float64."""
        if self.world_size == 1:
            return values
        self.on_meeting()
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, op=dist.ReduceOp.SUM, group=self._group)
        return total.tolist()

    def sum_tensor(self, values: Tensor) -> Tensor:
        """Sum a tensor of any shape over all ranks on its own device, in place, without waiting for it; return it."""
        if self.world_size > 1:
            self.on_meeting()
            dist.all_reduce(values, op=dist.ReduceOp.SUM)
        return values

    def max_tensor(self, values: Tensor) -> Tensor:
        """The maximum over all ranks of a tensor, as `sum_tensor`."""
        if self.world_size > 1:
            self.on_meeting()
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def start_broadcast(self, values: Tensor, source: int) -> dist.Work:
        """Start to send a rank's tensor to all others, in place and on its own device. All ranks of several call.

        Neither side may touch it before `wait` has returned.
        """
        self.on_meeting()
        work = dist.broadcast(values, src=source, async_op=True)
        assert work is not None
        return work

    def agree(self, flags: list[int]) -> list[int]:
        """The maximum of each flag over all ranks: a flag that one rank raises, all see, at the same call."""
        if self.world_size == 1:
            return flags
        self.on_meeting()
        agreed = torch.tensor(flags, dtype=torch.int64)
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=self._group)
        return agreed.tolist()

    def gather(self, value: Any, *kinds: Kind) -> list[Any]:
        """Every rank's value, in the order of ranks, on all ranks. Args: as `model.messages.encode` takes them."""
        if self.world_size == 1:
            return [value]
        mine = _bytes_tensor(encode(value, kinds))
        sizes = self._all_gathered(torch.tensor([len(mine)]))
        padded = mine.new_zeros(max(int(size) for size in sizes))
        padded[: len(mine)] = mine
        received = self._all_gathered(padded)
        return [decode(_bytes(row[: int(size)]), kinds) for row, size in zip(received, sizes, strict=True)]

    def gather_array(self, values: npt.NDArray[np.float64]) -> list[npt.NDArray[np.float64]]:
        """Every rank's numbers, in the order of ranks, on all ranks; all of one shape."""
        if self.world_size == 1:
            return [values]
        return [row.numpy() for row in self._all_gathered(torch.from_numpy(np.ascontiguousarray(values)))]

    def from_first(self, value: Any, *kinds: Kind) -> Any:
        """Rank 0's value, on all ranks. Args: as `model.messages.encode` takes them; other ranks' value is not read."""
        if self.world_size == 1:
            return value
        self.on_meeting()
        message = _bytes_tensor(encode(value, kinds)) if self.is_first else torch.empty(0, dtype=torch.uint8)
        size = torch.tensor([len(message)])
        dist.broadcast(size, src=0, group=self._group)
        if not self.is_first:
            message = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(message, src=0, group=self._group)
        return value if self.is_first else decode(_bytes(message), kinds)

    def _all_gathered(self, mine: Tensor) -> list[Tensor]:
        """Every rank's tensor, of the same shape everywhere."""
        self.on_meeting()
        received = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(received, mine, group=self._group)
        return received

    def barrier(self) -> None:
        if self.world_size > 1:
            self.on_meeting()
            dist.barrier(group=self._group)

    def close(self) -> None:
        """Leave together. A rank that leaves early would look like a crash to its peers."""
        if self.world_size > 1:
            self.barrier()
            if self._connected_here:
                dist.destroy_process_group()


def agreed(ranks: Ranks, decide: Callable[[], Decision], *kinds: Kind) -> Decision:
    """Rank 0's decision, on all ranks; its UserError too.

    Args:
        kinds: what a decision consists of beside JSON, tuples and paths (`model.messages.encode`); kinds of UserError
            that a caller distinguishes.
    """
    outcome: Decision | UserError | None = None
    if ranks.is_first:
        try:
            outcome = decide()
        except UserError as error:
            outcome = error
    outcome = ranks.from_first(outcome, *kinds)
    if isinstance(outcome, UserError):
        raise outcome
    return outcome


def _bytes_tensor(message: bytes) -> Tensor:
    """A message as a tensor (n,) of its bytes."""
    return torch.frombuffer(bytearray(message), dtype=torch.uint8)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()


def start_ranks(choice: DeviceChoice = "auto", *, timeout_seconds: float = 1800.0) -> Ranks:
    """Read the launcher's variables (torchrun's RANK, WORLD_SIZE, …, or those of srun) and connect.

    A default process group that is there already is used as it is, and left to whoever made it.

    Raises UserError where the device is missing, there are more ranks on this machine than GPUs, the nodes of an
    allocation would each train alone, or the ranks can't meet.
    """
    place = place_of_this_process()
    device = choose_device(choice, place.local_rank, place.local_world_size)
    group = None
    connected = dist.is_initialized()
    if place.world_size > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if not connected:
            _connect(place, device, timeout_seconds)
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
    return Ranks(place.rank, place.world_size, place.local_rank, place.local_world_size, device, group, not connected)


def _connect(place: Place, device: torch.device, timeout_seconds: float) -> None:
    """Meet the other ranks.

    Raises UserError where no address is set, or where they don't come and no launcher is known.
    """
    point = describe_meeting(os.environ)
    me = f"rank {place.rank} of {place.world_size} on {socket.gethostname()}"
    waiting = threading.Timer(
        QUIET_SECONDS,
        lambda: print(
            f"{me} waits for the others at {point}, up to {timeout_seconds:g} s, as RANK and WORLD_SIZE require "
            f"({TO_TRAIN_ALONE})",
            file=sys.stderr, flush=True,
        ),
    )  # fmt: skip
    waiting.daemon = True
    known = launcher_is_known(os.environ) or STORE_FILE in os.environ
    if not known:
        waiting.start()
    timeout = timedelta(seconds=timeout_seconds)
    try:
        store = open_store(os.environ, place, timeout)
        whom: dict[str, Any] = {}
        if store is not None:
            whom = {"store": store, "rank": place.rank, "world_size": place.world_size}
        if device.type == "cuda":
            dist.init_process_group("nccl", timeout=timeout, device_id=device, **whom)
        else:
            dist.init_process_group("gloo", timeout=timeout, **whom)
    except dist.DistError as error:
        if known:
            raise
        why = str(error).strip().splitlines()[0]
        raise UserError(f"{me} did not meet the others at {point} ({why}): {TO_TRAIN_ALONE}") from None
    finally:
        waiting.cancel()
