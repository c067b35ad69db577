"""Who has a port of many: what the kernel tells of sockets that are in the way."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from gangway.host import sockets as ports

KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}


@contextmanager
def somebody(protocol: str, address: str, v6only: bool = True) -> Iterator[int]:
    """Has a port; which one."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, KINDS[protocol]) as sock:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, v6only)
        sock.bind((address, 0))
        if protocol == "tcp":
            sock.listen()
        yield sock.getsockname()[1]


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize(
    ("at", "asked", "is_taken"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("127.0.0.1", "0.0.0.0", True),
        ("0.0.0.0", "127.0.0.1", True),
        ("127.0.0.1", "127.0.0.2", False),
        ("127.0.0.1", "::", False),
        ("::1", "::1", True),
        ("::1", "::", True),
        ("::", "::1", True),
        ("::1", "0.0.0.0", False),
        ("::", "0.0.0.0", False),
        ("::", "127.0.0.1", False),
    ],
)
def test_a_port_is_taken_where_its_socket_is_in_the_way(protocol: str, at: str, asked: str, is_taken: bool) -> None:
    with somebody(protocol, at) as port:
        assert ports.taken(protocol, asked, port, port) == (port if is_taken else None)


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize("asked", ["0.0.0.0", "127.0.0.1", "::", "::1"])
def test_a_socket_of_both_families_is_in_the_way_of_both(protocol: str, asked: str) -> None:
    with somebody(protocol, "::", v6only=False) as port:
        assert ports.taken(protocol, asked, port, port) == port


@pytest.mark.parametrize(("protocol", "other"), [("tcp", "udp"), ("udp", "tcp")])
def test_a_port_of_one_protocol_is_none_of_the_other(protocol: str, other: str) -> None:
    with somebody(protocol, "127.0.0.7") as port:
        assert ports.taken(other, "127.0.0.7", port, port) is None


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_of_several_the_lowest_is_told(protocol: str) -> None:
    """Others on this host may have ports, too."""
    with ExitStack() as stack:
        first, second, third = sorted(stack.enter_context(somebody(protocol, "127.0.0.8")) for _ in range(3))
        assert ports.taken(protocol, "127.0.0.8", first, 65535) == first
        found = ports.taken(protocol, "127.0.0.8", first + 1, third)
        assert found is not None
        assert first < found <= second


def test_a_connection_is_not_in_the_way() -> None:
    with socket.create_server(("127.0.0.9", 0)) as server, socket.socket() as client:
        client.bind(("127.0.0.8", 0))
        client.connect(server.getsockname())
        port = client.getsockname()[1]
        assert ports.taken("tcp", "127.0.0.8", port, port) is None


def test_a_udp_socket_that_is_connected_is_not_in_the_way() -> None:
    """It is found by its peer before anybody is steered."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.bind(("127.0.0.8", 0))
        client.connect(("127.0.0.9", 9))
        port = client.getsockname()[1]
        assert ports.taken("udp", "127.0.0.8", port, port) is None


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_a_socket_that_nobody_can_ask_is_in_nobodys_way(protocol: str, family: int) -> None:
    with ports.nowhere(protocol, family) as sock:
        port = sock.getsockname()[1]
        assert ports.taken(protocol, {4: "0.0.0.0", 6: "::"}[family], port, port) is None
        with socket.socket(sock.family, sock.type) as other:
            other.bind(({4: "127.0.0.8", 6: "::1"}[family], port))
