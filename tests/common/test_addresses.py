"""Which address of this machine a name stands for, and that nothing else is listened at."""

import socket

import psutil
import pytest

from common.addresses import is_loopback, listen_at, loopback_interface, own_address


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("127.0.0.2", "127.0.0.2"),
        ("localhost", "127.0.0.1"),
        ("192.0.2.1", None),  # for documentation: nobody's
        ("no-such-host.invalid", None),
        ("", None),
        ("a" * 300, None),
    ],
)
def test_a_host_s_address_on_this_machine(host: str, address: str | None) -> None:
    assert own_address(host) == address


def test_a_name_that_means_this_machine_only_here_is_no_address_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    # what Debian writes into /etc/hosts for a machine's own name, which may stand for another address there as well
    here = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **keywords: [here])
    assert own_address("node-17") is None
    assert own_address("127.0.1.1") == "127.0.1.1"


@pytest.mark.parametrize(("host", "heard_at"), [("127.0.0.2", "127.0.0.2"), ("no-such-host.invalid", "0.0.0.0")])
def test_only_the_host_s_address_is_listened_at(host: str, heard_at: str) -> None:
    with listen_at(host, 0) as listener:
        port = listener.getsockname()[1]
        (place,) = [place for place in psutil.Process().net_connections() if place.laddr.port == port]
        assert (place.status, place.laddr.ip) == ("LISTEN", heard_at)


def test_loopback_is_known() -> None:
    assert loopback_interface() == "lo" or loopback_interface().startswith("lo")
    assert [is_loopback(text) for text in ("127.0.0.9", "::1", "10.0.0.1", "localhost")] == [True, True, False, False]
