"""UDP flows that were begun before a port was published, or withdrawn: they move to the new road."""

import socket
from collections.abc import Iterator
from contextlib import closing, suppress

import pytest

from lab.netns import Namespace
from lab.waiting import wait_until
from tests.kernel.street import HOST4, HOST6, NEIGHBOUR4, NEIGHBOUR6, Street

pytestmark = pytest.mark.any_kernel

_PORT = 8080
_PAUSE_S = 0.2


@pytest.fixture(scope="module", params=["nftables", "iptables", "none"])
def street(request: pytest.FixtureRequest) -> Iterator[Street]:
    with Street("--firewall", request.param) as made:
        yield made


class Sender:
    """A client that keeps its socket, hence its flow."""

    def __init__(self, space: Namespace, address: str) -> None:
        with space.entered():
            self._sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
            self._sock.connect((address, _PORT))
        self._sock.settimeout(_PAUSE_S)

    def close(self) -> None:
        """The end of the flow."""
        self._sock.close()

    def ask(self) -> str:
        """The answer; empty if there is none soon."""
        with suppress(OSError):
            self._sock.send(b"hello\n")
            return self._sock.recv(1000).decode().strip()
        return ""

    def is_answered(self, answer: str) -> None:
        """Goes on asking until the answer is this one."""
        wait_until(lambda: self.ask() == answer, f"{answer!r}", 3)


def _server(host: Namespace, address: str) -> socket.socket:
    with host.entered():
        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind((address, _PORT))
    sock.settimeout(3)
    return sock


def _serve_one(server: socket.socket, sender: Sender) -> None:
    """The host's own server answers one datagram of the flow, so the kernel takes the flow for established."""
    wait_until(lambda: sender.ask() or _answer(server), "a datagram", 3)
    assert sender.ask() in ("mine", "")
    _answer(server)


def _answer(server: socket.socket) -> bool:
    data, peer = server.recvfrom(1000)
    assert data == b"hello\n"
    server.sendto(b"mine", peer)
    return True


CLIENTS = pytest.mark.parametrize("client", ["neighbour4", "neighbour6", "host4", "loopback", "container"])


def _asked(street: Street, client: str) -> tuple[Namespace, str, str]:
    """Where a client is, what it asks, and what the container sees of it where there are rules."""
    return {
        "neighbour4": (street.neighbour, HOST4, NEIGHBOUR4),
        "neighbour6": (street.neighbour, HOST6, NEIGHBOUR6),
        "host4": (street.host, HOST4, HOST4),
        "loopback": (street.host, "127.0.0.1", "172.30.0.1"),
        "container": (street.far.space, HOST4, street.far.address4),
    }[client]


def _seen(street: Street, address: str, source: str) -> str:
    if street.gangway.json("explain", f"{HOST4}:{_PORT}/udp", "--from", "remote")[0]["firewall"] == "none":
        source = "fd30::1" if ":" in address else "172.30.0.1"
    return f"{source} hello"


@CLIENTS
def test_a_client_that_nobody_has_answered_is_answered_once_the_port_is_published(street: Street, client: str) -> None:
    space, address, source = _asked(street, client)
    with closing(Sender(space, address)) as sender:
        assert [sender.ask() for _ in range(3)] == [""] * 3
        with street.published(street.server, f"{_PORT}:80/udp"):
            sender.is_answered(_seen(street, address, source))


@CLIENTS
def test_a_flow_to_a_server_of_the_hosts_goes_to_the_container_once_the_port_is_published(
    street: Street, client: str
) -> None:
    space, address, source = _asked(street, client)
    with closing(Sender(space, address)) as sender:
        with closing(_server(street.host, address)) as server:
            _serve_one(server, sender)
        with street.published(street.server, f"{_PORT}:80/udp"):
            sender.is_answered(_seen(street, address, source))


@CLIENTS
def test_a_flow_to_a_container_goes_to_the_hosts_server_once_the_port_is_withdrawn(street: Street, client: str) -> None:
    space, address, source = _asked(street, client)
    with closing(Sender(space, address)) as sender:
        with street.published(street.server, f"{_PORT}:80/udp"):
            sender.is_answered(_seen(street, address, source))
        with closing(_server(street.host, address)) as server:
            _serve_one(server, sender)


@CLIENTS
def test_a_flow_to_a_container_goes_to_another_one_once_the_port_is_that_ones(street: Street, client: str) -> None:
    space, address, source = _asked(street, client)
    with closing(Sender(space, address)) as sender:
        with street.published(street.server, f"{_PORT}:80/udp"):
            sender.is_answered(_seen(street, address, source))
        with street.published(street.near, f"{_PORT}:80/udp"):
            sender.is_answered(_seen(street, address, source))
