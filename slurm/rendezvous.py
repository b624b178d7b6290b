"""Where the ranks of a job meet: the head node's address, and a port that no other job and no earlier start uses."""

import ipaddress
import socket
from pathlib import Path

import psutil

from common.errors import UserError
from slurm.history import StartId

LOWEST_PORT = 10_000
HIGHEST_PORT = 65_535
PORTS_PER_JOB = 13  # of one job's starts; neighbouring jobs are as far apart
EPHEMERAL_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
PROBE_PORT = 9  # discard; nothing is sent


def port_range(ephemeral: tuple[int, int]) -> range:
    """Ports that the system never assigns by itself: below the ephemeral range, or above it, or all."""
    low, high = ephemeral
    if low > LOWEST_PORT + 1000:
        return range(LOWEST_PORT, low)
    if high < HIGHEST_PORT - 1000:
        return range(high + 1, HIGHEST_PORT + 1)
    return range(LOWEST_PORT, HIGHEST_PORT + 1)


def ephemeral_ports() -> tuple[int, int]:
    try:
        low, high = EPHEMERAL_PORTS.read_text(encoding="utf-8").split()
    except OSError:
        return 32_768, 60_999
    return int(low), int(high)


def choose_port(start: StartId, ports: range) -> int:
    """The start's own port, or the next one that is free on this machine.

    Raises UserError where none is.
    """
    first = int(start.job_id or 0) * PORTS_PER_JOB + start.restart_count
    for attempt in range(len(ports)):
        port = ports[(first + attempt) % len(ports)]
        if is_free(port):
            return port
    raise UserError(
        f"no TCP port of {ports.start} to {ports.stop - 1} is free on {socket.gethostname()}: submit again, to other "
        "nodes"
    )


def is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def own_address_towards(other: str) -> str | None:
    """This machine's address on the way to `other`; None where `other` can't be found.

    A machine's own name may stand for 127.0.1.1 on the machine itself, and its name in Slurm for nothing at all. The
    route to another node starts at an address that the other can answer to. Only to this very machine it is 127.0.0.1.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(other, PROBE_PORT, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # sends nothing: UDP
            return str(probe.getsockname()[0])
    except OSError:
        return None


def head_address(node: str, others: list[str]) -> str:
    """The address at which the other nodes should reach this one, the head; its name in Slurm where none is found."""
    found = [address for other in others if (address := own_address_towards(other)) is not None]
    return found[0] if found else node


def interface_to(other: str) -> str | None:
    """The network interface on the way to `other`, by name."""
    address = own_address_towards(other)
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            return name
    return None


def own_name_is_useless() -> bool:
    """Whether this machine's host name resolves only to loopback (127.*), or to nothing.

    gloo sends its peers the address that the host name resolves to.
    """
    try:
        return ipaddress.ip_address(socket.gethostbyname(socket.gethostname())).is_loopback
    except OSError:
        return True
