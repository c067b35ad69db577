"""Connections by nat go on, or end by a reset, whatever conntrack knows about their segments."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from pyroute2.netlink.nfnetlink.nfctsocket import NFCTSocket

from lab.netns import Namespace
from lab.segments import recorded, send_outside_of_window
from lab.waiting import wait_until
from tests.kernel.crossings import listening
from tests.kernel.street import HOST4, HOST6, NEIGHBOUR4, Street

_PORT = 81
_PATIENCE_S = 5.0


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


def assert_reset_by_sending(end: socket.socket) -> None:
    """Send something, which an end of a connection that is not known any more learns of by a reset."""
    end.sendall(b"hello")
    with pytest.raises(ConnectionResetError):
        end.recv(100)


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


def _entry_timeout_s(host: Namespace, client: socket.socket) -> int:
    """Return after how many seconds of silence conntrack forgets a client's connection."""
    family, kind = (socket.AF_INET6, "V6") if client.family == socket.AF_INET6 else (socket.AF_INET, "V4")
    with host.entered(), NFCTSocket(nfgen_family=family) as conntrack:
        for message in conntrack.dump():
            original = message.get_attr("CTA_TUPLE_ORIG")
            source = original.get_attr("CTA_TUPLE_IP").get_attr(f"CTA_IP_{kind}_SRC")
            port = original.get_attr("CTA_TUPLE_PROTO").get_attr("CTA_PROTO_SRC_PORT")
            if (source, port) == client.getsockname()[:2]:
                return int(message.get_attr("CTA_TIMEOUT"))
    return 0


@pytest.mark.parametrize("address", [HOST4, HOST6])
@pytest.mark.parametrize("client_space", ["neighbour", "host"])
def test_a_half_closed_connection_is_tracked_for_an_hour(
    street: Street, port: int, listener: socket.socket, client_space: str, address: str
) -> None:
    space = {"neighbour": street.neighbour, "host": street.host}[client_space]
    with connection(space, address, port, listener) as (client, served):
        client.shutdown(socket.SHUT_WR)
        assert served.recv(100) == b""
        wait_until(lambda: 3500 < _entry_timeout_s(street.host, client) <= 3600, "a long timeout", _PATIENCE_S)


def _forget_connections(host: Namespace) -> None:
    for family in (socket.AF_INET, socket.AF_INET6):
        with host.entered(), NFCTSocket(nfgen_family=family) as conntrack:
            conntrack.flush()


@pytest.mark.parametrize("address", [HOST4, HOST6])
@pytest.mark.parametrize("first", ["client", "server"])
def test_a_forgotten_connection_goes_on(
    street: Street, firewall: str, port: int, listener: socket.socket, first: str, address: str
) -> None:
    with connection(street.neighbour, address, port, listener) as (client, served):
        _forget_connections(street.host)
        if first == "client":
            exchange(client, served)
        elif firewall == "nftables":
            exchange(served, client)
        else:  # both ends learn that it has ended, the client when it sends something
            assert_reset_by_sending(served)
            assert_reset_by_sending(client)


def test_a_forgotten_connection_of_a_port_published_twice_is_reset(
    street: Street, port: int, listener: socket.socket
) -> None:
    (second,) = street.publish(street.server, f"{HOST4}::{_PORT}")
    try:
        with (
            connection(street.neighbour, HOST4, port, listener) as (client, served),
            recorded(street.neighbour, "eth0") as recorder,
        ):
            _forget_connections(street.host)
            assert_reset_by_sending(served)
            assert_reset_by_sending(client)
            segments = list(recorder.segments())
        assert {one.source for one in segments if one.source[0] != NEIGHBOUR4} == {(HOST4, port)}
    finally:
        street.gangway("unpublish", street.server.name, "-p", f"{HOST4}:{second}:{_PORT}")
