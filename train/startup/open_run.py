"""The first phase of a start: meet the other ranks, open the data, handle signals, lock the run's folder."""

import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial

from common.errors import UserError
from common.run_folder import RunFolder
from common.run_note import leave_note
from data_prep.token_sets.token_mix import sources_of
from data_prep.token_sets.token_set import TokenSet
from model.devices import share_threads, visible_gpus
from model.lora_config import LoraConfig
from model.rank_environment import place_of_this_process
from model.ranks import Ranks, agreed, start_ranks
from train.batches.local_copy import stage_all
from train.batches.training_sequences import prepare_packing
from train.run.lock import RunLock
from train.run.provenance import read_starts
from train.settings.sections import RunConfig
from train.startup.from_checkpoint import FromCheckpoint
from train.startup.initial_weights import FromScratch
from train.startup.request import Request
from train.stopping.deadline import Deadline, StopMargin, check_deadline, open_deadline
from train.stopping.stop_requests import LauncherWatch, StopRequest


@dataclass(frozen=True)
class OpenRun:
    """Everything that one process has opened for a run.

    Attributes:
        request: what was asked for, its data staged, its weights settled.
        threads: of this rank's CPU work.
        stop: what has requested a stop.
        lock: the run's, held by the first rank.
        margin: how long a clean exit may take.
        deadline: by when all ranks must have exited.
        in_place: by host, why its ranks read data in place that were to be staged.
    """

    request: Request
    ranks: Ranks
    threads: int
    stop: StopRequest
    lock: RunLock
    margin: StopMargin
    deadline: Deadline
    in_place: dict[str, str]


@contextmanager
def open_run(request: Request) -> Iterator[OpenRun]:
    """All ranks call. Raises UserError on all of them, having touched nothing, where the run can't be opened."""
    with closing(LauncherWatch()) as watch:
        config, folder = request.config, request.folder

        # Meet the other ranks
        refuse_lost_gpus(folder, config.run)
        place = place_of_this_process()
        leave_note(None, place.rank, place.world_size, config.run.hang_limit_seconds)
        ranks = start_ranks(config.run.device, timeout_seconds=config.run.collective_timeout_seconds)
        threads = share_threads(ranks.local_world_size)

        # Take the data: verified, and copied to the node's own disk where that is asked for
        tokens, in_place = request.tokens, dict[str, str]()
        if config.data.verify == "full":
            for source in sources_of(tokens):
                agreed(ranks, partial(verify, source.tokens))
        if config.data.stage_to is not None:
            tokens, in_place = stage_all(tokens, config.data.stage_to, ranks, config.data.verify)
        if config.data.is_packed:
            prepare_packing(tokens, config.model.block_size, ranks)

        # Handle signals, the STOP file and the deadline from here on
        agreed(ranks, lambda: check_deadline(config.run.deadline))
        margin = StopMargin(config.run.deadline_margin_seconds)
        deadline = open_deadline(config.run.deadline if ranks.is_first else None, margin)
        stop = StopRequest(folder, watch_file=ranks.is_first, deadline=deadline.is_near)
        watch.lead_to(stop, margin.seconds_to_leave)

        with stop.listening(), closing(deadline), holding_lock(folder, config.run, ranks, stop) as lock:
            # Another start may have started the run before the lock was held
            weights = agreed(ranks, lambda: request.weights.settled(folder), FromScratch, FromCheckpoint, LoraConfig)
            request = replace(request, tokens=tokens, weights=weights)
            yield OpenRun(request, ranks, threads, stop, lock, margin, deadline, in_place)
            ranks.close()


def verify(tokens: TokenSet) -> None:
    """Raises UserError where a set's bytes are not what was prepared."""
    TokenSet.open(tokens.folder, verify="full")


def refuse_lost_gpus(folder: RunFolder, config: RunConfig) -> None:
    """Raises UserError where a run that was trained on GPUs would be resumed on a CPU that nobody has asked for."""
    if config.device != "auto" or visible_gpus():
        return
    *_, last = [{}, *read_starts(folder.provenance)]
    ranks = last.get("ranks")
    devices = [rank.get("device") for rank in ranks if isinstance(rank, dict)] if isinstance(ranks, list) else []
    if any(str(device).startswith("cuda") for device in devices):
        raise UserError(
            f"{folder.path} was trained on GPUs at its last start, and PyTorch sees none on {socket.gethostname()}: "
            "look at nvidia-smi or rocm-smi there, or give --run.device cpu to resume on the CPU"
        )


@contextmanager
def holding_lock(folder: RunFolder, config: RunConfig, ranks: Ranks, stop: StopRequest) -> Iterator[RunLock]:
    """Keep other trainers out of the run's folder inside the block. All ranks call, and know the lock's token.

    Raises UserError on all ranks, having touched nothing, where another trainer is at work, or something else is where
    the run has its files.
    """
    lock = RunLock(folder.path, config.lock_patience_seconds)

    def take() -> str:
        folder.refuse_what_is_no_file()
        return lock.take(give_up=lambda: stop.code() != 0)

    taken_over = agreed(ranks, take)
    lock.token = ranks.from_first(lock.token)
    if taken_over and ranks.is_first:
        print(taken_over, flush=True)
    try:
        yield lock
    finally:
        lock.release()
