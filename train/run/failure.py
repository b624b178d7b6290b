"""How a failing run reports it: which rank, on which host, why; and whether it was an error or a lost process."""

import contextlib
import re
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from common.errors import USER_ERROR_STATUS, OutOfMemory, UserError
from common.memory_errors import is_out_of_memory
from common.plain_text import one_line
from common.processes import node_name
from common.run_folder import Failure, RunFolder
from model.ranks import Ranks
from train.errors import LockLost, NonFiniteLoss, NonFiniteWeights, ReplicasDiffer, StorageFailed, TooManySpikes
from train.run.heartbeat import silent_ranks, vanished_ranks
from train.run.lock import why_lost
from train.run.recorder import Recorder
from train.run.state import UNCERTAIN, RunState
from train.run.suspect import node_of

SELF_EXPLAINING = (NonFiniteLoss, NonFiniteWeights, ReplicasDiffer, TooManySpikes)  # better without traceback
PEER_IS_GONE = re.compile(r"gloo|closed by peer|reset by peer|broken pipe|socket|nccl.*(remote|abort|timeout)", re.I)
# what CUDA and HIP call a device that has failed, which no other program can make them say
GPU_IS_LOST = re.compile(
    r"uncorrectable (ECC|NVLink) error|GPU is lost|fallen off the bus|no CUDA-capable device is detected"
    r"|device\(s\) is/are busy or unavailable|(CUDA|HIP) error: unknown error|nvlink or a hardware error",
    re.I,
)
LOOK_SECONDS = 3.0  # how long to look for the process that is gone


@dataclass
class FailureReporter:
    """Records in `state`, log and terminal how this rank's part of a run failed."""

    folder: RunFolder
    ranks: Ranks
    state: RunState
    recorder: Recorder
    memory_advice: str  # options that take less memory

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Report what goes wrong inside the block.

        Raises SystemExit (status 1, or 2 where the configuration doesn't fit into the memory) where one line is
        enough, else what was raised.
        """
        try:
            yield
        except LockLost as error:
            self._say_on_terminal(str(error))  # the run is not this process's any more
            raise SystemExit(1) from None
        except SELF_EXPLAINING as error:
            self._report("exception", str(error), alike=True)
            raise SystemExit(1) from None
        except StorageFailed as error:
            self._report("storage", str(error), alike=True)
            raise
        except UserError as error:
            self._report("exception", str(error), alike=True)
            raise
        except Exception as error:
            if is_out_of_memory(error):
                self._report("exception", f"{self._me()}: {OutOfMemory(error, self.memory_advice)}")
                self._append_to_log(traceback.format_exc())  # of interest where the estimate is wrong
                raise SystemExit(USER_ERROR_STATUS) from None
            if is_storage(error):
                self._report("storage", f"{self._me()}: {error}")
                raise SystemExit(1) from None
            if is_lost_gpu(error):
                reason = f"the GPU of {self._me()} has failed: {first_line(error)}"
                self._report("lost_gpu", reason, culprit_node=node_name())
                raise SystemExit(1) from error
            if not is_lost_peer(error):
                self._report("exception", f"{type(error).__name__} on {self._me()}: {error}")
                raise
            if self.state.lock.overtaken():
                self._say_on_terminal(why_lost(self.folder.path))
            else:
                reason, culprit_node = self._who_is_gone(error)
                self._report("lost_rank", reason, certain=bool(culprit_node), culprit_node=culprit_node)
            raise SystemExit(1) from error

    def report_hang(self, reason: str, culprit_node: str) -> None:
        """Report that the run has hung, from whichever rank knows. A run that has ended in `state` stays so.

        Args: culprit_node: "" where no rank is behind.
        """
        if self.state.recorded().get("status") in ("done", "preempted"):
            self.tell(f"failed: {reason}")
        else:
            self._report("hung", reason, culprit_node=culprit_node)

    def report_dropped(self) -> None:
        """Record that a person ends this run at once; called from another thread than the trainer's."""
        if reason := self.state.write_dropped():
            self._append_to_log(f"preempted: {reason}")
            print(f"stopped: {reason}", file=sys.stderr, flush=True)

    def tell(self, text: str) -> None:
        """A line for people in the run's log and on a terminal, from any rank."""
        if self.ranks.is_first:
            self.recorder.log(text)
        else:
            self._append_to_log(text)
            self._say_on_terminal(text)

    def _report(
        self, failure: Failure, reason: str, *, certain: bool = True, alike: bool = False, culprit_node: str = ""
    ) -> None:
        """Record a failure; `alike`: one that all ranks have, so that one rank's report is enough."""
        reason = " ".join(reason.split())
        counts = self.state.write_failure(failure, reason, certain=certain, culprit_node=culprit_node)
        if not counts and not alike:
            reason = f"{self._me()} leaves: {self.state.recorded().get('reason', reason)}"
        if counts and not alike and not self.ranks.is_first:  # the recorder is rank 0's, which may be the one that died
            self._append_to_log(f"failed: {reason}")
            self._say_on_terminal(f"failed: {reason}")
        self.recorder.log(f"failed: {reason}")
        self.recorder.close()

    def _who_is_gone(self, error: Exception) -> tuple[str, str]:
        """The reason that names the rank that vanished, and its machine; "" where it is not known which."""
        others = [rank for rank in range(self.ranks.world_size) if rank != self.ranks.rank]
        until = time.monotonic() + LOOK_SECONDS
        while not (gone := vanished_ranks(self.folder, others)) and time.monotonic() < until:
            if self.state.recorded().get("status") in ("failed", "preempted"):
                break  # another rank knows
            time.sleep(0.1)
        if not gone and (silent := silent_ranks(self.folder, others, self.ranks.rank)):
            return describe_silent(silent[0]), node_of(silent[0])
        if not gone:
            return f"{UNCERTAIN}, or its machine or the network: {self._me()} met {first_line(error)}", ""
        return describe_vanished(gone[0]), node_of(gone[0])

    def _me(self) -> str:
        return f"rank {self.ranks.rank} on {socket.gethostname()}"

    def _say_on_terminal(self, text: str) -> None:
        print(f"{self._me()}: {text}", file=sys.stderr, flush=True)

    def _append_to_log(self, text: str) -> None:
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S%z')} {one_line(text)}\n".encode("utf-8", "backslashreplace")
        with contextlib.suppress(OSError), open(self.folder.log, "ab") as log:  # the disk is full
            log.write(line)


def is_storage(error: BaseException) -> bool:
    """Whether a file could not be read or written: its name is in the error, as in no error of a network."""
    return isinstance(error, OSError) and error.errno is not None and error.filename is not None


def is_lost_gpu(error: BaseException) -> bool:
    """Whether the device itself has failed, known only by the driver's words."""
    return isinstance(error, RuntimeError) and GPU_IS_LOST.search(str(error)) is not None


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another process, its machine or the network is gone.

    torch.distributed's own errors are; gloo's come as plain RuntimeErrors, known only by their words.
    """
    if isinstance(error, dist.DistError):
        return True
    return type(error) is RuntimeError and PEER_IS_GONE.search(str(error)) is not None


def describe_vanished(beat: dict[str, Any]) -> str:
    """The reason for a rank of which only its last heartbeat is left."""
    return (
        f"rank {beat['rank']} on {beat['host']} (pid {beat['pid']}) vanished: killed, probably for memory, or crashed; "
        f"it last held {beat['rss_gib']:.2f} GiB (step {beat['step']}, {beat['phase']})"
    )


def describe_silent(beat: dict[str, Any]) -> str:
    """The reason for a rank that is alive and does nothing."""
    return (
        f"rank {beat['rank']} on {beat['host']} (pid {beat['pid']}) is frozen, or stuck in the kernel: no sign of life "
        f"for {time.time() - beat['time']:.0f} s (step {beat['step']}, {beat['phase']})"
    )


def first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
