"""Listening on this machine: only at the address that others connect to, not at all of its addresses."""

import ipaddress
import socket

import psutil

LOOPBACK = "127.0.0.1"


def own_address(host: str) -> str | None:
    """The address of this machine that `host` stands for, at which others can reach it.

    None where it stands for none: for another machine, for a virtual address in front of this one, for nothing; or, as
    a machine's own name often does on the machine itself, for loopback, which nobody else can reach.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return None
    means_loopback = host == "localhost" or any(host == address[0] for *_, address in found)
    for family, kind, protocol, _, address in found:
        if is_loopback(str(address[0])) and not means_loopback:
            continue
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.bind(address)
            except OSError:
                continue
        return str(address[0])
    return None


def listen_at(host: str, port: int, *, backlog: int = 128) -> socket.socket:
    """A socket that listens at this machine's address that `host` stands for; at all of them where it stands for none.

    Args: port: 0 for any that is free.

    Raises OSError where the port is taken.
    """
    address = own_address(host)
    if address is None:
        return socket.create_server(("", port), backlog=backlog)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, port), family=family, backlog=backlog)


def is_loopback(address: str) -> bool:
    """Whether an address in digits is one of this machine's that nobody else can reach."""
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False


def loopback_interface() -> str:
    """The name of the loopback interface."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == LOOPBACK for entry in addresses):
            return str(name)
    return "lo"
