"""Where the ranks of a run find each other: a store for what they exchange, and the addresses they listen at.

It decides who may take part. Ranks that train/launch.py has started on one machine share a file that only their user
can open, and listen at loopback. Across machines whoever reaches the store's port can read and change what is in it
(docs/cluster.md), but none of it is ever executed.
"""

import os
from collections.abc import Mapping, MutableMapping
from datetime import timedelta

from torch.distributed import FileStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from common.addresses import is_loopback, listen_at, loopback_interface, own_address
from model.rank_environment import Place, meeting_address

STORE_FILE = "LONGHAUL_STORE"  # in the environment of ranks that are all on one machine: the file that they share
MEETING_KEY = "LONGHAUL_MEETING_KEY"  # of ranks on several: the prefix of their entries in the store


def stay_on_this_machine(environment: MutableMapping[str, str]) -> None:
    """Have gloo and NCCL listen only at loopback, whatever a site has set for runs on many machines."""
    environment["GLOO_SOCKET_IFNAME"] = environment["NCCL_SOCKET_IFNAME"] = loopback_interface()
    environment.pop("NCCL_SOCKET_FAMILY", None)  # NCCL passes over loopback in version 6


def open_store(environment: MutableMapping[str, str], place: Place, timeout: timedelta) -> Store | None:
    """The store of this run's ranks; None where plain torchrun or srun has started them: torch then uses its own.

    Raises UserError where MASTER_ADDR and MASTER_PORT are needed and missing, OSError where the port is taken, and
    DistError where the store can't be reached.
    """
    if path := environment.get(STORE_FILE):
        stay_on_this_machine(environment)
        store: Store = FileStore(path, place.world_size)
        store.set_timeout(timeout)
        return store
    key = environment.get(MEETING_KEY)
    if not key:
        return None
    host, port = meeting_address(environment)
    of_the_launcher = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if is_loopback(host):  # srun on one node
        stay_on_this_machine(environment)
    store = tcp_store(host, port, place.world_size, timeout, hosting=place.rank == 0 and not of_the_launcher)
    return PrefixStore(key, store)


def tcp_store(host: str, port: int, members: int | None, timeout: timedelta, *, hosting: bool) -> TCPStore:
    """A store at HOST:PORT. The process that hosts it listens only at that address (see `listen_at`).

    Args: members: how many open it, whom the host waits for; None: it waits for nobody.

    Raises OSError where the port is taken, DistError where nobody answers.
    """
    libuv = os.environ.get("USE_LIBUV", "1") == "1"
    if not hosting:
        return TCPStore(host, port, members, False, timeout, use_libuv=libuv)
    listener = listen_at(host, port)
    return TCPStore(
        own_address(host) or host,  # where it calls itself
        listener.getsockname()[1],
        members,
        True,
        timeout,
        master_listen_fd=listener.detach(),  # the store's from here on
        use_libuv=libuv,
    )


def describe_meeting(environment: Mapping[str, str]) -> str:
    """Where the ranks meet, in words. Raises UserError where no variable names it."""
    if path := environment.get(STORE_FILE):
        return path
    host, port = meeting_address(environment)
    return f"{host}:{port}"
