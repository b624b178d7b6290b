"""Where the launchers of a run find each other, and their ranks: a replacement for torchrun's rendezvous.

torchrun's c10d rendezvous, which --standalone takes too, listens at all addresses and unpickles what is sent there,
which executes it. Here the launcher of a single machine meets nobody and keeps its state in its own memory; its
ranks share a file (`model.meeting`). Across machines the first one listens at the one address that the others connect
to, and nothing is unpickled, as in torchrun's static rendezvous.
"""

import argparse
import os
import sys
import uuid
from datetime import timedelta
from pathlib import Path

from torch.distributed import HashStore, PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

from common.addresses import LOOPBACK, own_address
from common.errors import UserError
from model.meeting import MEETING_KEY, STORE_FILE, stay_on_this_machine, tcp_store
from train.launching.launch_options import meeting_address

BACKEND = "longhaul"
PATIENCE_SECONDS = 600  # how long to wait for the other launchers, as in torchrun's static rendezvous


class Meeting(RendezvousHandler):
    """One meeting of the run's launchers, at a store that the first of them hosts."""

    def __init__(self, run_id: str, rank: int, launchers: int, address: tuple[str, int], patience: timedelta) -> None:
        self._run_id = run_id
        self._rank = rank
        self._launchers = launchers
        self._address = address
        self._patience = patience
        self._store: Store | None = None  # kept: its host must not close it

    def next_rendezvous(self) -> RendezvousInfo:
        """Raises UserError where the port is taken."""
        host, port = self._address
        first, several = self._rank == 0, self._launchers > 1
        try:
            hosted = tcp_store(host, port, self._launchers if several else None, self._patience, hosting=first)
        except OSError as error:
            why = os.strerror(error.errno) if error.errno else error
            raise UserError(f"{host}:{port} can't be listened at ({why}): give another --master_port") from None
        self._store = hosted
        # a launcher without others needs no store
        store = PrefixStore(self._run_id, hosted) if several else HashStore()
        where = RendezvousStoreInfo((first and own_address(host)) or host, hosted.port)
        return RendezvousInfo(store, self._rank, self._launchers, where)

    @property
    def use_agent_store(self) -> bool:
        """By ranks that torch is to connect, which have MASTER_ADDR and MASTER_PORT."""
        return True

    def get_backend(self) -> str:
        return BACKEND

    def get_run_id(self) -> str:
        return self._run_id

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def shutdown(self) -> bool:
        return True


def arrange(options: argparse.Namespace, folder: Path) -> None:
    """Have torchrun meet by this module's rendezvous, and pass its place to the ranks in their environment.

    Args:
        options: torchrun's, as `read_options` gives them; changed.
        folder: for the file that the ranks of one machine share. Nobody but the user may enter it.
    """
    launchers = int(options.nnodes)
    for name in (STORE_FILE, MEETING_KEY):  # another launch's, around this one
        os.environ.pop(name, None)
    if launchers == 1:
        address, options.rdzv_id, options.node_rank = (LOOPBACK, 0), uuid.uuid4().hex, 0
        os.environ[STORE_FILE] = str(folder / "store")
        stay_on_this_machine(os.environ)
    else:
        address = meeting_address(options)
        os.environ[MEETING_KEY] = options.rdzv_id
        if options.node_rank == 0 and own_address(address[0]) is None:
            print(
                f"WARNING: {address[0]} stands for no address of this machine that others could reach: listening at "
                "all of its addresses (with an address as --master_addr only at that one)",
                file=sys.stderr, flush=True,
            )  # fmt: skip
    rank = options.node_rank

    def create(parameters: RendezvousParameters) -> RendezvousHandler:
        patience = timedelta(seconds=parameters.get_as_int("timeout", PATIENCE_SECONDS) or PATIENCE_SECONDS)
        return Meeting(parameters.run_id, rank, launchers, address, patience)

    rendezvous_handler_registry.register(BACKEND, create)
    options.standalone, options.rdzv_backend, options.node_rank = False, BACKEND, 0  # torchrun's are for its own ways
    options.rdzv_endpoint = f"{address[0]}:{address[1]}"
