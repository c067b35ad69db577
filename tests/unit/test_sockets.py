"""Which sockets conflict with a host port, and what a user reads about them."""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import Mock

import pytest

from gangway.errors import Conflict, PortInUse
from gangway.host.sockets import (
    bind_port,
    bind_unreachable,
    bound_ports,
    describe_holder,
    first_port_in_use,
    no_raw,
    open_raw,
)

KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}


@contextmanager
def bound(protocol: str, address: str, v6only: bool = True) -> Iterator[int]:
    """Bind a free port for a `with` block; listen, if it is TCP's."""
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
    ("at", "wanted", "conflicts"),
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
def test_a_port_is_in_use_where_its_socket_conflicts(protocol: str, at: str, wanted: str, conflicts: bool) -> None:
    with bound(protocol, at) as port:
        assert first_port_in_use(protocol, wanted, port, port) == (port if conflicts else None)


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize("wanted", ["0.0.0.0", "127.0.0.1", "::", "::1"])
def test_a_dual_stack_socket_conflicts_in_both_families(protocol: str, wanted: str) -> None:
    with bound(protocol, "::", v6only=False) as port:
        assert first_port_in_use(protocol, wanted, port, port) == port


@pytest.mark.parametrize(("protocol", "other"), [("tcp", "udp"), ("udp", "tcp")])
def test_a_port_of_one_protocol_is_free_for_the_other(protocol: str, other: str) -> None:
    with bound(protocol, "127.0.0.7") as port:
        assert first_port_in_use(other, "127.0.0.7", port, port) is None


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_the_lowest_port_in_use_is_returned(protocol: str) -> None:
    """Other programs on this host may use ports of the range, too."""
    with ExitStack() as stack:
        first, second, third = sorted(stack.enter_context(bound(protocol, "127.0.0.8")) for _ in range(3))
        assert first_port_in_use(protocol, "127.0.0.8", first, 65535) == first
        found = first_port_in_use(protocol, "127.0.0.8", first + 1, third)
        assert found is not None
        assert first < found <= second


def test_a_connection_does_not_conflict() -> None:
    with socket.create_server(("127.0.0.9", 0)) as server, socket.socket() as client:
        client.bind(("127.0.0.8", 0))
        client.connect(server.getsockname())
        port = client.getsockname()[1]
        assert first_port_in_use("tcp", "127.0.0.8", port, port) is None


def test_a_connected_udp_socket_does_not_conflict() -> None:
    """The kernel finds it by its peer before it steers a datagram."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.bind(("127.0.0.8", 0))
        client.connect(("127.0.0.9", 9))
        port = client.getsockname()[1]
        assert first_port_in_use("udp", "127.0.0.8", port, port) is None


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_an_unreachable_socket_conflicts_with_nothing(protocol: str, family: int) -> None:
    with bind_unreachable(protocol, family) as sock:
        port = sock.getsockname()[1]
        assert first_port_in_use(protocol, {4: "0.0.0.0", 6: "::"}[family], port, port) is None
        with socket.socket(sock.family, sock.type) as other:
            other.bind(({4: "127.0.0.8", 6: "::1"}[family], port))


@pytest.mark.parametrize(("family", "loopback"), [(4, "127.0.0.1"), (6, "::1")])
def test_raw_socket_receives_nothing_for_a_process_without_privileges(family: int, loopback: str) -> None:
    """Also if that binds it to an address of the host, or tries to remove the filter."""
    with open_raw(family) as raw, bound("udp", loopback) as port:
        raw.setblocking(False)
        for _ in range(2):
            with socket.socket(raw.family, socket.SOCK_DGRAM) as client:
                client.sendto(b"secret", (loopback, port))
            with pytest.raises(BlockingIOError):
                raw.recv(100)
            raw.bind((loopback, 0))
            with pytest.raises(PermissionError):
                raw.setsockopt(socket.SOL_SOCKET, 27, 0)  # SO_DETACH_FILTER


def test_why_there_are_no_raw_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    assert no_raw() == ""
    refused = PermissionError(errno.EPERM, "Operation not permitted")
    monkeypatch.setattr(socket, "socket", Mock(side_effect=refused))
    no_raw.cache_clear()
    assert no_raw() == "cannot open a raw socket, which takes CAP_NET_RAW: Operation not permitted"
    no_raw.cache_clear()


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize("at", ["127.0.0.8", "::1", "0.0.0.0"])
def test_a_port_in_use_is_refused_and_its_holder_described(protocol: str, at: str) -> None:
    with bound(protocol, at) as port:
        written = f"[{at}]:{port}" if ":" in at else f"{at}:{port}"
        with pytest.raises(PortInUse) as refused:
            bind_port(protocol, at, port)
        assert str(refused.value) == f"port {written}/{protocol} is in use"
        assert port in bound_ports(protocol)
        with open("/proc/self/comm") as comm:
            own = f"{comm.read().strip()} (pid {os.getpid()})"
        said = describe_holder(protocol, at, port)
        assert said == f"port {written}/{protocol} is in use: choose another port, or stop {own}, which listens on it"
        if at == "0.0.0.0":
            said = describe_holder(protocol, "127.0.0.8", port)
            assert said.endswith(f"or stop {own}, which listens on 0.0.0.0:{port}")


def test_an_invisible_holder_is_not_named() -> None:
    said = describe_holder("sctp", "127.0.0.8", 9)
    assert said.endswith("choose another port, or stop the program that listens on it (gangway cannot see which)")


def test_an_address_of_another_host_is_a_conflict() -> None:
    with pytest.raises(Conflict, match=r"192\.0\.2\.77 is not an address of this host"):
        bind_port("tcp", "192.0.2.77", 0)
