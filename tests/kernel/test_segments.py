"""Connections by nat go on, or end by a reset, whatever conntrack knows about their segments."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lab.netns import Namespace
from lab.segments import recorded, send_outside_of_window
from tests.kernel.crossings import listening
from tests.kernel.street import HOST4, HOST6, NEIGHBOUR4, Street

_PORT = 81
_PATIENCE_S = 5.0


@pytest.fixture(scope="module", params=["nftables", "iptables"])
def street(request: pytest.FixtureRequest) -> Iterator[Street]:
    with Street("--firewall", request.param) as made:
        yield made


@pytest.fixture(scope="module")
def port(street: Street) -> Iterator[int]:
    with street.published(street.server, str(_PORT)) as port:
        yield port


@pytest.fixture
def listener(street: Street) -> Iterator[socket.socket]:
    with listening(street.server, "tcp", [_PORT]) as found:
        yield found[_PORT]


@contextmanager
def connection(
    space: Namespace, address: str, port: int, listener: socket.socket
) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Connect a client in `space`; yield its socket and the server's."""
    with space.entered():
        client = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    with client:
        client.settimeout(_PATIENCE_S)
        client.connect((address, port))
        with listener.accept()[0] as served:
            served.settimeout(_PATIENCE_S)
            exchange(client, served)
            yield client, served


def exchange(client: socket.socket, served: socket.socket) -> None:
    """Send some bytes in both directions."""
    for sender, receiver in ((client, served), (served, client)):
        sender.sendall(b"hello")
        assert receiver.recv(100) == b"hello"


@pytest.mark.parametrize("address", [HOST4, HOST6])
@pytest.mark.parametrize("client_space", ["neighbour", "host", "near"])
def test_a_stray_segment_does_not_end_a_connection(
    street: Street, port: int, listener: socket.socket, client_space: str, address: str
) -> None:
    space = {"neighbour": street.neighbour, "host": street.host, "near": street.near.space}[client_space]
    with connection(space, address, port, listener) as (client, served):
        send_outside_of_window(space, client)
        exchange(client, served)
        send_outside_of_window(street.server.space, served)
        exchange(client, served)


def test_a_containers_stray_segment_does_not_leave_the_host(street: Street, port: int, listener: socket.socket) -> None:
    with (
        connection(street.neighbour, HOST4, port, listener) as (client, served),
        recorded(street.neighbour, "eth0") as recorder,
    ):
        send_outside_of_window(street.server.space, served)
        exchange(client, served)
        segments = list(recorder.segments())
    assert {one.source[0] for one in segments} == {HOST4, NEIGHBOUR4}


@pytest.mark.parametrize(("address", "headers"), [(HOST4, 40), (HOST6, 60)])
def test_segments_fit_the_route_of_the_client(
    street: Street, port: int, listener: socket.socket, address: str, headers: int
) -> None:
    """The client's own link does not show what the host's route to it carries."""
    street.host.ip("link", "set", "eth0", "mtu", "1400")
    try:
        with connection(street.neighbour, address, port, listener) as ends:
            sizes = [end.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG) for end in ends]
    finally:
        street.host.ip("link", "set", "eth0", "mtu", "1500")
    timestamps = 12
    assert sizes == [1400 - headers - timestamps] * 2
